package agent

import (
	"context"
	"sync"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
)

// fakeGuest is a machine's guest.
type fakeGuest struct {
	tandemv1connect.UnimplementedGuestServiceHandler
	m          *fakeMachine
	rt         *fakeRuntime
	up         chan struct{} // closed when it answers
	dead       chan struct{}
	once       sync.Once
	mu         sync.Mutex
	id         string
	configured *v1.ConfigureRequest
	hang       bool
}

func (g *fakeGuest) die() { g.once.Do(func() { close(g.dead) }); g.rt.kill() }

func (g *fakeGuest) ok(ctx context.Context) error {
	g.mu.Lock()
	hang := g.hang
	g.mu.Unlock()
	select {
	case <-g.dead:
		return errdefs.ErrUnavailable
	default:
	}
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

func (g *fakeGuest) Hello(ctx context.Context, r *connect.Request[v1.GuestHelloRequest]) (*connect.Response[v1.GuestHelloResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	select {
	case <-g.up:
	case <-g.dead:
		return nil, errdefs.ErrUnavailable
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return connect.NewResponse(&v1.GuestHelloResponse{Protocol: 1, Version: "test", GuestId: g.id, Configured: g.configured != nil, MachineId: g.configured.GetMachineId()}), nil
}

func (g *fakeGuest) Configure(ctx context.Context, r *connect.Request[v1.ConfigureRequest]) (*connect.Response[v1.ConfigureResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	if len(r.Msg.Entropy) < 64 || !g.m.hasDisk(r.Msg.ScratchSerial) {
		return nil, errdefs.ErrFailedPrecondition
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.configured = r.Msg
	return connect.NewResponse(&v1.ConfigureResponse{GuestId: g.id}), nil
}

func (g *fakeGuest) ConfigureNetwork(ctx context.Context, r *connect.Request[v1.ConfigureNetworkRequest]) (*connect.Response[v1.ConfigureNetworkResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.ConfigureNetworkResponse{}), g.ok(ctx)
}

func (g *fakeGuest) Ping(ctx context.Context, r *connect.Request[v1.PingRequest]) (*connect.Response[v1.PingResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.PingResponse{Nonce: r.Msg.Nonce}), nil
}

func (g *fakeGuest) Resources(ctx context.Context, r *connect.Request[v1.GuestResourcesRequest]) (*connect.Response[v1.GuestResourcesResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.GuestResourcesResponse{Usage: &v1.Usage{MemoryBytes: 1}, OverheadBytes: 100 << 20}), g.ok(ctx)
}

func (g *fakeGuest) OfflineCPUs(ctx context.Context, r *connect.Request[v1.OfflineCPUsRequest]) (*connect.Response[v1.OfflineCPUsResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.OfflineCPUsResponse{Online: r.Msg.Keep}), g.ok(ctx)
}

func (g *fakeGuest) Quiesce(ctx context.Context, r *connect.Request[v1.QuiesceRequest]) (*connect.Response[v1.QuiesceResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.QuiesceResponse{}), g.ok(ctx)
}

func (g *fakeGuest) Shutdown(ctx context.Context, r *connect.Request[v1.ShutdownRequest]) (*connect.Response[v1.ShutdownResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ShutdownResponse{}), nil
}
