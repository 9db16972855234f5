// Package hypervisor is the contract between Tandem and what runs virtual
// machines on one host. Back ends live below it (qemu, fake); hypervisortest is
// the suite that each must pass.
//
// A machine is made with Create, started with Start (cold, or as a clone of a
// sealed template), talked to over Channel (a raw byte stream to the guest's
// agent port; package session makes it a connection), grown and shrunk with
// Resize, given disks and NICs while it runs, and ended with Stop and Delete.
// All of it is idempotent: asking for what is already so is no error. A driver
// is restarted at any time: List then tells what still runs, and everything
// keeps working on machines that an earlier process started.
//
// Threading: every method may be called at any time from any goroutine; calls
// on one machine are serialised by the driver.
//
// Errors belong to the classes of github.com/containerd/errdefs.
package hypervisor

import (
	"context"
	"io"
	"net"
	"time"
)

// Size is a machine's size: CPU in whole virtual CPUs, memory in bytes as the
// guest gets it (the VMM's own overhead is not counted).
type Size struct {
	CPUs   int
	Memory int64
}

// MachineSpec is what cannot change while a machine exists.
type MachineSpec struct {
	ID      string // [a-z0-9-]{1,63}
	Ceiling Size   // how far it may grow; zero fields mean the driver's default
	Kernel  string // path of an uncompressed kernel (vmlinux with PVH note)
	Initrd  string // path of the initramfs
	Cmdline string // added to the driver's own kernel command line
	// GuestVersion names the content of Kernel + Initrd; templates are per version.
	GuestVersion string
}

// Disk is a block device to attach.
type Disk struct {
	ID       string // unique in the machine; [A-Za-z0-9_.-]{1,64}
	Path     string // raw image file or block device on this host
	Serial   string // SCSI serial shown to the guest, at most 36 characters
	ReadOnly bool   // many machines may share a read-only disk
}

// NIC is a network interface to attach. The tap exists already; the driver
// hands it to the VMM by file descriptor.
type NIC struct {
	ID  string
	Tap string // name of a tap device on this host
	MAC string
	MTU int
}

// StartOptions say how a machine starts.
type StartOptions struct {
	// Template, when not empty, names a template to clone from. A driver that
	// can't (gone, other ceiling, other accelerator) fails with NotFound or
	// FailedPrecondition; the caller then boots cold.
	Template string
	// ForTemplate starts a machine that SaveTemplate can save: its memory lies in
	// a file from the start, and nothing can be attached to it.
	ForTemplate bool
}

// StopOptions say how a machine stops.
type StopOptions struct {
	// Grace is how long the guest may take after an ACPI power button press;
	// zero kills at once. (The agent asks the guest itself first, over the channel.)
	Grace time.Duration
}

// State is a machine's state as the driver sees it.
type State string

// The states of a machine.
const (
	Stopped State = "stopped" // defined, no VMM
	Running State = "running"
	Paused  State = "paused"
	Crashed State = "crashed" // its VMM died, or the guest panicked; Start begins anew
)

// Status is what a driver knows of a machine.
type Status struct {
	Spec        MachineSpec
	State       State
	Size        Size // now
	PID         int  // of the VMM
	StartedAt   time.Time
	Template    string // started as a clone of this
	Accelerator string // "kvm" or "tcg"
	Disks       []Disk // attached now
	NICs        []NIC
	Message     string // why it crashed, with the VMM's last words; or what a paused one waits for
}

// EventKind says what happened to a machine.
type EventKind string

// Kinds of events.
const (
	EventStarted EventKind = "started"
	EventExited  EventKind = "exited"  // VMM gone; Status tells stopped or crashed
	EventPanic   EventKind = "panic"   // guest kernel panic
	EventReset   EventKind = "reset"   // guest rebooted
	EventHeld    EventKind = "held"    // paused by itself: its disk can't be written, see Status; it goes on by itself
	EventChannel EventKind = "channel" // the guest opened or closed its agent port: a hint only
)

// Event is something a machine did by itself, or a command finished.
type Event struct {
	Machine string
	Kind    EventKind
	Message string
}

// Capabilities say what a driver can do; the planner reads them.
type Capabilities struct {
	Accelerator  string // "kvm", "tcg"
	GrowCPU      bool
	ShrinkCPU    bool
	GrowMemory   bool
	ShrinkMemory bool
	HotDisk      bool
	HotNIC       bool
	Clone        bool
	Base         Size // what every machine starts with
	Max          Size // highest ceiling
	MemoryStep   int64
	MaxDisks     int
	MaxNICs      int
}

// Driver runs machines on one host.
type Driver interface {
	Capabilities() Capabilities

	// Create defines a machine. The same spec again is a no-op; another one is
	// AlreadyExists.
	Create(ctx context.Context, spec MachineSpec) error
	// Start starts it with Capabilities().Base, no disk and no NIC.
	Start(ctx context.Context, id string, o StartOptions) error
	Stop(ctx context.Context, id string, o StopOptions) error
	// Delete stops it and removes every trace of it.
	Delete(ctx context.Context, id string) error

	// Resize grows or shrinks a running machine, and returns the size it has at
	// the end: a guest may give back less than asked for (no error; ask again).
	// The caller sees to it that a shrink leaves the guest what it uses and some
	// room: memory is taken away by moving its pages into the rest.
	Resize(ctx context.Context, id string, want Size) (Size, error)
	AttachDisk(ctx context.Context, id string, d Disk) error
	// DetachDisk removes a disk; the guest must have unmounted it.
	DetachDisk(ctx context.Context, id, disk string) error
	AttachNIC(ctx context.Context, id string, n NIC) error
	DetachNIC(ctx context.Context, id, nic string) error

	// Console is the serial console: output from now on, input to it.
	Console(ctx context.Context, id string) (io.ReadWriteCloser, error)
	// ConsoleLog is the last n bytes that the console showed.
	ConsoleLog(ctx context.Context, id string, n int64) ([]byte, error)
	// Channel is the agent port's raw byte stream. One reader at a time: a new
	// call ends the one before.
	Channel(ctx context.Context, id string) (net.Conn, error)

	// SaveTemplate turns a running machine (quiesced, nothing attached, channel
	// closed) into the sealed template `name`; the machine is gone afterwards.
	SaveTemplate(ctx context.Context, id, name string) error
	Templates(ctx context.Context) ([]string, error)
	DeleteTemplate(ctx context.Context, name string) error

	List(ctx context.Context) ([]Status, error)
	Inspect(ctx context.Context, id string) (Status, error)
	// MemoryUse is the proportional set size that the host spends on a machine, bytes.
	MemoryUse(ctx context.Context, id string) (int64, error)
	// Watch delivers events until ctx ends; a slow reader loses none but may see
	// several folded into one.
	Watch(ctx context.Context) <-chan Event
	// Close lets go of everything; machines go on.
	Close() error
}
