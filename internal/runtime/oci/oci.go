// Package oci runs containers on this kernel with runc: the same code in a guest
// and on metal. It implements package runtime's contract.
//
//	m := monitor.NewClient(socket, spawn)
//	rt, err := oci.New(ctx, oci.Options{StateDir: "/var/lib/tandem/runtime", RunDir: "/run/tandem/runtime",
//		Runc: "/usr/lib/tandem/runc", Monitor: m, Endpoint: ep, Metal: true})
//
// StateDir keeps what a boot must not lose (specs, writable layers, logs); RunDir
// what it may (mounts, bundles). New looks at both, at the kernel and at the
// monitor, takes over what runs and removes what was left half-done.
//
// On the way from Start to the first instruction there is one call of runc
// (`runc run --detach`, by the monitor). Everything else (signals, pause, stats,
// clean-up) is done on the kernel's own interfaces.
package oci

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/clock"
	"tandem/internal/runtime"
	"tandem/internal/runtime/cgroup"
	"tandem/internal/runtime/monitor"
)

// Endpoint gives a container its link; implemented by internal/network/endpoint.
// All calls are idempotent.
type Endpoint interface {
	// Prepare makes what Setup would make that gives no access to anything yet, so
	// that Setup is quicker. It may be left out.
	Prepare(ctx context.Context, id string, n *v1.RuntimeNetwork) error
	// Setup makes the network namespace with its link, address and routes and
	// returns the namespace's path.
	Setup(ctx context.Context, id string, n *v1.RuntimeNetwork) (netns string, err error)
	// Teardown removes all of it; what is not there is no error.
	Teardown(ctx context.Context, id string) error
}

// Clock is the time that Stop's grace and timestamps run on.
type Clock = clock.Clock

// Options say where and with what. StateDir, RunDir, Runc and Monitor are needed.
type Options struct {
	StateDir string // survives a boot; its file system must be able to hold overlay's upper directories
	RunDir   string // need not survive a boot
	Runc     string // absolute path of a runc binary
	Monitor  *monitor.Client
	// Endpoint makes routed links; nil: only networks "none" and "host".
	Endpoint Endpoint
	// CgroupParent holds the containers' groups and nothing else; "/tandem" if
	// empty. Two runtimes on one kernel need two parents.
	CgroupParent string
	// Metal: disks are image files (loop devices) and bind mounts are allowed.
	// Otherwise disks are block devices found by serial.
	Metal bool
	// InitPath is a static binary that acts as a container's init when called as
	// "tandem-init" (package initproc); empty: `init` is refused.
	InitPath string
	// DeviceTimeout is how long to wait for a disk to appear; 0 = 20 s.
	DeviceTimeout time.Duration
	Logger        *slog.Logger
	Clock         Clock
}

// Runtime runs containers. It implements runtime.Runtime.
type Runtime struct {
	o     Options
	log   *slog.Logger
	clock Clock
	cg    *cgroup.Layout
	caps  []string // this process's bounding set, "CAP_…"

	diskMu sync.Mutex // mounting and unmounting
	mu     sync.Mutex
	ctrs   map[string]*container
	disks  map[string]*disk
	subs   map[chan *v1.RuntimeEvent]bool

	cancel context.CancelFunc
	done   chan struct{}
}

var _ runtime.Runtime = (*Runtime)(nil)

