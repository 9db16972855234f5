package oci

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/signal"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/jsonlog"
	"tandem/internal/runtime/monitor"
)

// Create implements runtime.Runtime: everything is made ready, nothing runs. A
// container exists from the moment its spec is on disk; before that the next New
// removes all of it.
func (r *Runtime) Create(ctx context.Context, spec *v1.RuntimeSpec) error {
	if err := r.check(spec); err != nil {
		return err
	}
	r.cg.Prepare() // it will start soon
	s := proto.CloneOf(spec)
	c := &container{id: s.Id, spec: s, stopped: make(chan struct{})}
	c.rec.CreatedAt = r.clock.Now()
	c.op.Lock()
	defer c.op.Unlock()
	r.mu.Lock()
	if r.ctrs[s.Id] != nil {
		r.mu.Unlock()
		return fmt.Errorf("container %s: %w", s.Id, errdefs.ErrAlreadyExists)
	}
	for _, l := range s.Layers {
		if r.disks[l] == nil {
			r.mu.Unlock()
			return fmt.Errorf("container %s: layer %s is not mounted: %w", s.Id, l, errdefs.ErrFailedPrecondition)
		}
	}
	r.ctrs[s.Id] = c // holds its disks from now on
	c.deleted = true // and nobody sees it yet
	r.mu.Unlock()

	err := r.create(ctx, c, s)
	r.mu.Lock()
	if err == nil {
		c.deleted = false
		r.publish("create", c)
		r.mu.Unlock()
		return nil
	}
	r.mu.Unlock()
	c.linked()
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if werr := r.wipe(wctx, s.Id); werr != nil {
		r.log.Error("remove what a failed create left", "container", s.Id, "error", werr)
	}
	r.mu.Lock()
	delete(r.ctrs, s.Id)
	r.mu.Unlock()
	return err
}

func (r *Runtime) create(ctx context.Context, c *container, s *v1.RuntimeSpec) error {
	if err := mkdirs(0o711, r.stateDir(s.Id), filepath.Join(r.stateDir(s.Id), "log")); err != nil {
		return fmt.Errorf("container %s: %w", s.Id, err)
	}
	r.prepareLink(ctx, c, s)
	if err := r.prepare(ctx, s, true); err != nil {
		return err
	}
	// Say now what is wrong with the spec, not at the start.
	sp, err := r.ociSpec(ctx, s, "")
	if err != nil {
		return err
	}
	for _, f := range s.Files {
		if f.Secret {
			f.Content = nil // never on disk
		}
	}
	r.mu.Lock()
	c.ready = sp
	r.mu.Unlock()
	return r.saveSpec(s)
}

