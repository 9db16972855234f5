package agent

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// fakeRuntime runs programs by name: "sleep" for ever, "run DURATION CODE",
// "stubborn" until it is killed.
type fakeRuntime struct {
	w       *world
	mu      sync.Mutex
	cs      map[string]*fakeContainer
	mounts  map[string]bool
	subs    map[chan *v1.RuntimeEvent]bool
	probe   func() int // exit code of exec
	dead    bool
	creates int
	grace   time.Duration // of the last Stop
	// What the calls of clients do; nil: nothing.
	attach func(context.Context, *v1.AttachSpec, runtime.Streams) error
	wait   func(context.Context, string) (*v1.RuntimeStatus, error)
	stats  func(id string) (*v1.Usage, error)
	top    func(id string) ([]*v1.Process, error)
	// onStart, if there, happens within each Start; its error is Start's, whatever
	// has begun.
	onStart func(ctx context.Context, id string) error
}

type fakeContainer struct {
	spec  *v1.RuntimeSpec
	st    *v1.RuntimeStatus
	timer *time.Timer
	ended chan struct{}
	run   int
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{cs: map[string]*fakeContainer{}, mounts: map[string]bool{}, subs: map[chan *v1.RuntimeEvent]bool{}, probe: func() int { return 0 }}
}

func (r *fakeRuntime) emit(action string, c *fakeContainer) {
	e := &v1.RuntimeEvent{Id: c.st.Id, Action: action, Status: proto.Clone(c.st).(*v1.RuntimeStatus), At: timestamppb.Now()}
	for s := range r.subs {
		s <- e
	}
}

func (r *fakeRuntime) lock() (func(), error) {
	r.mu.Lock()
	if r.dead {
		r.mu.Unlock()
		return nil, fmt.Errorf("kernel is dead: %w", errdefs.ErrUnavailable)
	}
	return r.mu.Unlock, nil
}

func (r *fakeRuntime) Mount(ctx context.Context, m *v1.MountDiskRequest) (string, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return "", gerr
	}
	un, err := r.lock()
	if err != nil {
		return "", err
	}
	defer un()
	r.mounts[m.Id] = true
	return "/mnt/" + m.Id, nil
}

func (r *fakeRuntime) Unmount(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	for _, c := range r.cs {
		for _, l := range c.spec.Layers {
			if l == id {
				return fmt.Errorf("disk in use: %w", errdefs.ErrFailedPrecondition)
			}
		}
		for _, m := range c.spec.Mounts {
			if m.Source == id {
				return fmt.Errorf("disk in use: %w", errdefs.ErrFailedPrecondition)
			}
		}
	}
	delete(r.mounts, id)
	return nil
}

func (r *fakeRuntime) Create(ctx context.Context, s *v1.RuntimeSpec) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	if r.cs[s.Id] != nil {
		return errdefs.ErrAlreadyExists
	}
	for _, l := range s.Layers {
		if !r.mounts[l] {
			return fmt.Errorf("layer %s is not mounted: %w", l, errdefs.ErrFailedPrecondition)
		}
	}
	r.creates++
	c := &fakeContainer{spec: s, st: &v1.RuntimeStatus{Id: s.Id, State: v1.ContainerState_CONTAINER_STATE_CREATED}, ended: make(chan struct{})}
	r.cs[s.Id] = c
	r.emit("create", c)
	return nil
}

func (r *fakeRuntime) Start(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	r.mu.Lock()
	onStart := r.onStart
	r.mu.Unlock()
	if onStart != nil {
		if err := onStart(ctx, id); err != nil {
			return err
		}
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	if c == nil {
		return errdefs.ErrNotFound
	}
	if c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
		return nil
	}
	if c.spec.Args[0] == "missing" {
		return fmt.Errorf("exec missing: no such file: %w", errdefs.ErrNotFound)
	}
	c.run++
	run := c.run
	c.ended = make(chan struct{})
	c.st = &v1.RuntimeStatus{Id: id, State: v1.ContainerState_CONTAINER_STATE_RUNNING, Pid: 10, StartedAt: timestamppb.Now()}
	r.emit("start", c)
	if c.spec.Args[0] == "run" {
		d, _ := time.ParseDuration(c.spec.Args[1])
		code, _ := strconv.Atoi(c.spec.Args[2])
		c.timer = time.AfterFunc(d, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			if c.run == run {
				r.end(c, int32(code))
			}
		})
	}
	return nil
}

func (r *fakeRuntime) end(c *fakeContainer, code int32) {
	if r.dead || c.st.State != v1.ContainerState_CONTAINER_STATE_RUNNING && c.st.State != v1.ContainerState_CONTAINER_STATE_PAUSED {
		return
	}
	c.st = &v1.RuntimeStatus{Id: c.st.Id, State: v1.ContainerState_CONTAINER_STATE_EXITED, ExitCode: code, StartedAt: c.st.StartedAt, FinishedAt: timestamppb.Now()}
	close(c.ended)
	r.emit("exit", c)
}

