package agent

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
)

// service is tandem.v1.AgentService.
type service struct {
	tandemv1connect.UnimplementedAgentServiceHandler
	a *Agent
}

func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(tandemv1connect.NewAgentServiceHandler(service{a: a}, rpc.HandlerOptions()...))
	return mux
}

const agentProtocol = 1

func (s service) Hello(_ context.Context, r *connect.Request[v1.AgentHelloRequest]) (*connect.Response[v1.AgentHelloResponse], error) {
	if r.Msg.Protocol == 0 {
		return nil, fmt.Errorf("hello without a protocol version: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.a.checkCluster(r.Msg.ClusterId); err != nil {
		return nil, err
	}
	s.a.mu.Lock()
	defer s.a.mu.Unlock()
	return connect.NewResponse(&v1.AgentHelloResponse{
		Protocol: min(agentProtocol, r.Msg.Protocol), Facts: s.a.hostFacts, AppliedRevision: s.a.spec.GetRevision(),
	}), nil
}

func (s service) Apply(_ context.Context, r *connect.Request[v1.ApplyHostRequest]) (*connect.Response[v1.ApplyHostResponse], error) {
	rev, err := s.a.apply(r.Msg.Spec)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ApplyHostResponse{Revision: rev}), nil
}

func (s service) Watch(ctx context.Context, _ *connect.Request[v1.WatchHostRequest], out *connect.ServerStream[v1.HostStatus]) error {
	r := s.a.hub.watch()
	defer r.leave()
	for {
		st, err := r.next(ctx)
		if err != nil {
			return err
		}
		if err := out.Send(st); err != nil {
			return err
		}
	}
}

// patience is how long a call waits for the guest that it is for: after a restart of
// the agent guests answer again within seconds.
const patience = 5 * time.Second

// runtimeOf finds the runtime that a container is in; one that is to answer soon (the
// agent has just been started, say) is waited for up to patience.
func (s service) runtimeOf(ctx context.Context, id string, patience time.Duration) (runtime.Runtime, error) {
	s.a.mu.Lock()
	c := s.a.containers[id]
	var machine string
	if c != nil {
		c.mu.Lock()
		machine = c.place
		c.mu.Unlock()
	}
	k := s.a.kernelLocked(machine)
	s.a.mu.Unlock()
	if c == nil {
		return nil, fmt.Errorf("container %q is not on this host: %w", id, errdefs.ErrNotFound)
	}
	if k == nil {
		return nil, fmt.Errorf("container %s has no machine yet: %w", id, errdefs.ErrUnavailable)
	}
	o, err := k.await(ctx, id, patience)
	if err != nil {
		return nil, err
	}
	if o.sess == nil {
		return nil, fmt.Errorf("container %s: %s can't be reached now (%s): %w", id, k, o.why, errdefs.ErrUnavailable)
	}
	return o.sess.rt, nil
}

func (s service) Kill(ctx context.Context, r *connect.Request[v1.RuntimeKillRequest]) (*connect.Response[v1.RuntimeKillResponse], error) {
	rt, err := s.runtimeOf(ctx, r.Msg.Id, patience)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.a.o.Tuning.CallTimeout)
	defer cancel()
	if err := rt.Kill(ctx, r.Msg.Id, r.Msg.Signal, r.Msg.All); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.RuntimeKillResponse{}), nil
}

func (s service) Top(ctx context.Context, r *connect.Request[v1.RuntimeTopRequest]) (*connect.Response[v1.RuntimeTopResponse], error) {
	rt, err := s.runtimeOf(ctx, r.Msg.Id, patience)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, s.a.o.Tuning.CallTimeout)
	defer cancel()
	ps, err := rt.Top(ctx, r.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.RuntimeTopResponse{Processes: ps}), nil
}

// Stats asks many containers at once; those that don't answer are left out.
func (s service) Stats(ctx context.Context, r *connect.Request[v1.AgentStatsRequest]) (*connect.Response[v1.AgentStatsResponse], error) {
	ids := r.Msg.ContainerIds
	s.a.mu.Lock()
	if r.Msg.All {
		ids = nil
		for id := range s.a.containers {
			ids = append(ids, id)
		}
	}
	machines := make([]*machine, 0, len(s.a.machines))
	for _, m := range s.a.machines {
		machines = append(machines, m)
	}
	s.a.mu.Unlock()
	if len(ids) > maxContainers {
		return nil, fmt.Errorf("stats of %d containers at once: %w", len(ids), errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, min(s.a.o.Tuning.CallTimeout, 10*time.Second))
	defer cancel()
	out := &v1.AgentStatsResponse{Containers: map[string]*v1.Usage{}, Machines: map[string]*v1.Usage{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, 32)
	for _, id := range ids {
		rt, err := s.runtimeOf(ctx, id, 0)
		if err != nil {
			if !r.Msg.All && errdefs.IsNotFound(err) {
				return nil, err
			}
			continue
		}
		slots <- struct{}{}
		wg.Add(1)
		go func() {
			defer func() { <-slots; wg.Done() }()
			if u, err := rt.Stats(ctx, id); err == nil {
				mu.Lock()
				out.Containers[id] = u
				mu.Unlock()
			}
		}()
	}
	for _, m := range machines {
		sess := m.kernel.observe("").sess
		if sess == nil || sess.guest == nil {
			continue
		}
		slots <- struct{}{}
		wg.Add(1)
		go func() {
			defer func() { <-slots; wg.Done() }()
			if res, err := sess.guest.Resources(ctx, connect.NewRequest(&v1.GuestResourcesRequest{})); err == nil && res.Msg.Usage != nil {
				mu.Lock()
				out.Machines[m.id] = res.Msg.Usage
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
	return connect.NewResponse(out), nil
}

func (s service) Logs(ctx context.Context, r *connect.Request[v1.LogOptions], out *connect.ServerStream[v1.LogEntry]) error {
	rt, err := s.runtimeOf(ctx, r.Msg.ContainerId, patience)
	if err != nil {
		return err
	}
	return rt.Logs(ctx, r.Msg, func(e *v1.LogEntry) error {
		e.ContainerId = r.Msg.ContainerId
		if len(e.Line) > 64<<10 {
			e.Line = e.Line[:64<<10]
		}
		return out.Send(e)
	})
}

func (s service) Doctor(ctx context.Context, _ *connect.Request[v1.DoctorRequest]) (*connect.Response[v1.DoctorResponse], error) {
	out := &v1.DoctorResponse{}
	if s.a.o.Doctor != nil {
		out.Findings = s.a.o.Doctor(ctx)
	}
	if err := s.a.net.degraded(); err != nil {
		out.Findings = append(out.Findings, &v1.Finding{Code: "network-degraded", Severity: "error", Title: "the network is not whole",
			Detail: cut(err.Error(), 2048), Remedy: "free the port, or publish another; it is tried again by itself"})
	}
	return connect.NewResponse(out), nil
}
