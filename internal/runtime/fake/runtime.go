package fake

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
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

// Exec implements runtime.Runtime.
func (r *Runtime) Exec(ctx context.Context, e *v1.ExecSpec, s runtime.Streams) (int, error) {
	if err := r.enter(ctx, "exec", e.GetContainerId()); err != nil {
		return 0, err
	}
	r.mu.Lock()
	c, err := r.get(e.GetContainerId())
	if err != nil {
		r.mu.Unlock()
		return 0, err
	}
	run, fn, running := c.ended, r.execFn, c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING
	r.mu.Unlock()
	if !running {
		return 0, notRunning(e.ContainerId)
	}
	if len(e.Args) == 0 || strings.HasPrefix(e.Args[0], "no-such") {
		return 0, fmt.Errorf("exec in container %s: executable file not found: %w", e.ContainerId, errdefs.ErrInvalidArgument)
	}
	if s.Started != nil {
		s.Started()
	}
	if fn != nil {
		return fn(e, s)
	}
	var late <-chan time.Time
	if e.Timeout != nil {
		late = time.After(e.Timeout.AsDuration())
	}
	switch a := e.Args; a[0] {
	case "false":
		return 1, nil
	case "echo":
		if s.Stdout != nil {
			_, err = io.WriteString(s.Stdout, strings.Join(a[1:], " ")+"\n")
		}
		return 0, err
	case "cat":
		if e.Stdin && s.Stdin != nil && s.Stdout != nil {
			_, err = io.Copy(s.Stdout, s.Stdin)
		}
		return 0, err
	case "sleep":
		d, _ := time.ParseDuration(a[1] + "s")
		select {
		case <-time.After(d):
			return 0, nil
		case <-late:
			return 137, fmt.Errorf("exec took longer than %v: %w", e.Timeout.AsDuration(), context.DeadlineExceeded)
		case <-run:
			return 137, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	case "sh":
		var n int
		_, _ = fmt.Sscanf(a[len(a)-1], "exit %d", &n)
		return n, nil
	}
	return 0, nil
}

// Attach implements runtime.Runtime.
func (r *Runtime) Attach(ctx context.Context, a *v1.AttachSpec, s runtime.Streams) error {
	if err := r.enter(ctx, "attach", a.GetContainerId()); err != nil {
		return err
	}
	r.mu.Lock()
	c, err := r.get(a.GetContainerId())
	if err != nil {
		r.mu.Unlock()
		return err
	}
	ch := make(chan []byte, 1024)
	var replay [][]byte
	if a.Logs {
		for _, e := range c.log {
			replay = append(replay, e.Line)
		}
	}
	c.clients[ch] = true
	run := c.ended
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(c.clients, ch)
		r.mu.Unlock()
	}()
	if s.Started != nil {
		s.Started()
	}
	if a.Stdin && s.Stdin != nil {
		go r.feed(c, s.Stdin)
	}
	write := func(p []byte) error {
		if s.Stdout == nil {
			return nil
		}
		_, err := s.Stdout.Write(p)
		return err
	}
	for _, p := range replay {
		if err := write(p); err != nil {
			return err
		}
	}
	for {
		select {
		case p := <-ch:
			if err := write(p); err != nil {
				return err
			}
			continue
		case <-run:
		case <-c.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
		for { // what was printed before the end
			select {
			case p := <-ch:
				if err := write(p); err != nil {
					return err
				}
				continue
			default:
			}
			return nil
		}
	}
}

func (r *Runtime) feed(c *container, in io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		r.mu.Lock()
		if n > 0 && c.stdin != nil {
			c.stdin(buf[:n])
		}
		if err != nil {
			if c.eof != nil && c.spec.StdinOnce {
				c.eof()
			}
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
	}
}

// Logs implements runtime.Runtime.
func (r *Runtime) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	if err := r.enter(ctx, "logs", o.GetContainerId()); err != nil {
		return err
	}
	wants := func(e *v1.LogEntry) bool {
		return (o.Stdout == o.Stderr || (e.Stream == "stdout") == o.Stdout) &&
			(o.Since == nil || !e.Time.AsTime().Before(o.Since.AsTime())) && (o.Until == nil || !e.Time.AsTime().After(o.Until.AsTime()))
	}
	at := -1
	for {
		r.mu.Lock()
		c, err := r.get(o.ContainerId)
		if err != nil {
			r.mu.Unlock()
			if at >= 0 {
				return nil // deleted
			}
			return err
		}
		if at < 0 {
			at = 0
			for i, n := len(c.log), o.Tail; o.Tail >= 0; {
				if n == 0 || i == 0 {
					at = i
					break
				}
				if i--; wants(c.log[i]) {
					n--
				}
			}
		}
		list, more, gone := slices.Clone(c.log[at:]), c.logMore, c.gone
		at = len(c.log)
		r.mu.Unlock()
		for _, e := range list {
			if wants(e) {
				if err := fn(proto.CloneOf(e)); err != nil {
					return err
				}
			}
		}
		if !o.Follow {
			return nil
		}
		select {
		case <-more:
		case <-gone:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Wait implements runtime.Runtime.
func (r *Runtime) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	if err := r.enter(ctx, "wait", id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	c, err := r.get(id)
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	run := c.ended
	r.mu.Unlock()
	select {
	case <-run:
	case <-c.gone:
		select {
		case <-run: // it had ended when it was deleted
		default:
			return nil, fmt.Errorf("container %s was deleted: %w", id, errdefs.ErrNotFound)
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return proto.CloneOf(c.st), nil
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

// Events implements runtime.Runtime.
func (r *Runtime) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	if err := r.enter(ctx, "events", ""); err != nil {
		return nil, err
	}
	ch := make(chan *v1.RuntimeEvent, 1024)
	ch <- &v1.RuntimeEvent{Action: "ready", At: timestamppb.Now()}
	r.mu.Lock()
	r.subs[ch] = true
	r.mu.Unlock()
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.subs[ch] {
			delete(r.subs, ch)
			close(ch)
		}
	})
	return ch, nil
}

// Close implements runtime.Runtime: event streams end, containers stay.
func (r *Runtime) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropSubs()
	return nil
}

func (r *Runtime) dropSubs() {
	for ch := range r.subs {
		delete(r.subs, ch)
		close(ch)
	}
}
