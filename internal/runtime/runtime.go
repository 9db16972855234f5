// Package runtime is the contract for containers on "this kernel": the same in
// a guest and on a metal host. oci implements it with runc, remote speaks it to
// a guest over the agent channel, fake serves tests; runtimetest is the suite
// that each must pass.
//
// A container's life: Mount its disks (layers, volumes), Create, Start, then
// Wait or watch Events, Stop, Delete, Unmount. Every call is idempotent where
// that makes sense: Create of an existing id is AlreadyExists, Start of a
// running one and Stop or Delete of what is gone are no errors.
//
// A runtime survives being killed: a new process finds all containers again,
// with logs and exit codes of those that ended meanwhile. Messages are those of
// api/tandem/v1, so that nothing is translated between a guest and its host.
//
// Errors belong to the classes of github.com/containerd/errdefs.
package runtime

import (
	"context"
	"io"
	"time"

	v1 "tandem/api/tandem/v1"
)

// Streams connect a process to a client. Nil fields are not connected. With a
// terminal there is no Stderr. Resize and Signals may be nil.
type Streams struct {
	Stdin   io.Reader // EOF closes the process's standard input
	Stdout  io.Writer
	Stderr  io.Writer
	Resize  <-chan *v1.WindowSize
	Signals <-chan string // "TERM", "SIGINT", "9": sent to the process
	Started func()        // called once the process runs (exec) or is attached
	// Ended, if set, is called by Attach with the process's exit code before it
	// returns. A runtime that does not know it (a guest of an older release) leaves
	// it out: ask Wait then.
	Ended func(code int)
}

// Runtime runs containers.
type Runtime interface {
	// Mount makes a disk available for Create and returns where; see MountDiskRequest.
	Mount(ctx context.Context, r *v1.MountDiskRequest) (path string, err error)
	// Unmount lets it go; FailedPrecondition while a container uses it.
	Unmount(ctx context.Context, id string) error

	Create(ctx context.Context, spec *v1.RuntimeSpec) error
	Start(ctx context.Context, id string) error
	// Stop sends signal (empty: the spec's stop signal, or TERM), waits for
	// grace, then kills. It returns when the container has ended.
	Stop(ctx context.Context, id, signal string, grace time.Duration) (*v1.RuntimeStatus, error)
	// Kill sends a signal to the container's first process, or to all.
	Kill(ctx context.Context, id, signal string, all bool) error
	// Delete removes a container that has ended, or with force any; its logs and
	// writable layer go too.
	Delete(ctx context.Context, id string, force bool) error
	Pause(ctx context.Context, id string) error
	Resume(ctx context.Context, id string) error
	// Update changes limits of a container while it runs.
	Update(ctx context.Context, id string, r *v1.Resources) error

	// Exec runs a further process in a running container and returns its exit code.
	Exec(ctx context.Context, spec *v1.ExecSpec, s Streams) (exitCode int, err error)
	// Attach connects to the container's first process until it ends or ctx does.
	Attach(ctx context.Context, spec *v1.AttachSpec, s Streams) error
	// Logs calls fn for each entry, oldest first; with Follow until the container
	// is deleted or ctx ends. fn's error ends it.
	Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error

	// Wait returns when the container has ended (at once if it had).
	Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error)
	List(ctx context.Context) ([]*v1.RuntimeStatus, error)
	Stats(ctx context.Context, id string) (*v1.Usage, error)
	Top(ctx context.Context, id string) ([]*v1.Process, error)
	// Events delivers what happens from now on; the first has Action "ready".
	// The channel closes when ctx ends or the runtime is lost: List, then watch again.
	Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error)
	Close() error
}
