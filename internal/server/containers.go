package server

import (
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

type containers struct{ s *Server }

// List implements ContainerService.
func (k *containers) List(_ context.Context, req *connect.Request[v1.ListContainersRequest]) (*connect.Response[v1.ListContainersResponse], error) {
	r := req.Msg
	out := &v1.ListContainersResponse{}
	for _, c := range store.List[*v1.Container](k.s.store, r.GetProject()) {
		if !r.All && !alive(c) || len(r.Services) > 0 && !slices.Contains(r.Services, c.Service) || !hasLabels(c, r.Labels) {
			continue
		}
		out.Containers = append(out.Containers, listed(c))
	}
	for _, sv := range store.List[*v1.Service](k.s.store, r.GetProject()) {
		if sc := k.s.ctl.Scale(sv); sc != nil && (len(r.Services) == 0 || slices.Contains(r.Services, sv.Meta.Name)) {
			out.Scales = append(out.Scales, sc)
		}
	}
	return connect.NewResponse(out), nil
}

// listed is a container as lists show it: of the planner's reason only the
// sentence (Inspect and Explain tell all of it).
func listed(c *v1.Container) *v1.Container {
	c = public(c)
	a := c.GetAssignment()
	if len(a.GetReason().GetOptions())+len(a.GetReason().GetExclusions()) == 0 {
		return c
	}
	return &v1.Container{Meta: c.Meta, Service: c.Service, Ordinal: c.Ordinal, ServiceHash: c.ServiceHash, Spec: c.Spec, Stopped: c.Stopped, Paused: c.Paused,
		RestartGeneration: c.RestartGeneration, StopTimeout: c.StopTimeout, Status: c.Status, OneOff: c.OneOff,
		Assignment: &v1.Assignment{HostId: a.HostId, MachineId: a.MachineId, Ip: a.Ip, NetworkId: a.NetworkId, Addresses: a.Addresses, At: a.At, Ports: a.Ports,
			Reason: &v1.Reason{Summary: a.Reason.Summary}}}
}

// alive is what `ps` shows without --all.
func alive(c *v1.Container) bool {
	switch c.GetStatus().GetState() {
	case v1.ContainerState_CONTAINER_STATE_EXITED, v1.ContainerState_CONTAINER_STATE_CREATED:
		return false
	case v1.ContainerState_CONTAINER_STATE_PENDING, v1.ContainerState_CONTAINER_STATE_FAILED:
		return !c.Stopped
	}
	return true
}

func hasLabels(c *v1.Container, want map[string]string) bool {
	for k, v := range want {
		got, ok := c.GetSpec().GetLabels()[k]
		if !ok || v != "" && got != v {
			return false
		}
	}
	return true
}

// Inspect implements ContainerService.
func (k *containers) Inspect(_ context.Context, req *connect.Request[v1.ContainerRequest]) (*connect.Response[v1.Container], error) {
	c, err := k.s.container(req.Msg.GetContainer(), req.Msg.GetProject())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(public(c)), nil
}

// change writes what fn does to each selected container, in one transaction.
func (s *Server) change(ctx context.Context, sel *v1.Selector, fn func(*v1.Container) error) ([]*v1.Container, error) {
	var ids []string
	first, err := s.selected(sel)
	if err != nil {
		return nil, err
	}
	if len(first) == 0 && len(sel.GetContainers()) == 0 && sel.GetProject() == "" {
		return nil, fmt.Errorf("no container named: %w", errdefs.ErrInvalidArgument)
	}
	for _, c := range first {
		ids = append(ids, c.Meta.Id)
	}
	var out []*v1.Container
	err = s.again(func() error {
		out = out[:0]
		tx := s.store.Txn()
		for _, id := range ids {
			c, err := store.ByID[*v1.Container](s.store, store.Containers, id)
			if err != nil {
				continue // gone meanwhile
			}
			if c.Meta.Deleting {
				if len(sel.GetContainers()) > 0 {
					return fmt.Errorf("container %s is being removed: %w", c.Meta.Name, errdefs.ErrFailedPrecondition)
				}
				continue
			}
			n := proto.Clone(c).(*v1.Container)
			if err := fn(n); err != nil {
				return err
			}
			if !proto.Equal(n, c) {
				n.Meta.Generation++
				tx.Update(n)
			}
			out = append(out, n)
		}
		_, err := tx.Commit(ctx)
		return err
	})
	return out, err
}

// markServices notes that services were stopped or started as a whole, so that
// containers made later follow.
func (s *Server) markServices(ctx context.Context, sel *v1.Selector, stopped bool) error {
	if sel.GetProject() == "" || len(sel.GetContainers()) > 0 {
		return nil
	}
	return s.again(func() error {
		tx := s.store.Txn()
		for _, x := range store.List[*v1.Service](s.store, sel.Project) {
			if x.Stopped != stopped && !x.Meta.Deleting && (len(sel.Services) == 0 || slices.Contains(sel.Services, x.Meta.Name)) {
				x = proto.Clone(x).(*v1.Service)
				x.Stopped = stopped
				x.Meta.Generation++
				tx.Update(x)
			}
		}
		_, err := tx.Commit(ctx)
		return err
	})
}

func publicAll(cs []*v1.Container) []*v1.Container {
	out := make([]*v1.Container, len(cs))
	for i, c := range cs {
		out[i] = public(c)
	}
	return out
}

// Start implements ContainerService.
func (k *containers) Start(ctx context.Context, req *connect.Request[v1.StartContainersRequest]) (*connect.Response[v1.StartContainersResponse], error) {
	s := k.s
	sel := req.Msg.GetSelector()
	if err := s.markServices(ctx, sel, false); err != nil {
		return nil, err
	}
	out, err := s.change(ctx, sel, func(c *v1.Container) error {
		over := control.Ended(c) || c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_FAILED
		if c.Stopped {
			if err := s.portsFree(c); err != nil {
				return err
			}
		}
		if over {
			c.RestartGeneration++
		}
		c.Stopped, c.Paused = false, false
		if c.GetAssignment().GetHostId() == "" && c.Status != nil {
			c.Status.State = v1.ContainerState_CONTAINER_STATE_PENDING
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.StartContainersResponse{Containers: publicAll(out)}), nil
}

// Stop implements ContainerService.
func (k *containers) Stop(ctx context.Context, req *connect.Request[v1.StopContainersRequest]) (*connect.Response[v1.StopContainersResponse], error) {
	s, r := k.s, req.Msg
	if err := stopTimeout(r); err != nil {
		return nil, err
	}
	if err := s.markServices(ctx, r.Selector, true); err != nil {
		return nil, err
	}
	out, err := s.change(ctx, r.Selector, func(c *v1.Container) error {
		c.Stopped = true
		c.StopTimeout = r.Timeout
		return nil
	})
	if err != nil {
		return nil, err
	}
	if r.Wait {
		out, err = s.waitAll(ctx, out, s.settled)
	}
	return connect.NewResponse(&v1.StopContainersResponse{Containers: publicAll(out)}), err
}

// settled says that a container has stopped after what was last asked of it: just
// after a start the state before it still stands. A host that is away can't tell.
func (s *Server) settled(c *v1.Container) bool {
	host := c.GetAssignment().GetHostId()
	if !stopped(c) || host == "" {
		return stopped(c)
	}
	if _, err := s.ctl.Hosts.Client(host); err != nil {
		return true
	}
	return c.GetStatus().GetObservedGeneration() >= c.Meta.Generation
}

func stopTimeout(r *v1.StopContainersRequest) error {
	p := &problems{}
	p.duration("timeout", r.Timeout)
	return p.err()
}

// stopped says that nothing of a container runs.
func stopped(c *v1.Container) bool {
	switch c.GetStatus().GetState() {
	case v1.ContainerState_CONTAINER_STATE_EXITED, v1.ContainerState_CONTAINER_STATE_CREATED, v1.ContainerState_CONTAINER_STATE_FAILED:
		return true
	}
	return c.GetAssignment().GetHostId() == ""
}

// Restart implements ContainerService.
func (k *containers) Restart(ctx context.Context, req *connect.Request[v1.StopContainersRequest]) (*connect.Response[v1.StopContainersResponse], error) {
	s, r := k.s, req.Msg
	if err := stopTimeout(r); err != nil {
		return nil, err
	}
	if err := s.markServices(ctx, r.Selector, false); err != nil {
		return nil, err
	}
	out, err := s.change(ctx, r.Selector, func(c *v1.Container) error {
		c.Stopped, c.Paused = false, false
		c.RestartGeneration++
		c.StopTimeout = r.Timeout
		return nil
	})
	if err != nil {
		return nil, err
	}
	if r.Wait {
		out, err = s.waitAll(ctx, out, func(c *v1.Container) bool {
			st := c.GetStatus()
			return st.GetObservedRestartGeneration() >= c.RestartGeneration && (st.GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING || stopped(c))
		})
	}
	return connect.NewResponse(&v1.StopContainersResponse{Containers: publicAll(out)}), err
}

// Remove implements ContainerService.
func (k *containers) Remove(ctx context.Context, req *connect.Request[v1.RemoveContainersRequest]) (*connect.Response[v1.RemoveContainersResponse], error) {
	s, r := k.s, req.Msg
	sel := r.GetSelector()
	whole := len(sel.GetContainers()) == 0 // `rm` of a project or service: what is stopped goes
	removed := &v1.RemoveContainersResponse{}
	out, err := s.change(ctx, sel, func(c *v1.Container) error {
		idle := stopped(c) && (c.Stopped || c.Service == "" || c.OneOff || control.Ended(c))
		if !idle && !r.Force {
			if whole {
				return nil
			}
			return fmt.Errorf("container %s is %s: stop it first, or use --force: %w", c.Meta.Name, stateWord(c), errdefs.ErrFailedPrecondition)
		}
		c.Meta.Deleting, c.StopTimeout = true, nil
		return nil
	})
	if err != nil {
		return nil, err
	}
	var going []*v1.Container
	for _, c := range out {
		if c.Meta.Deleting {
			going = append(going, c)
			removed.Removed = append(removed.Removed, c.Meta.Name)
		}
	}
	if r.Wait {
		if _, err := s.waitAll(ctx, going, func(*v1.Container) bool { return false }); err != nil {
			return nil, err
		}
	}
	if r.Volumes {
		s.log.Debug("anonymous volumes go with their container")
	}
	return connect.NewResponse(removed), nil
}

// waitAll returns when ok holds for each container, or it is gone.
func (s *Server) waitAll(ctx context.Context, cs []*v1.Container, ok func(*v1.Container) bool) ([]*v1.Container, error) {
	out := slices.Clone(cs)
	for {
		_, changed := s.store.Changed()
		left := ""
		for i, c := range out {
			n, err := store.ByID[*v1.Container](s.store, store.Containers, c.Meta.Id)
			if err != nil {
				continue
			}
			out[i] = n
			if !ok(n) {
				left = n.Meta.Name
			}
		}
		if left == "" {
			return out, nil
		}
		select {
		case <-ctx.Done():
			return out, fmt.Errorf("waiting for %s: %w", left, ctx.Err())
		case <-s.store.Failed():
			return out, s.store.Err()
		case <-changed:
		}
	}
}

// Pause implements ContainerService.
func (k *containers) Pause(ctx context.Context, req *connect.Request[v1.PauseContainersRequest]) (*connect.Response[v1.PauseContainersResponse], error) {
	_, err := k.s.change(ctx, req.Msg.GetSelector(), func(c *v1.Container) error {
		st := c.GetStatus().GetState()
		if !req.Msg.Resume && st != v1.ContainerState_CONTAINER_STATE_RUNNING && st != v1.ContainerState_CONTAINER_STATE_PAUSED {
			return fmt.Errorf("container %s is %s: only a running one can be paused: %w", c.Meta.Name, stateWord(c), errdefs.ErrFailedPrecondition)
		}
		c.Paused = !req.Msg.Resume
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.PauseContainersResponse{}), nil
}
