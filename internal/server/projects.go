package server

import (
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

type projects struct{ s *Server }

// Apply implements ProjectService.
func (p *projects) Apply(ctx context.Context, req *connect.Request[v1.ApplyProjectRequest], out *connect.ServerStream[v1.ApplyProjectResponse]) error {
	s, r := p.s, req.Msg
	if err := checkApply(r); err != nil {
		return err
	}
	from := s.ctl.Hosts.ProgressEnd()
	d, err := p.write(ctx, r, func(plan *v1.Plan) error {
		return out.Send(&v1.ApplyProjectResponse{Kind: &v1.ApplyProjectResponse_Plan{Plan: plan}})
	})
	if err != nil || r.PlanOnly {
		return err
	}
	if r.Wait && !r.NoStart {
		if r.Timeout != nil && r.Timeout.AsDuration() > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, r.Timeout.AsDuration(), errTimeout)
			defer cancel()
		}
		w := &waiter{s: s, project: r.Project, services: d.scope, from: from, send: func(m *v1.Progress) error {
			return out.Send(&v1.ApplyProjectResponse{Kind: &v1.ApplyProjectResponse_Progress{Progress: m}})
		}}
		if err := w.run(ctx); err != nil {
			return err
		}
	}
	res := &v1.ApplyResult{Changed: d.changed, Unchanged: len(d.plan.Actions) == 0 && len(d.changed) == 0}
	in := map[string]bool{}
	for _, c := range store.List[*v1.Container](s.store, r.Project) {
		if !c.Meta.Deleting {
			res.Containers = append(res.Containers, listed(c))
			in[c.GetAssignment().GetMachineId()] = true
		}
	}
	for _, m := range store.List[*v1.Machine](s.store, "") {
		if in[m.Meta.Id] {
			res.Machines = append(res.Machines, s.ctl.Hosts.MachineStatus(m))
		}
	}
	return out.Send(&v1.ApplyProjectResponse{Kind: &v1.ApplyProjectResponse_Result{Result: res}})
}

// write computes the difference, shows the plan once and writes, again when
// somebody wrote in between.
func (p *projects) write(ctx context.Context, r *v1.ApplyProjectRequest, show func(*v1.Plan) error) (*diff, error) {
	unlock, err := p.s.locks.lock(ctx, "project "+r.Project)
	if err != nil {
		return nil, err
	}
	defer unlock()
	shown := false
	for try := 0; ; try++ {
		d, err := p.s.newDiff(r)
		if err != nil {
			return nil, err
		}
		if err := d.stillAt(r.Revision); err != nil {
			return nil, fmt.Errorf("project %s: %w", r.Project, err)
		}
		if !shown {
			if err := show(d.plan); err != nil {
				return nil, err
			}
			shown = true
		}
		if r.PlanOnly {
			return d, nil
		}
		_, err = d.tx.Commit(store.Growing(ctx))
		if err == nil {
			return d, nil
		}
		if try == 20 || !(errdefs.IsConflict(err) || errdefs.IsAlreadyExists(err)) {
			return nil, fmt.Errorf("project %s: %w", r.Project, err)
		}
	}
}

// Remove implements ProjectService: containers stop in the order of their
// dependencies, networks go last, volumes only when asked for.
func (p *projects) Remove(ctx context.Context, req *connect.Request[v1.RemoveProjectRequest], out *connect.ServerStream[v1.Progress]) error {
	s, r := p.s, req.Msg
	if err := checkProjectName(r.GetProject()); err != nil {
		return err
	}
	pr := &problems{}
	pr.duration("timeout", r.Timeout)
	if err := pr.err(); err != nil {
		return err
	}
	unlock, err := s.locks.lock(ctx, "project "+r.Project)
	if err != nil {
		return err
	}
	err = s.removeProject(ctx, r)
	unlock()
	if err != nil {
		return err
	}
	if !r.Wait {
		return nil
	}
	return s.waitRemoved(ctx, r, out.Send)
}

