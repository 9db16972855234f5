package server

import (
	"cmp"
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

// Recommend implements SystemService.
func (k *system) Recommend(ctx context.Context, req *connect.Request[v1.RecommendRequest]) (*connect.Response[v1.RecommendResponse], error) {
	s, r := k.s, req.Msg
	if len(r.Services) > maxServices {
		return nil, fmt.Errorf("%d services, at most %d: %w", len(r.Services), maxServices, errdefs.ErrInvalidArgument)
	}
	if r.Project == "" && len(r.Services) > 0 {
		return nil, fmt.Errorf("services of which project? Name it with -p: %w", errdefs.ErrInvalidArgument)
	}
	if r.Apply && r.Project == "" {
		return nil, fmt.Errorf("recommendations are applied to one project: name it with -p: %w", errdefs.ErrInvalidArgument)
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
			if !r.Apply {
				continue
			}
			if !x.Enough || sv.Template == nil {
				if len(r.Services) > 0 {
					return fmt.Errorf("service %s: %s: %w", sv.Meta.Name, x.Text, errdefs.ErrFailedPrecondition)
				}
				continue
			}
			res, differs := control.Reserve(sv, x)
			if !differs {
				continue
			}
			sv = proto.Clone(sv).(*v1.Service)
			sv.Template.Resources = res
			sv.Hash = control.ServiceHash(sv.Template)
			sv.Meta.Generation++
			tx.Update(sv)
			x.Applied = true
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