func (r *Runtime) saveSpec(s *v1.RuntimeSpec) error {
	b, err := proto.Marshal(s)
	if err == nil {
		err = replaceFile(filepath.Join(r.stateDir(s.Id), fileSpec), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("spec of container %s: %w", s.Id, err)
	}
	return nil
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, id string) error {
	c, err := r.hold(id)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r.mu.Lock()
	if c.running() {
		r.mu.Unlock()
		return nil
	}
	r.cg.Prepare()
	s := c.spec
	// A start whose end nobody saw is asked for again under its own number: the
	// monitor answers with what became of it, and nothing runs twice.
	if !c.rec.Pending {
		c.rec.Run, c.rec.Pending = c.rec.Run+1, true
	}
	run := c.rec.Run // the monitor keeps it, and tells a later process
	r.mu.Unlock()
	if err := r.bundle(ctx, c, s); err != nil {
		return err
	}
	st, err := r.o.Monitor.Start(ctx, monitor.StartRequest{
		ID: id, Run: run, Runc: r.o.Runc, Root: r.runcRoot(), Bundle: r.runDir(id), Cgroup: r.cgroupPath(id),
		LogPath: r.logPath(id), LogMaxSize: s.GetLog().GetMaxSizeBytes(), LogMaxFiles: int(s.GetLog().GetMaxFiles()),
		TTY: s.Tty, Stdin: s.StdinOpen, StdinOnce: s.StdinOnce,
	})
	if err != nil {
		return err
	}
	r.apply(st)
	return nil
}

// bundle makes what runc reads, and all that this names. At the first start that
// is what Create has found already, if this process did it and nothing has changed
// since.
func (r *Runtime) bundle(ctx context.Context, c *container, s *v1.RuntimeSpec) error {
	r.mu.Lock()
	sp := c.ready
	c.ready = nil
	r.mu.Unlock()
	if sp == nil {
		if err := r.prepare(ctx, s, false); err != nil {
			return err
		}
	}
	netns, err := r.link(ctx, s)
	if err != nil {
		return err
	}
	if sp == nil {
		if sp, err = r.ociSpec(ctx, s, netns); err != nil {
			return err
		}
	}
	for i, n := range sp.Linux.Namespaces {
		if n.Type == specs.NetworkNamespace {
			sp.Linux.Namespaces[i].Path = netns
		}
	}
	return r.writeBundle(s.Id, sp)
}

// link gives the container its network and returns the namespace's path ("" lets
// runc make one, or there is none).
func (r *Runtime) link(ctx context.Context, s *v1.RuntimeSpec) (string, error) {
	switch s.GetNetwork().GetMode() {
	case "none", "host":
		return "", nil
	}
	p, err := r.o.Endpoint.Setup(ctx, s.Id, s.Network)
	if err != nil {
		return "", fmt.Errorf("network of container %s: %w", s.Id, err)
	}
	return p, nil
}

// prepareLink begins to make the container's network, beside what its creation does
// else. Who changes the container next waits for it (see lock); the start does what is
// missing then, and says what is wrong.
func (r *Runtime) prepareLink(ctx context.Context, c *container, s *v1.RuntimeSpec) {
	if m := s.GetNetwork().GetMode(); r.o.Endpoint == nil || m == "none" || m == "host" {
		return
	}
	done := make(chan struct{})
	c.linking = done
	ctx = context.WithoutCancel(ctx) // it is short, and goes on when Create is done
	go func() {
		defer close(done)
		if err := r.o.Endpoint.Prepare(ctx, s.Id, s.Network); err != nil {
			r.log.Debug("the network is left to the start", "container", s.Id, "error", err)
		}
	}()
}

func (r *Runtime) logPath(id string) string {
	return filepath.Join(r.stateDir(id), "log", "container.log")
}

// Kill implements runtime.Runtime.
func (r *Runtime) Kill(ctx context.Context, id, sig string, all bool) error {
	if sig == "" {
		sig = "KILL"
	}
	n, err := signal.ParseSignal(sig)
	if err != nil {
		return fmt.Errorf("signal %q: %w", sig, errdefs.ErrInvalidArgument)
	}
	r.mu.Lock()
	c, err := r.getLocked(id)
	if err != nil {
		r.mu.Unlock()
		return err
	}
	pid, running, paused := c.pid, c.running(), c.paused
	r.mu.Unlock()
	if !running {
		return fmt.Errorf("container %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	}
	g := r.cg.Group(r.cgroupPath(id))
	if all {
		err = g.Signal(n)
	} else {
		err = r.signal(id, pid, n)
	}
	if err == nil && paused && n == unix.SIGKILL {
		err = g.Freeze(ctx, false) // a frozen process does not die
	}
	return err
}

// signal hits the container's first process and never another that has got its number.
func (r *Runtime) signal(id string, pid int, sig unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH || err == unix.EINVAL {
		return nil // it is ending
	}
	if err != nil {
		return fmt.Errorf("signal container %s: %w", id, err)
	}
	defer unix.Close(fd)
	if !r.cg.Group(r.cgroupPath(id)).Has(pid) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("signal container %s: %w", id, err)
	}
	return nil
}

// killTimeout is how long a killed container may take to be gone.
const killTimeout = time.Minute

// Stop implements runtime.Runtime.
func (r *Runtime) Stop(ctx context.Context, id, sig string, grace time.Duration) (*v1.RuntimeStatus, error) {
	r.mu.Lock()
	c := r.ctrs[id]
	if c == nil || c.deleted {
		r.mu.Unlock()
		return nil, nil // gone is stopped
	}
	if !c.running() {
		defer r.mu.Unlock()
		return c.snapshot(), nil
	}
	stopped, paused := c.stopped, c.paused
	if sig == "" {
		sig = c.spec.StopSignal
	}
	r.mu.Unlock()
	if sig == "" {
		sig = "TERM"
	}
	if err := r.Kill(ctx, id, sig, false); err != nil && !errdefs.IsFailedPrecondition(err) {
		return nil, err
	}
	if paused {
		if err := r.Resume(ctx, id); err != nil && !errdefs.IsFailedPrecondition(err) {
			return nil, err
		}
	}
	if !wait(ctx, stopped, r.clock.After(max(grace, 0))) {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("stop container %s: %w", id, err)
		}
		if err := r.Kill(ctx, id, "KILL", false); err != nil && !errdefs.IsFailedPrecondition(err) {
			return nil, err
		}
		if !wait(ctx, stopped, time.After(killTimeout)) {
			return nil, fmt.Errorf("container %s does not end after SIGKILL: %w", id, errors.Join(ctx.Err(), errdefs.ErrUnavailable))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return c.snapshot(), nil
}

func wait(ctx context.Context, done <-chan struct{}, timeout <-chan time.Time) bool {
	select {
	case <-done:
		return true
	default:
	}
	select {
	case <-done:
		return true
	case <-ctx.Done():
	case <-timeout:
	}
	return false
}

// Delete implements runtime.Runtime.
func (r *Runtime) Delete(ctx context.Context, id string, force bool) error {
	c, err := r.hold(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r.mu.Lock()
	running, stopped := c.running(), c.stopped
	r.mu.Unlock()
	if running {
		if !force {
			return fmt.Errorf("container %s runs; stop it first: %w", id, errdefs.ErrFailedPrecondition)
		}
		if err := r.Kill(ctx, id, "KILL", false); err != nil && !errdefs.IsFailedPrecondition(err) {
			return err
		}
		if !wait(ctx, stopped, time.After(killTimeout)) {
			return fmt.Errorf("container %s does not end after SIGKILL: %w", id, errors.Join(ctx.Err(), errdefs.ErrUnavailable))
		}
	}
	// Once begun it is finished: half a container is of no use.
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	r.mu.Lock()
	c.wiping = true
	r.mu.Unlock()
	err = r.wipe(wctx, id)
	r.mu.Lock()
	defer r.mu.Unlock()
	c.wiping = false
	if err != nil {
		r.flush(c)
		return err
	}
	c.deleted = true
	delete(r.ctrs, id)
	if !isClosed(c.stopped) {
		close(c.stopped)
	}
	r.publish("delete", c)
	return nil
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// Pause implements runtime.Runtime.
func (r *Runtime) Pause(ctx context.Context, id string) error { return r.freeze(ctx, id, true) }

// Resume implements runtime.Runtime.
func (r *Runtime) Resume(ctx context.Context, id string) error { return r.freeze(ctx, id, false) }

func (r *Runtime) freeze(ctx context.Context, id string, frozen bool) error {
	c, err := r.hold(id)
	if err != nil {
		return err
	}
	defer c.op.Unlock()
	r.mu.Lock()
	running, is := c.running(), c.paused
	r.mu.Unlock()
	if !running {
		return fmt.Errorf("container %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	}
	if is == frozen {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := r.cg.Group(r.cgroupPath(id)).Freeze(ctx, frozen); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.running() {
		return nil
	}
	c.paused = frozen
	r.publish(map[bool]string{true: "pause", false: "resume"}[frozen], c)
	return nil
}

// Wait implements runtime.Runtime; NotFound if the container is deleted before
// it ever ran.
func (r *Runtime) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	r.mu.Lock()
	c, err := r.getLocked(id)
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	stopped := c.stopped
	r.mu.Unlock()
	select {
	case <-stopped:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for container %s: %w", id, ctx.Err())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !c.rec.Ended {
		if c.deleted {
			return nil, fmt.Errorf("container %s was deleted: %w", id, errdefs.ErrNotFound)
		}
	}
	return c.snapshot(), nil
}

// List implements runtime.Runtime.
func (r *Runtime) List(context.Context) ([]*v1.RuntimeStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*v1.RuntimeStatus
	for _, c := range r.ctrs {
		if !c.deleted {
			out = append(out, c.snapshot())
		}
	}
	return out, nil
}

// Logs implements runtime.Runtime.
func (r *Runtime) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	c, err := r.get(o.GetContainerId())
	if err != nil {
		return err
	}
	q := jsonlog.Options{Follow: o.Follow, Tail: o.Tail, Stdout: o.Stdout, Stderr: o.Stderr}
	if o.Since != nil {
		q.Since = o.Since.AsTime()
	}
	if o.Until != nil {
		q.Until = o.Until.AsTime()
	}
	r.mu.Lock()
	name := c.spec.GetName()
	r.mu.Unlock()
	return jsonlog.Read(ctx, r.logPath(c.id), q, func(e jsonlog.Entry) error {
		return fn(&v1.LogEntry{Time: stamp(e.Time), Stream: e.Stream, Line: e.Line, ContainerId: c.id, ContainerName: name})
	})
}
