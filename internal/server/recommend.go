package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// Recommend implements SystemService.
func (k *system) Recommend(ctx context.Context, req *connect.Request[v1.RecommendRequest]) (*connect.Response[v1.RecommendResponse], error) {
	s, r := k.s, req.Msg
	if len(r.Services) > maxServices {
		return nil, fmt.Errorf("%d services, at most %d: %w", len(r.Services), maxServices, errdefs.ErrInvalidArgument)
	}
	if r.Project == "" && len(r.Services) > 0 {
		return nil, fmt.Errorf("services of which project? Name it with -p: %w", errdefs.ErrInvalidArgument)
	}
	if (r.Apply || r.Undo) && r.Project == "" {
		return nil, fmt.Errorf("recommendations are applied to one project: name it with -p: %w", errdefs.ErrInvalidArgument)
	}
	if r.Apply && r.Undo {
		return nil, fmt.Errorf("to apply and to undo at once is too much: choose one: %w", errdefs.ErrInvalidArgument)
	}
	if r.Project != "" {
		if err := checkProjectName(r.Project); err != nil {
			return nil, err
		}
		unlock, err := s.locks.lock(ctx, "project "+r.Project)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	var out *v1.RecommendResponse
	err := s.again(func() error {
		list, err := s.servicesOf(r.Project, r.Services)
		if err != nil {
			return err
		}
		tx := s.store.Txn()
		out = &v1.RecommendResponse{}
		for _, sv := range list {
			x := s.ctl.Recommend(sv)
			out.Recommendations = append(out.Recommendations, x)
			if sv.Template == nil {
				continue
			}
			sv = proto.Clone(sv).(*v1.Service)
			switch {
			case r.Undo:
				x.Undone = control.UndoRecommendation(sv)
			case r.Apply && x.Enough:
				x.Applied = control.ApplyRecommendation(sv, x, s.clock.Now())
			case r.Apply && len(r.Services) > 0:
				return fmt.Errorf("service %s: %s: %w", sv.Meta.Name, x.Text, errdefs.ErrFailedPrecondition)
			}
			if x.Applied || x.Undone {
				tx.Update(sv)
				x.InForce = sv.Applied
			}
		}
		_, err = tx.Commit(store.Growing(ctx))
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// servicesOf are a project's services by name, or all; without a project those of all.
func (s *Server) servicesOf(project string, names []string) ([]*v1.Service, error) {
	all := slices.DeleteFunc(store.List[*v1.Service](s.store, project), func(x *v1.Service) bool { return x.Meta.Deleting || x.OneOff })
	slices.SortFunc(all, func(a, b *v1.Service) int {
		return cmp.Or(cmp.Compare(a.Meta.Project, b.Meta.Project), cmp.Compare(a.Meta.Name, b.Meta.Name))
	})
	if project != "" && len(all) == 0 {
		if _, err := store.Get[*v1.Project](s.store, projectKey(project)); err != nil {
			return nil, fmt.Errorf("no project %s: `tandem ps --all` shows what there is: %w", project, errdefs.ErrNotFound)
		}
	}
	if len(names) == 0 {
		return all, nil
	}
	var out []*v1.Service
	for _, n := range names {
		i := slices.IndexFunc(all, func(x *v1.Service) bool { return x.Meta.Name == n })
		if i < 0 {
			return nil, fmt.Errorf("project %s has no service %s: `tandem ps -p %s` shows what it has: %w", project, n, project, errdefs.ErrNotFound)
		}
		if !slices.Contains(out, all[i]) {
			out = append(out, all[i])
		}
	}
	return out, nil
}

// applied puts the recommendation that was applied to a service into the template
// that its Compose file now has, or drops it when the file asks for something else
// than it did then; the plan says which, and why.
func (d *diff) applied(n *v1.Service, t *v1.ContainerSpec) {
	a, asked := n.Applied, t.Resources
	if a == nil {
		return
	}
	was, file := reserveText(a.Reserved), reserveText(control.Request(asked))
	when := a.At.AsTime().UTC().Format("2006-01-02 15:04 UTC")
	if control.SameRequest(a.Requested, asked) {
		a.Requested = asked // what is not reserved or bounded by it may differ
		t.Resources = control.WithApplied(a, n.Scale)
		if used := reserveText(control.Request(t.Resources)); used != file {
			d.note("service %s reserves %s, as was recommended and applied at %s; the file asks for %s (`tandem -p %s recommend --undo %s` goes back to that)",
				n.Meta.Name, used, when, file, n.Meta.Project, n.Meta.Name)
		}
		return
	}
	if d.req.NoRecreate {
		return // the template stays as it is, and this with it
	}
	n.Applied = nil
	d.note("service %s reserves what the file asks for, %s: that was changed since %s was recommended and applied at %s, which holds no more", n.Meta.Name, file, was, when)
}

func (d *diff) note(format string, args ...any) {
	d.plan.Notes = append(d.plan.Notes, fmt.Sprintf(format, args...))
}

// reserveText is a size of which parts may be missing.
func reserveText(z *v1.Size) string {
	var parts []string
	if n := z.GetCpuMilli(); n > 0 {
		parts = append(parts, fmt.Sprintf("%g CPU", float64(n)/1000))
	}
	if n := z.GetMemoryBytes(); n > 0 {
		parts = append(parts, bytesText(n))
	}
	return cmp.Or(strings.Join(parts, ", "), "nothing")
}
