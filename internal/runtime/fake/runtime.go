package fake

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
)

// Mount implements runtime.Runtime.
func (r *Runtime) Mount(ctx context.Context, q *v1.MountDiskRequest) (string, error) {
	if err := r.enter(ctx, "mount", q.GetId()); err != nil {
		return "", err
	}
	if q.GetId() == "" {
		return "", fmt.Errorf("disk without an id: %w", errdefs.ErrInvalidArgument)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if have := r.disks[q.Id]; have != nil && !proto.Equal(have, q) {
		return "", fmt.Errorf("disk %s is mounted in another way: %w", q.Id, errdefs.ErrFailedPrecondition)
	}
	r.disks[q.Id] = proto.CloneOf(q)
	return "/fake/disks/" + q.Id, nil
}

// Unmount implements runtime.Runtime.
func (r *Runtime) Unmount(ctx context.Context, id string) error {
	if err := r.enter(ctx, "unmount", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.ctrs {
		used := slices.Contains(c.spec.Layers, id)
		for _, m := range c.spec.Mounts {
			used = used || m.Type == v1.RuntimeMount_TYPE_DISK && m.Source == id
		}
		if used {
			return fmt.Errorf("disk %s is used by container %s: %w", id, c.spec.Id, errdefs.ErrFailedPrecondition)
		}
	}
	delete(r.disks, id)
	return nil
}

// Create implements runtime.Runtime.
func (r *Runtime) Create(ctx context.Context, spec *v1.RuntimeSpec) error {
	if err := r.enter(ctx, "create", spec.GetId()); err != nil {
		return err
	}
	if !idPattern.MatchString(spec.GetId()) || len(spec.Args) == 0 || len(spec.Layers) == 0 {
		return fmt.Errorf("container %q needs an id, a command and layers: %w", spec.GetId(), errdefs.ErrInvalidArgument)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ctrs[spec.Id] != nil {
		return fmt.Errorf("container %s: %w", spec.Id, errdefs.ErrAlreadyExists)
	}
	for _, l := range spec.Layers {
		if r.disks[l] == nil {
			return fmt.Errorf("container %s: layer %s is not mounted: %w", spec.Id, l, errdefs.ErrFailedPrecondition)
		}
	}
	c := &container{
		spec: proto.CloneOf(spec), ended: make(chan struct{}), logMore: make(chan struct{}), gone: make(chan struct{}),
		clients: map[chan []byte]bool{},
		st:      &v1.RuntimeStatus{Id: spec.Id, State: v1.ContainerState_CONTAINER_STATE_CREATED, CreatedAt: timestamppb.Now(), Labels: spec.Labels},
	}
	r.ctrs[spec.Id] = c
	r.publish("create", c)
	return nil
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, id string) error {
	if err := r.enter(ctx, "start", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err != nil || active(c.st.State) {
		return err
	}
	if strings.HasPrefix(c.spec.Args[0], "no-such") {
		return fmt.Errorf("start container %s: exec: %q: executable file not found in $PATH: %w", id, c.spec.Args[0], errdefs.ErrInvalidArgument)
	}
	if c.st.State == v1.ContainerState_CONTAINER_STATE_EXITED {
		c.ended = make(chan struct{})
	}
	r.pid++
	c.st.State, c.st.Pid, c.st.ExitCode, c.st.OomKilled = v1.ContainerState_CONTAINER_STATE_RUNNING, r.pid, 0, false
	c.st.StartedAt, c.st.FinishedAt = timestamppb.Now(), nil
	r.publish("start", c)
	r.program(c)
	return nil
}

// Stop implements runtime.Runtime: every program obeys at once.
func (r *Runtime) Stop(ctx context.Context, id, sig string, _ time.Duration) (*v1.RuntimeStatus, error) {
	if err := r.enter(ctx, "stop", id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.ctrs[id]
	if c == nil {
		return nil, nil
	}
	if sig == "" {
		sig = c.spec.StopSignal
	}
	if sig == "" {
		sig = "TERM"
	}
	n, err := parseSignal(sig)
	if err != nil {
		return nil, err
	}
	r.exit(c, 128+n, false)
	return proto.CloneOf(c.st), nil
}

// Kill implements runtime.Runtime.
func (r *Runtime) Kill(ctx context.Context, id, sig string, _ bool) error {
	if err := r.enter(ctx, "kill", id); err != nil {
		return err
	}
	if sig == "" {
		sig = "KILL"
	}
	n, err := parseSignal(sig)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err != nil {
		return err
	}
	if !active(c.st.State) {
		return notRunning(id)
	}
	switch n {
	case 9, 15, 2, 3, 6:
		r.exit(c, 128+n, false)
	}
	return nil
}

// Delete implements runtime.Runtime.
func (r *Runtime) Delete(ctx context.Context, id string, force bool) error {
	if err := r.enter(ctx, "delete", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.ctrs[id]
	if c == nil {
		return nil
	}
	if active(c.st.State) {
		if !force {
			return fmt.Errorf("container %s runs; stop it first: %w", id, errdefs.ErrFailedPrecondition)
		}
		r.exit(c, 137, false)
	}
	delete(r.ctrs, id)
	close(c.gone)
	r.publish("delete", c)
	return nil
}

// Pause implements runtime.Runtime.
func (r *Runtime) Pause(ctx context.Context, id string) error {
	return r.freeze(ctx, id, "pause", v1.ContainerState_CONTAINER_STATE_PAUSED)
}

// Resume implements runtime.Runtime.
func (r *Runtime) Resume(ctx context.Context, id string) error {
	return r.freeze(ctx, id, "resume", v1.ContainerState_CONTAINER_STATE_RUNNING)
}

func (r *Runtime) freeze(ctx context.Context, id, op string, to v1.ContainerState) error {
	if err := r.enter(ctx, op, id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err != nil {
		return err
	}
	if !active(c.st.State) {
		return notRunning(id)
	}
	if c.st.State != to {
		c.st.State = to
		r.publish(op, c)
	}
	return nil
}

// Update implements runtime.Runtime.
func (r *Runtime) Update(ctx context.Context, id string, q *v1.Resources) error {
	if err := r.enter(ctx, "update", id); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err == nil {
		c.spec.Resources = proto.CloneOf(q)
	}
	return err
}

// List implements runtime.Runtime.
func (r *Runtime) List(ctx context.Context) ([]*v1.RuntimeStatus, error) {
	if err := r.enter(ctx, "list", ""); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*v1.RuntimeStatus
	for _, c := range r.ctrs {
		out = append(out, proto.CloneOf(c.st))
	}
	return out, nil
}

// Stats implements runtime.Runtime.
func (r *Runtime) Stats(ctx context.Context, id string) (*v1.Usage, error) {
	if err := r.enter(ctx, "stats", id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err != nil {
		return nil, err
	}
	if c.usage != nil {
		return proto.CloneOf(c.usage), nil
	}
	u := &v1.Usage{At: timestamppb.Now()}
	if active(c.st.State) {
		u.Pids, u.MemoryBytes, u.CpuUsageNs = 1, 1<<20, uint64(time.Since(c.st.StartedAt.AsTime()))
	}
	return u, nil
}

// Top implements runtime.Runtime.
func (r *Runtime) Top(ctx context.Context, id string) ([]*v1.Process, error) {
	if err := r.enter(ctx, "top", id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	c, err := r.get(id)
	if err != nil {
		return nil, err
	}
	if !active(c.st.State) {
		return nil, notRunning(id)
	}
	return []*v1.Process{{Pid: c.st.Pid, Ppid: 1, User: "root", Command: strings.Join(c.spec.Args, " "), State: "S", StartedAt: c.st.StartedAt}}, nil
}

// Close implements runtime.Runtime: event streams end, containers stay.
func (r *Runtime) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropSubs()
	return nil
}