// New opens the runtime and brings what an earlier process left into order. ctx
// bounds the opening only; call Close to end it. Containers run on after Close.
func New(ctx context.Context, o Options) (*Runtime, error) {
	if o.StateDir == "" || o.RunDir == "" || o.Runc == "" || o.Monitor == nil {
		return nil, fmt.Errorf("runtime: StateDir, RunDir, Runc and Monitor are needed: %w", errdefs.ErrInvalidArgument)
	}
	for _, p := range []*string{&o.StateDir, &o.RunDir, &o.Runc} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, fmt.Errorf("runtime: %w", err)
		}
		*p = abs
	}
	if _, err := os.Stat(o.Runc); err != nil {
		return nil, fmt.Errorf("runtime: the OCI runtime is missing: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if o.CgroupParent == "" {
		o.CgroupParent = "/tandem"
	}
	if o.DeviceTimeout == 0 {
		o.DeviceTimeout = 20 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	cg, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	caps, err := boundingSet()
	if err != nil {
		return nil, err
	}
	r := &Runtime{
		o: o, log: o.Logger, clock: o.Clock, cg: cg, caps: caps,
		ctrs: map[string]*container{}, disks: map[string]*disk{}, subs: map[chan *v1.RuntimeEvent]bool{},
		done: make(chan struct{}),
	}
	for _, d := range []string{r.stateDir(""), r.runDir(""), r.diskDir(""), r.runcRoot()} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("runtime: %w", err)
		}
	}
	if err := r.loadDisks(); err != nil {
		return nil, err
	}
	if err := r.loadContainers(); err != nil {
		return nil, err
	}
	run, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	synced := make(chan struct{})
	go r.follow(run, synced)
	select {
	case <-synced:
	case <-ctx.Done():
		cancel()
		<-r.done
		return nil, fmt.Errorf("runtime: waiting for the container monitor: %w", ctx.Err())
	}
	r.sweep(ctx)
	if o.Metal {
		r.unmountUnused(ctx)
	}
	return r, nil
}

// Close lets go; containers, mounts and the monitor stay.
func (r *Runtime) Close() error {
	r.cancel()
	<-r.done
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.ctrs {
		r.flush(c)
	}
	for ch := range r.subs {
		delete(r.subs, ch)
		close(ch)
	}
	return nil
}

func (r *Runtime) stateDir(id string) string { return filepath.Join(r.o.StateDir, "containers", id) }
func (r *Runtime) runDir(id string) string   { return filepath.Join(r.o.RunDir, "c", id) }
func (r *Runtime) diskDir(n string) string   { return filepath.Join(r.o.RunDir, "d", n) }
func (r *Runtime) runcRoot() string          { return filepath.Join(r.o.RunDir, "runc") }
func (r *Runtime) cgroupPath(id string) string {
	return filepath.Join("/", r.o.CgroupParent, id)
}

// follow keeps the containers' states as the monitor tells them.
func (r *Runtime) follow(ctx context.Context, synced chan struct{}) {
	defer close(r.done)
	var once sync.Once
	for wait := 50 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 2*time.Second) {
		before, seen := r.runningIDs(), map[string]bool{}
		err := r.o.Monitor.Watch(ctx, func(st monitor.Status) {
			seen[st.ID] = true
			r.apply(st)
		}, func() {
			// A monitor that knows nothing of a running container: it is over.
			r.lost(before, seen)
			wait = 50 * time.Millisecond
			once.Do(func() { close(synced) })
		})
		if ctx.Err() != nil {
			return
		}
		r.log.Warn("lost the container monitor; asking again", "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// publish sends an event to all who listen; the caller holds mu.
func (r *Runtime) publish(action string, c *container) {
	ev := &v1.RuntimeEvent{Id: c.id, Action: action, Status: c.snapshot(), At: now(r.clock)}
	for ch := range r.subs {
		select {
		case ch <- ev:
		default: // it does not listen: it must list and watch again
			delete(r.subs, ch)
			close(ch)
		}
	}
}

// Events implements runtime.Runtime.
func (r *Runtime) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	ch := make(chan *v1.RuntimeEvent, 1024)
	ch <- &v1.RuntimeEvent{Action: "ready", At: now(r.clock)}
	r.mu.Lock()
	r.subs[ch] = true
	r.mu.Unlock()
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.subs[ch] {
			delete(r.subs, ch)
			close(ch)
		}
	})
	return ch, nil
}
