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

	"tandem/internal/guest/layout"
	"tandem/internal/network/endpoint"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
	"tandem/internal/runtime/monitor"
	"tandem/internal/runtime/oci"
	"tandem/internal/runtime/remote"
)

// containers is the runtime of the guest. It opens once the guest is configured,
// because before that there is no disk for it.
type containers struct {
	log  *slog.Logger
	open func(context.Context) (runtime.Runtime, error)

	mu  sync.Mutex
	rt  runtime.Runtime
	h   http.Handler
	err error // why it is not open
}

func newContainers(log *slog.Logger, open func(context.Context) (runtime.Runtime, error)) *containers {
	return &containers{log: log, open: open,
		err: fmt.Errorf("the guest is not configured yet; call Configure first: %w", errdefs.ErrFailedPrecondition)}
}

// openRuntime opens the product's runtime.
func openRuntime(log *slog.Logger) func(context.Context) (runtime.Runtime, error) {
	return func(ctx context.Context) (runtime.Runtime, error) {
		ep, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(layout.RunDir, "netns")})
		if err != nil {
			return nil, err
		}
		return oci.New(ctx, oci.Options{
			StateDir: filepath.Join(layout.StateDir, "runtime"),
			RunDir:   filepath.Join(layout.RunDir, "runtime"),
			Runc:     layout.Runc,
			Monitor:  monitor.NewClient(layout.MonitorSocket, nil),
			Endpoint: ep,
			Logger:   log,
		})
	}
}

// start opens the runtime, or finds it open.
func (c *containers) start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rt != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	rt, err := c.open(ctx)
	if err != nil {
		c.err = fmt.Errorf("the guest's container runtime does not open: %w: %w", err, errdefs.ErrUnavailable)
		return c.err
	}
	_, h := remote.NewHandler(rt)
	c.rt, c.h, c.err = rt, h, nil
	return nil
}

// keepStarting opens the runtime of a guest that an earlier agent process served.
func (c *containers) keepStarting(ctx context.Context) {
	for wait := 100 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 10*time.Second) {
		err := c.start(ctx)
		if err == nil {
			return
		}
		c.log.Error("open the container runtime", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// get is the runtime, or why there is none.
func (c *containers) get() (runtime.Runtime, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rt, c.err
}

// path is where RuntimeService is served.
func (c *containers) path() string {
	p, _ := remote.NewHandler(nil)
	return p
}

// ServeHTTP is RuntimeService.
func (c *containers) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	h, err := c.h, c.err
	c.mu.Unlock()
	if h == nil {
		connect.NewErrorWriter().Write(w, r, rpc.ToConnect(err))
		return
	}
	h.ServeHTTP(w, r)
}

// stopAll asks every container to end, all at the same time, and returns when
// they have or ctx ends. What is left dies with the machine.
func (c *containers) stopAll(ctx context.Context, grace time.Duration) {
	rt, err := c.get()
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
