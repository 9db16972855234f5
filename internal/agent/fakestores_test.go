package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/image"
	"tandem/internal/network"
	"tandem/internal/volume"
)

// fakeImages has images by name.
type fakeImages struct {
	w *world
	image.Store
	mu     sync.Mutex
	have   map[string]*v1.Image
	remote map[string]*v1.Image
	leases map[string][]string
	pulls  int
}

func newFakeImages() *fakeImages {
	app := &v1.Image{Id: "sha256:app", Names: []string{"app"}, Config: &v1.ImageConfig{Command: []string{"sleep"}, Env: []string{"A=1"}}}
	return &fakeImages{have: map[string]*v1.Image{"app": app, "sha256:app": app}, remote: map[string]*v1.Image{}, leases: map[string][]string{}}
}

func (f *fakeImages) Get(ctx context.Context, ref string) (*v1.Image, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := f.have[ref]; i != nil {
		return i, nil
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func (f *fakeImages) Pull(ctx context.Context, ref string, o image.PullOptions) (*v1.Image, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pulls++
	i := f.remote[ref]
	if i == nil {
		return nil, errors.New("registry says no")
	}
	f.have[ref], f.have[i.Id] = i, i
	return i, nil
}

func (f *fakeImages) Layers(ctx context.Context, id string, p image.ProgressFunc) ([]image.Layer, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return []image.Layer{{DiffID: "sha256:" + fmt.Sprintf("%064d", 1), Path: "/l1", FSType: "ext4"}, {DiffID: "sha256:" + fmt.Sprintf("%064d", 2), Path: "/l2", FSType: "ext4"}}, nil
}

func (f *fakeImages) Lease(ctx context.Context, holder, id string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leases[holder] = []string{id}
	return nil
}

func (f *fakeImages) LeaseSoon(ctx context.Context, holder, id string) (func() error, error) {
	err := f.Lease(ctx, holder, id)
	return func() error { return nil }, err
}

func (f *fakeImages) Release(ctx context.Context, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.leases, holder)
	return nil
}

func (f *fakeImages) Leases(ctx context.Context) (map[string][]string, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string][]string{}
	for k, v := range f.leases {
		out[k] = v
	}
	return out, nil
}

// fakeVolumes has volumes in memory.
type fakeVolumes struct {
	w    *world
	mu   sync.Mutex
	vols map[string]volume.Volume
	used map[string]string

	removed func(id string)
}

func newFakeVolumes() *fakeVolumes {
	return &fakeVolumes{vols: map[string]volume.Volume{}, used: map[string]string{}}
}

func (f *fakeVolumes) Ensure(ctx context.Context, id string, size int64) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	v := volume.Volume{ID: id, Path: "/v/" + id, SizeBytes: size}
	f.vols[id] = v
	return v, nil
}

func (f *fakeVolumes) EnsureScratch(ctx context.Context, id string, size int64) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	return f.Ensure(ctx, id, size)
}

func (f *fakeVolumes) Get(ctx context.Context, id string) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.vols[id]; ok {
		return v, nil
	}
	return volume.Volume{}, errdefs.ErrNotFound
}

func (f *fakeVolumes) List(ctx context.Context) (out []volume.Volume, err error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.vols {
		v.Holder = f.used[v.ID]
		out = append(out, v)
	}
	return out, nil
}

func (f *fakeVolumes) Remove(ctx context.Context, id string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	if f.removed != nil {
		f.removed(id)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used[id] != "" {
		return fmt.Errorf("volume %s in use by %s: %w", id, f.used[id], errdefs.ErrFailedPrecondition)
	}
	delete(f.vols, id)
	return nil
}

func (f *fakeVolumes) Use(ctx context.Context, id, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if h := f.used[id]; h != "" && h != holder {
		return fmt.Errorf("volume %s in use by %s: %w", id, h, errdefs.ErrFailedPrecondition)
	}
	f.used[id] = holder
	return nil
}

func (f *fakeVolumes) Unuse(ctx context.Context, id, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used[id] == holder {
		delete(f.used, id)
	}
	return nil
}

func (f *fakeVolumes) Close() error { return nil }

type fakeNetwork struct {
	w     *world
	mu    sync.Mutex
	state *network.State
	err   error // what Apply returns
	calls int
}

func (f *fakeNetwork) Apply(ctx context.Context, s *network.State) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = s
	f.calls++
	return f.err
}

func (f *fakeNetwork) TapName(id string) string { return "t" + id }

func (f *fakeNetwork) VethName(id string) string { return "v" + id }

func (f *fakeNetwork) Close() error { return nil }

func (f *fakeNetwork) Teardown(ctx context.Context) error { return nil }
