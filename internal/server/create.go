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
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// Create implements ContainerService.
func (k *containers) Create(ctx context.Context, req *connect.Request[v1.CreateContainerRequest]) (*connect.Response[v1.Container], error) {
	s, r := k.s, req.Msg
	project := cmp.Or(r.GetProject(), DefaultProject)
	if err := checkProjectName(project); err != nil {
		return nil, err
	}
	p := &problems{}
	if r.Spec == nil {
		r.Spec = &v1.ContainerSpec{}
	}
	if r.Name != "" && !objectName.MatchString(r.Name) {
		p.add("container name %.80q is malformed: letters, digits and _.- only", r.Name)
	}
	if r.Service != "" && !serviceName.MatchString(r.Service) {
		p.add("service name %.80q is malformed", r.Service)
	}
	p.spec(r.Spec)
	if err := p.err(); err != nil {
		return nil, err
	}
	unlock, err := s.locks.lock(ctx, "project "+project)
	if err != nil {
		return nil, err
	}
	defer unlock()
	now := timestamppb.New(s.clock.Now())
	id := s.ctl.NewID(16)
	c := &v1.Container{
		Meta:    &v1.Meta{Id: id, Project: project, Name: cmp.Or(r.Name, "c-"+id[:10]), CreatedAt: now, Generation: 1},
		Service: r.Service, OneOff: r.Service != "", Spec: proto.Clone(r.Spec).(*v1.ContainerSpec), Stopped: !r.Start,
		Status: &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: now},
	}
	if !r.Start {
		c.Status.State = v1.ContainerState_CONTAINER_STATE_CREATED
	}
	err = s.again(func() error {
		if r.Start {
			if err := s.portsFree(c); err != nil {
				return err
			}
		}
		tx := s.store.Txn()
		if err := s.surround(tx, c); err != nil {
			return err
		}
		_, err := tx.Create(c).Commit(store.Growing(ctx))
		return err
	})
	if err != nil {
		if errdefs.IsAlreadyExists(err) && strings.Contains(err.Error(), "container ") {
			return nil, fmt.Errorf("there is a container %s already: remove it (`tandem rm %s`) or choose another name: %w", c.Meta.Name, c.Meta.Name, errdefs.ErrAlreadyExists)
		}
		return nil, err
	}
	return connect.NewResponse(public(c)), nil
}

// portsFree says which container has a port that c publishes.
func (s *Server) portsFree(c *v1.Container) error {
	mine := func(o *v1.Container) bool {
		return o.Meta.Id == c.Meta.Id || (c.Service != "" && !c.OneOff && o.Service == c.Service && o.Meta.Project == c.Meta.Project && !o.OneOff)
	}
	p := portConflicts(control.Claimed(s.store.Snapshot()), map[string]*v1.ContainerSpec{c.Meta.Name: c.Spec}, mine)
	if len(p.list) > 0 {
		return fmt.Errorf("%s: %w", strings.Join(p.list, "; "), errdefs.ErrAlreadyExists)
	}
	return nil
}

// surround makes what a single container needs and Compose would declare: its
// project, networks and volumes.
func (s *Server) surround(tx *store.Txn, c *v1.Container) error {
	project := c.Meta.Project
	now := timestamppb.New(s.clock.Now())
	p, err := store.Get[*v1.Project](s.store, projectKey(project))
	switch {
	case errdefs.IsNotFound(err):
		tx.Create(&v1.Project{Meta: &v1.Meta{Id: "p-" + s.ctl.NewID(8), Name: project, CreatedAt: now, Generation: 1}})
	case err != nil:
		return err
	case p.Meta.Deleting:
		return fmt.Errorf("project %s is being removed: try again in a moment: %w", project, errdefs.ErrFailedPrecondition)
	}
	for _, n := range control.Attachments(c.Spec) {
		have, err := store.Get[*v1.Network](s.store, store.Key{Kind: store.Networks, Project: project, Name: n})
		switch {
		case err == nil && !have.Meta.Deleting:
			continue
		case err == nil:
			return fmt.Errorf("network %s is being removed: try again in a moment: %w", n, errdefs.ErrFailedPrecondition)
		case !errdefs.IsNotFound(err):
			return err
		case n != "default":
			return fmt.Errorf("project %s has no network %s: %w", project, n, errdefs.ErrNotFound)
		}
		cidr, err := s.ctl.Carver(s.store.Snapshot()).Take("")
		if err != nil {
			return err
		}
		tx.Create(&v1.Network{Meta: &v1.Meta{Id: "n-" + s.ctl.NewID(6), Project: project, Name: n, CreatedAt: now, Generation: 1}, Cidr: cidr})
	}
	for _, n := range slices.Compact(slices.Sorted(slices.Values(control.NamedVolumes(c.Spec)))) {
		v, err := store.Get[*v1.Volume](s.store, store.Key{Kind: store.Volumes, Project: project, Name: n})
		switch {
		case err == nil && v.Meta.Deleting:
			return fmt.Errorf("volume %s is being removed: try again in a moment: %w", n, errdefs.ErrFailedPrecondition)
		case errdefs.IsNotFound(err):
			tx.Create(s.newVolume(project, n, 0, nil))
		case err != nil:
			return err
		}
	}
	return nil
}