func (s *Server) removeProject(ctx context.Context, r *v1.RemoveProjectRequest) error {
	for try := 0; ; try++ {
		snap := s.store.Snapshot()
		tx := s.store.Txn()
		var proj *v1.Project
		for _, x := range snap.Projects {
			if x.Meta.Name == r.Project {
				proj = x
			}
		}
		left := 0 // volumes that stayed when the project went
		for _, v := range snap.Volumes {
			if r.Volumes && v.Meta.Project == r.Project && !v.External {
				left++
				if !v.Meta.Deleting {
					v = proto.Clone(v).(*v1.Volume)
					v.Meta.Deleting = true
					tx.Update(v)
				}
			}
		}
		switch {
		case proj == nil && snap.Broken(projectKey(r.Project)):
			return fmt.Errorf("the record of project %s can't be read: `tandem doctor` says why: %w", r.Project, errdefs.ErrFailedPrecondition)
		case proj == nil && left == 0:
			return fmt.Errorf("no project %s: `tandem ps --all` shows what there is: %w", r.Project, errdefs.ErrNotFound)
		case proj != nil && !proj.Meta.Deleting:
			proj = proto.Clone(proj).(*v1.Project)
			proj.Meta.Deleting = true
			proj.Meta.Generation++
			tx.Update(proj)
		}
		// Also of those that are going: who says it again is in a hurry.
		for _, c := range snap.Containers {
			if c.Meta.Project == r.Project && !proto.Equal(c.StopTimeout, r.Timeout) && (r.Timeout != nil || !c.Meta.Deleting) {
				c = proto.Clone(c).(*v1.Container)
				c.StopTimeout = r.Timeout
				tx.Update(c)
			}
		}
		_, err := tx.Commit(ctx)
		if err == nil || !errdefs.IsConflict(err) || try == 20 {
			return err
		}
	}
}

// List implements ProjectService.
func (p *projects) List(_ context.Context, _ *connect.Request[v1.ListProjectsRequest]) (*connect.Response[v1.ListProjectsResponse], error) {
	return connect.NewResponse(&v1.ListProjectsResponse{Projects: store.List[*v1.Project](p.s.store, "")}), nil
}

// ListServices implements ProjectService.
func (p *projects) ListServices(_ context.Context, req *connect.Request[v1.ListServicesRequest]) (*connect.Response[v1.ListServicesResponse], error) {
	l := store.List[*v1.Service](p.s.store, req.Msg.GetProject())
	for i, x := range l {
		l[i] = publicService(x)
	}
	return connect.NewResponse(&v1.ListServicesResponse{Services: l}), nil
}

// Scale implements ProjectService.
func (p *projects) Scale(ctx context.Context, req *connect.Request[v1.ScaleRequest], out *connect.ServerStream[v1.Progress]) error {
	s, r := p.s, req.Msg
	if err := checkProjectName(r.GetProject()); err != nil {
		return err
	}
	if len(r.Replicas) == 0 {
		return fmt.Errorf("no service named: %w", errdefs.ErrInvalidArgument)
	}
	unlock, err := s.locks.lock(ctx, "project "+r.Project)
	if err != nil {
		return err
	}
	defer unlock()
	from := s.ctl.Hosts.ProgressEnd()
	in := map[string]bool{}
	err = s.again(func() error {
		tx := s.store.Txn()
		for _, name := range sortedKeys(r.Replicas) {
			n := r.Replicas[name]
			sv, err := store.Get[*v1.Service](s.store, store.Key{Kind: store.Services, Project: r.Project, Name: name})
			if err != nil || sv.Meta.Deleting {
				return fmt.Errorf("project %s has no service %s: %w", r.Project, name, errdefs.ErrNotFound)
			}
			if n < 0 || n > maxReplicas || (n > 1 && sv.ContainerName != "") {
				return fmt.Errorf("service %s: %d containers are not possible (0 to %d; 1 with container_name): %w", name, n, maxReplicas, errdefs.ErrInvalidArgument)
			}
			if p := sv.Scale; p != nil && n != 0 && (n < p.Min || n > p.Max) {
				return fmt.Errorf("service %s scales by itself between %d and %d: %d is not possible; change x-tandem.scale, or give 0 to switch it off: %w", name, p.Min, p.Max, n, errdefs.ErrInvalidArgument)
			}
			in[name] = true
			if sv.Replicas != n {
				sv = proto.Clone(sv).(*v1.Service)
				sv.Replicas = n
				sv.Meta.Generation++
				tx.Update(sv)
			}
		}
		_, err := tx.Commit(ctx)
		return err
	})
	if err != nil || !r.Wait {
		return err
	}
	w := &waiter{s: s, project: r.Project, services: in, from: from, send: out.Send}
	return w.run(ctx)
}

// again repeats fn while somebody else writes in between.
func (s *Server) again(fn func() error) error {
	for try := 0; ; try++ {
		err := fn()
		if err == nil || !errdefs.IsConflict(err) || try == 20 {
			return err
		}
	}
}

// public is a container as the API shows it: without the content of files.
func public(c *v1.Container) *v1.Container {
	if len(c.GetSpec().GetFiles()) == 0 {
		return c
	}
	c = proto.Clone(c).(*v1.Container)
	hide(c.Spec)
	return c
}

func publicService(x *v1.Service) *v1.Service {
	if len(x.GetTemplate().GetFiles()) == 0 {
		return x
	}
	x = proto.Clone(x).(*v1.Service)
	hide(x.Template)
	return x
}

func hide(s *v1.ContainerSpec) {
	for _, f := range s.Files {
		f.Content = nil
	}
}
