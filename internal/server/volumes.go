package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

type volumes struct{ s *Server }

func volumeKey(n *v1.VolumeName) store.Key {
	return store.Key{Kind: store.Volumes, Project: cmp.Or(n.GetProject(), DefaultProject), Name: n.GetName()}
}

// volume finds one; without a project any that has the name, when only one does.
func (s *Server) volume(n *v1.VolumeName) (*v1.Volume, error) {
	if v, err := store.Get[*v1.Volume](s.store, volumeKey(n)); err == nil || n.GetProject() != "" {
		if errdefs.IsNotFound(err) {
			err = fmt.Errorf("project %s has no volume %s: %w", n.Project, n.Name, errdefs.ErrNotFound)
		}
		return v, err
	}
	var found []*v1.Volume
	for _, v := range store.List[*v1.Volume](s.store, "") {
		if v.Meta.Name == n.GetName() || v.Meta.Id == n.GetName() {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no volume %q: `tandem volume ls` lists them: %w", n.GetName(), errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("projects %s and %s both have a volume %s: name the project: %w", found[0].Meta.Project, found[1].Meta.Project, n.Name, errdefs.ErrInvalidArgument)
}

// List implements VolumeService.
func (k *volumes) List(_ context.Context, req *connect.Request[v1.ListVolumesRequest]) (*connect.Response[v1.ListVolumesResponse], error) {
	l := store.List[*v1.Volume](k.s.store, req.Msg.GetProject())
	for i, v := range l {
		l[i] = k.s.ctl.Hosts.VolumeStatus(v)
	}
	return connect.NewResponse(&v1.ListVolumesResponse{Volumes: l}), nil
}

// Inspect implements VolumeService.
func (k *volumes) Inspect(_ context.Context, req *connect.Request[v1.VolumeName]) (*connect.Response[v1.Volume], error) {
	v, err := k.s.volume(req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(k.s.ctl.Hosts.VolumeStatus(v)), nil
}

// Create implements VolumeService. An existing one with the same size is no error.
func (k *volumes) Create(ctx context.Context, req *connect.Request[v1.CreateVolumeRequest]) (*connect.Response[v1.Volume], error) {
	s, r := k.s, req.Msg
	project := cmp.Or(r.GetProject(), DefaultProject)
	if err := checkProjectName(project); err != nil {
		return nil, err
	}
	if !objectName.MatchString(r.Name) || r.SizeBytes < 0 || r.SizeBytes > maxVolumeLen || len(r.Labels) > maxList {
		return nil, fmt.Errorf("volume name %.80q or size %d is not possible: %w", r.Name, r.SizeBytes, errdefs.ErrInvalidArgument)
	}
	v := s.newVolume(project, r.Name, r.SizeBytes, r.Labels)
	_, err := s.store.Create(store.Growing(ctx), v)
	if errdefs.IsAlreadyExists(err) {
		old, gerr := store.Get[*v1.Volume](s.store, store.KeyOf(v))
		switch {
		case gerr != nil:
			return nil, gerr
		case old.Meta.Deleting:
			return nil, fmt.Errorf("volume %s is being removed: try again in a moment: %w", r.Name, errdefs.ErrFailedPrecondition)
		case r.SizeBytes == 0 || old.SizeBytes == r.SizeBytes:
			return connect.NewResponse(s.ctl.Hosts.VolumeStatus(old)), nil
		}
		return nil, fmt.Errorf("volume %s is there already, with %d bytes: %w", r.Name, old.SizeBytes, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(v), nil
}

// Remove implements VolumeService: the data is gone for good.
func (k *volumes) Remove(ctx context.Context, req *connect.Request[v1.RemoveVolumeRequest]) (*connect.Response[v1.RemoveVolumeResponse], error) {
	s, r := k.s, req.Msg
	v, err := s.volume(r.GetVolume())
	if err != nil {
		if errdefs.IsNotFound(err) && r.Force {
			return connect.NewResponse(&v1.RemoveVolumeResponse{}), nil
		}
		return nil, err
	}
	unlock, err := s.locks.lock(ctx, "project "+v.Meta.Project)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if user := s.volumeUser(v); user != "" {
		return nil, fmt.Errorf("volume %s is in use by %s: remove that first: %w", v.Meta.Name, user, errdefs.ErrFailedPrecondition)
	}
	_, err = store.Update(ctx, s.store, store.KeyOf(v), func(v *v1.Volume) error {
		if !v.Meta.Deleting {
			v.Meta.Generation++
		}
		v.Meta.Deleting = true
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return connect.NewResponse(&v1.RemoveVolumeResponse{}), nil
}

// volumeUser names what still mounts a volume.
func (s *Server) volumeUser(v *v1.Volume) string {
	for _, c := range store.List[*v1.Container](s.store, v.Meta.Project) {
		if slices.Contains(control.NamedVolumes(c.Spec), v.Meta.Name) {
			return "container " + c.Meta.Name
		}
	}
	for _, x := range store.List[*v1.Service](s.store, v.Meta.Project) {
		if !x.Meta.Deleting && slices.Contains(control.NamedVolumes(x.Template), v.Meta.Name) {
			return "service " + x.Meta.Name
		}
	}
	return ""
}