func (r *fakeRuntime) Stop(ctx context.Context, id, sig string, grace time.Duration) (*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer func() { un() }()
	c := r.cs[id]
	if c == nil {
		return nil, errdefs.ErrNotFound
	}
	r.grace = grace
	if c.spec.Args[0] != "stubborn" || c.st.State != v1.ContainerState_CONTAINER_STATE_RUNNING {
		r.end(c, 143)
		return proto.Clone(c.st).(*v1.RuntimeStatus), nil
	}
	ended := c.ended
	un()
	un = func() {}
	select {
	case <-ended:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(grace):
	}
	if un, err = r.lock(); err != nil {
		un = func() {}
		return nil, err
	}
	r.end(c, 137)
	return proto.Clone(c.st).(*v1.RuntimeStatus), nil
}

func (r *fakeRuntime) Kill(ctx context.Context, id, signal string, all bool) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	if c := r.cs[id]; c != nil {
		r.end(c, 137)
		return nil
	}
	return errdefs.ErrNotFound
}

func (r *fakeRuntime) Delete(ctx context.Context, id string, force bool) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	if c == nil {
		return nil
	}
	if !force && c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
		return errdefs.ErrFailedPrecondition
	}
	delete(r.cs, id)
	r.emit("delete", c)
	return nil
}

func (r *fakeRuntime) setState(id string, st v1.ContainerState) error {
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	c.st = proto.Clone(c.st).(*v1.RuntimeStatus)
	c.st.State = st
	r.emit("pause", c)
	return nil
}

func (r *fakeRuntime) Pause(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return r.setState(id, v1.ContainerState_CONTAINER_STATE_PAUSED)
}

func (r *fakeRuntime) Resume(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return r.setState(id, v1.ContainerState_CONTAINER_STATE_RUNNING)
}

func (r *fakeRuntime) Update(ctx context.Context, id string, res *v1.Resources) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	r.cs[id].spec.Resources = res
	return nil
}

func (r *fakeRuntime) Exec(ctx context.Context, s *v1.ExecSpec, io runtime.Streams) (int, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return 0, gerr
	}
	un, err := r.lock()
	if err != nil {
		return 0, err
	}
	defer un()
	fmt.Fprint(io.Stdout, "probed")
	return r.probe(), nil
}

func (r *fakeRuntime) Attach(ctx context.Context, s *v1.AttachSpec, io runtime.Streams) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	if r.attach != nil {
		return r.attach(ctx, s, io)
	}
	return nil
}

func (r *fakeRuntime) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return fn(&v1.LogEntry{Line: []byte("hello\n")})
}

func (r *fakeRuntime) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if r.wait != nil {
		return r.wait(ctx, id)
	}
	return nil, errdefs.ErrNotImplemented
}

func (r *fakeRuntime) List(ctx context.Context) ([]*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer un()
	var out []*v1.RuntimeStatus
	for _, c := range r.cs {
		out = append(out, proto.Clone(c.st).(*v1.RuntimeStatus))
	}
	return out, nil
}

func (r *fakeRuntime) Stats(ctx context.Context, id string) (*v1.Usage, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if r.stats != nil {
		return r.stats(id)
	}
	return &v1.Usage{Pids: 1}, nil
}

func (r *fakeRuntime) Top(ctx context.Context, id string) ([]*v1.Process, error) {
	if r.top != nil {
		return r.top(id)
	}
	return nil, nil
}

func (r *fakeRuntime) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer un()
	in, out := make(chan *v1.RuntimeEvent, 1000), make(chan *v1.RuntimeEvent)
	r.subs[in] = true
	in <- &v1.RuntimeEvent{Action: "ready"}
	go func() {
		defer close(out)
		defer func() { r.mu.Lock(); delete(r.subs, in); r.mu.Unlock() }()
		for {
			select {
			case e, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

func (r *fakeRuntime) Close() error { return nil }

// kill ends the kernel: what ran is dead. Writable layers stay on the scratch disk.
func (r *fakeRuntime) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dead = true
}

// reboot gives the kernel that boots with the same scratch disk.
func (r *fakeRuntime) reboot(keep bool) *fakeRuntime {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := newFakeRuntime()
	n.w = r.w
	n.probe = r.probe
	if !keep {
		return n
	}
	for id, c := range r.cs {
		st := proto.Clone(c.st).(*v1.RuntimeStatus)
		if st.State == v1.ContainerState_CONTAINER_STATE_RUNNING || st.State == v1.ContainerState_CONTAINER_STATE_PAUSED {
			st.State, st.ExitCode, st.FinishedAt = v1.ContainerState_CONTAINER_STATE_EXITED, 255, timestamppb.Now()
		}
		n.cs[id] = &fakeContainer{spec: c.spec, st: st, ended: make(chan struct{})}
	}
	return n
}
