package server

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// Update implements ContainerService. Only what is given changes.
func (k *containers) Update(ctx context.Context, req *connect.Request[v1.UpdateContainerRequest]) (*connect.Response[v1.Container], error) {
	s, r := k.s, req.Msg
	p := &problems{}
	p.resources(r.Resources)
	p.restart(r.Restart, false)
	if err := p.err(); err != nil {
		return nil, err
	}
	out, err := s.change(ctx, &v1.Selector{Containers: []string{r.Container}, Project: r.Project}, func(c *v1.Container) error {
		if r.Resources != nil {
			if err := s.fits(c, r.Resources); err != nil {
				return err
			}
			c.Spec.Resources = r.Resources
		}
		if r.Restart != nil {
			c.Spec.Restart = r.Restart
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(public(out[0])), nil
}

// fits says whether a container that is placed may reserve so much where it is.
func (s *Server) fits(c *v1.Container, r *v1.Resources) error {
	m, err := store.ByID[*v1.Machine](s.store, store.Machines, c.GetAssignment().GetMachineId())
	if err != nil {
		return nil // on metal, or nowhere yet
	}
	need, ceiling := s.machineNeeds(m, c.Meta.Id), m.GetCeiling()
	want := control.Request(r)
	need.CpuMilli += want.CpuMilli
	need.MemoryBytes += want.MemoryBytes
	if ceiling.GetMemoryBytes() > 0 && (need.MemoryBytes > ceiling.MemoryBytes || need.CpuMilli > ceiling.GetCpuMilli()) {
		return fmt.Errorf("machine %s can become %s at most, and would need %s: create the container anew with these limits: %w", m.Meta.Name, sizeText(ceiling), sizeText(need), errdefs.ErrResourceExhausted)
	}
	return nil
}

// Wait implements ContainerService.
func (k *containers) Wait(ctx context.Context, req *connect.Request[v1.WaitContainerRequest]) (*connect.Response[v1.WaitContainerResponse], error) {
	s, r := k.s, req.Msg
	done := map[string]func(*v1.Container) bool{
		"exited": func(c *v1.Container) bool {
			return control.Ended(c) || c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_FAILED
		},
		"running": func(c *v1.Container) bool {
			return c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING
		},
		// started is what docker run -d waits for: it runs, or has run.
		"started": func(c *v1.Container) bool {
			return c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING || control.Ended(c) && c.GetStatus().GetStartedAt() != nil
		},
		"healthy": control.Ready,
		"removed": func(*v1.Container) bool { return false },
	}[cmp.Or(r.Condition, "exited")]
	if done == nil {
		return nil, fmt.Errorf("condition %.20q is not one of %s: %w", r.Condition, strings.Join(slices.Sorted(maps.Keys(map[string]int{"exited": 0, "running": 0, "started": 0, "healthy": 0, "removed": 0})), ", "), errdefs.ErrInvalidArgument)
	}
	c, err := s.container(r.Container, r.Project)
	if err != nil {
		return nil, err
	}
	id := c.Meta.Id
	for {
		_, changed := s.store.Changed()
		n, err := store.ByID[*v1.Container](s.store, store.Containers, id)
		gone := err != nil
		if !gone {
			c = n
		} else if last := s.ctl.Removed(id); last != nil {
			c = last
		}
		over := c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_FAILED || control.Ended(c)
		switch {
		case gone && (r.Condition == "removed" || r.Condition == "" || r.Condition == "exited"), !gone && done(c):
			return connect.NewResponse(&v1.WaitContainerResponse{Container: public(c), ExitCode: c.GetStatus().GetExitCode()}), nil
		case gone:
			return nil, fmt.Errorf("container %s was removed: %w", c.Meta.Name, errdefs.ErrNotFound)
		case over && r.Condition != "removed":
			return nil, fmt.Errorf("container %s will not be %s: it is %s (exit code %d) %s: %w", c.Meta.Name, r.Condition, stateWord(c), c.Status.ExitCode, c.Status.Message, errdefs.ErrFailedPrecondition)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.store.Failed():
			return nil, s.store.Err()
		case <-changed:
		}
	}
}
