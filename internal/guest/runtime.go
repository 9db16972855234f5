package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/guest/layout"
	"tandem/internal/network/endpoint"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
	"tandem/internal/runtime/monitor"
	"tandem/internal/runtime/oci"
	"tandem/internal/runtime/remote"
)

// containers is the runtime of the guest. It opens once the guest is configured,
// because before that there is no disk for it; calls that come while it opens wait.
type containers struct {
	log  *slog.Logger
	open func(context.Context) (runtime.Runtime, error)

	once  sync.Once
	ready chan struct{} // closed when rt and h are set

	mu  sync.Mutex
	rt  runtime.Runtime
	h   http.Handler
	err error // why it is not open
}

func newContainers(log *slog.Logger, open func(context.Context) (runtime.Runtime, error)) *containers {
	return &containers{log: log, open: open, ready: make(chan struct{}),
		err: fmt.Errorf("the guest is not configured yet; call Configure first: %w", errdefs.ErrFailedPrecondition)}
}

// openRuntime opens the product's runtime.
func openRuntime(log *slog.Logger) func(context.Context) (runtime.Runtime, error) {
	return func(ctx context.Context) (runtime.Runtime, error) {
		ep, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(layout.RunDir, "netns"), Separate: true, Sole: true, Spare: true})
		if err != nil {
			return nil, err
		}
		return oci.New(ctx, oci.Options{
			StateDir: filepath.Join(layout.StateDir, "runtime"),
			RunDir:   filepath.Join(layout.RunDir, "runtime"),
			Runc:     layout.Runc,
			Monitor:  monitor.NewClient(layout.MonitorSocket, nil),
			Endpoint: ep,
			InitPath: layout.Init,
			Logger:   log,
		})
	}
}

// hotplugged is a runtime whose disks were attached only just now.
type hotplugged struct{ runtime.Runtime }

// Mount waits until the disk can be opened.
func (h hotplugged) Mount(ctx context.Context, r *v1.MountDiskRequest) (string, error) {
	if r.Serial != "" {
		if _, err := findDisk(ctx, r.Serial); err != nil {
			return "", err
		}
	}
	return h.Runtime.Mount(ctx, r)
}

// start opens the runtime in the background, until that succeeds or ctx ends.
// Further calls do nothing.
func (c *containers) start(ctx context.Context) {
	c.once.Do(func() {
		time.AfterFunc(busyTime, collectSoon)
		c.fail(nil)
		go c.keepOpening(ctx)
	})
}

func (c *containers) keepOpening(ctx context.Context) {
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 5*time.Second) {
		octx, cancel := context.WithTimeout(ctx, time.Minute)
		rt, err := c.open(octx)
		cancel()
		if err == nil {
			rt = hotplugged{rt}
			_, h := remote.NewHandler(rt)
			c.mu.Lock()
			c.rt, c.h, c.err = rt, h, nil
			c.mu.Unlock()
			close(c.ready)
			return
		}
		c.log.Error("open the container runtime", "error", err)
		c.fail(err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// fail sets what calls are told; nil: they wait for the outcome.
func (c *containers) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = nil
	if err != nil {
		c.err = fmt.Errorf("the guest's container runtime does not open: %w: %w", err, errdefs.ErrUnavailable)
	}
}

// get is the runtime, once it is open, or why there is none.
func (c *containers) get(ctx context.Context) (runtime.Runtime, http.Handler, error) {
	for {
		c.mu.Lock()
		rt, h, err := c.rt, c.h, c.err
		c.mu.Unlock()
		if rt != nil || err != nil {
			return rt, h, err
		}
		select {
		case <-c.ready:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(100 * time.Millisecond): // it may have failed
		}
	}
}

// path is where RuntimeService is served.
func (c *containers) path() string {
	p, _ := remote.NewHandler(nil)
	return p
}

// ServeHTTP is RuntimeService.
func (c *containers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, h, err := c.get(r.Context())
	if err != nil {
		connect.NewErrorWriter().Write(w, r, rpc.ToConnect(err))
		return
	}
	h.ServeHTTP(w, r)
}

// stopAll asks every container to end, all at the same time, and returns when
// they have or ctx ends. What is left dies with the machine.
func (c *containers) stopAll(ctx context.Context, grace time.Duration) {
	rt, _, err := c.get(ctx)
	if err != nil {
		return
	}
	list, err := rt.List(ctx)
	if err != nil {
		c.log.Warn("shutdown: list containers", "error", err)
		return
	}
	var wg sync.WaitGroup
	for _, st := range list {
		wg.Go(func() {
			_, err := rt.Stop(ctx, st.Id, "", grace)
			if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errdefs.IsNotFound(err) {
				c.log.Warn("shutdown: stop", "container", st.Id, "error", err)
			}
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
