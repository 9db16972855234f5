package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/clock"
	"tandem/internal/hypervisor"
	"tandem/internal/image"
	"tandem/internal/network"
	"tandem/internal/runtime"
	"tandem/internal/volume"
)

// Guest names the guest image that machines boot: a kernel, an initramfs and
// the version of their content.
type Guest struct {
	Kernel  string // path of an uncompressed kernel
	Initrd  string // path of the initramfs
	Version string // names the content of both; templates are kept per version
	Cmdline string // added to the kernel's command line
}

// Clock is the agent's time. The default is the system's.
type Clock = clock.Clock

// GuestLink is a connection to a guest's agent.
type GuestLink struct {
	Guest   tandemv1connect.GuestServiceClient
	Runtime runtime.Runtime
	// Done is closed when the connection is lost.
	Done <-chan struct{}
	// Close ends the connection; the guest goes on.
	Close func()
}

// Connector turns a machine's raw agent channel into a connection. The default
// puts the session layer, HTTP/2 and the runtime's client on it.
type Connector func(ctx context.Context, machine string, channel net.Conn) (*GuestLink, error)

// Tuning holds the agent's times. Zero fields take the defaults; under software
// emulation the defaults of what waits for a guest are three times as long.
type Tuning struct {
	BootTimeout      time.Duration // VMM started -> guest answers; then it is started again (60 s)
	CallTimeout      time.Duration // one short call to a guest (20 s)
	PingEvery        time.Duration // keep-alive (5 s)
	PingTimeout      time.Duration // one keep-alive (5 s)
	UnreachablePings int           // unanswered in a row until UNREACHABLE (3)
	RestartPings     int           // unanswered in a row until the machine is restarted (9)
	MeasureEvery     time.Duration // memory and usage of machines (15 s)
	DiskIdle         time.Duration // an unused layer stays attached so long (2 min)
	StopGrace        time.Duration // containers' default grace period (10 s)
	ShutdownGrace    time.Duration // a guest may take so long to power off, beside its containers' grace (15 s)
	RestartDelay     time.Duration // first delay of a container's restart, doubled each time (100 ms)
	RestartDelayMax  time.Duration // (1 min)
	RestartReset     time.Duration // a container that ran so long starts again from RestartDelay (10 s)
	RetryDelay       time.Duration // first delay after a failed step (pull, prepare, boot), doubled (1 s)
	RetryDelayMax    time.Duration // (1 min)
	ScratchSize      int64         // virtual size of a machine's scratch disk (32 GiB, sparse)
	AnonymousSize    int64         // virtual size of an anonymous volume (16 GiB, sparse)
	ColdBootGuess    time.Duration // how long a cold boot takes until one was measured (2 s; 8 s emulated)
}

// Options are what an agent needs. StateDir, Driver, Images, Volumes and
// Network are required; the rest has defaults.
type Options struct {
	StateDir string // the agent's own directory, kept for ever
	RunDir   string // until the next boot of the host; default StateDir
	HostName string // default: os.Hostname
	Zone     string
	Version  string // of the tandem binary

	Driver  hypervisor.Driver
	Metal   runtime.Runtime // containers on the host itself; nil: not offered
	Images  image.Store
	Volumes volume.Store
	Network network.Network
	Guest   Guest

	// Capacity overrides what Tandem may use of the host; nil: all CPUs, and
	// memory less a reserve.
	Capacity *v1.Size
	// NoTemplate turns fast clones off: every machine boots cold.
	NoTemplate bool
	// Doctor answers `tandem doctor`.
	Doctor func(ctx context.Context) []*v1.Finding

	Clock   Clock
	Rand    io.Reader // entropy for guests and ids; default crypto/rand
	Logger  *slog.Logger
	Connect Connector
	Tuning  Tuning
}

func (o *Options) fill() error {
	need := func(ok bool, name string) error {
		if ok {
			return nil
		}
		return fmt.Errorf("agent.Options.%s is missing: %w", name, errdefs.ErrInvalidArgument)
	}
	for _, err := range []error{
		need(o.StateDir != "", "StateDir"), need(o.Driver != nil, "Driver"), need(o.Images != nil, "Images"),
		need(o.Volumes != nil, "Volumes"), need(o.Network != nil, "Network"),
	} {
		if err != nil {
			return err
		}
	}
	if o.RunDir == "" {
		o.RunDir = o.StateDir
	}
	if o.HostName == "" {
		h, err := os.Hostname()
		if err != nil {
			return err
		}
		o.HostName = h
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if o.Rand == nil {
		o.Rand = rand.Reader
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Connect == nil {
		o.Connect = connectGuest
	}
	o.Tuning.fill(o.Driver.Capabilities().Accelerator == "tcg")
	return nil
}

func (t *Tuning) fill(emulated bool) {
	slow := time.Duration(1)
	guess := 2 * time.Second
	if emulated {
		slow, guess = 3, 8*time.Second
	}
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&t.BootTimeout, 60*time.Second*slow)
	def(&t.CallTimeout, 20*time.Second*slow)
	def(&t.PingEvery, 5*time.Second)
	def(&t.PingTimeout, 5*time.Second*slow)
	def(&t.MeasureEvery, 15*time.Second)
	def(&t.DiskIdle, 2*time.Minute)
	def(&t.StopGrace, 10*time.Second)
	def(&t.ShutdownGrace, 15*time.Second*slow)
	def(&t.RestartDelay, 100*time.Millisecond)
	def(&t.RestartDelayMax, time.Minute)
	def(&t.RestartReset, 10*time.Second)
	def(&t.RetryDelay, time.Second)
	def(&t.RetryDelayMax, time.Minute)
	def(&t.ColdBootGuess, guess)
	if t.UnreachablePings <= 0 {
		t.UnreachablePings = 3
	}
	if t.RestartPings <= 0 {
		t.RestartPings = 9
	}
	if t.ScratchSize <= 0 {
		t.ScratchSize = 32 << 30
	}
	if t.AnonymousSize <= 0 {
		t.AnonymousSize = 16 << 30
	}
}
