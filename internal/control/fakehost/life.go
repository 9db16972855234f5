package fakehost

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
)

// reconcile takes over a new intent. The lock is held.
func (h *Host) reconcile() {
	machines := map[string]*v1.MachineAssignment{}
	for _, a := range h.spec.Machines {
		machines[a.Id] = a
		m := h.machines[a.Id]
		if m == nil {
			m = &machine{at: h.opts.Clock.Now().Add(h.opts.Boot), st: &v1.MachineStatus{Id: a.Id, State: v1.MachineState_MACHINE_STATE_STARTING}}
			h.machines[a.Id] = m
			delete(h.removed, a.Id)
		}
		m.a = a
		st := proto.Clone(m.st).(*v1.MachineStatus)
		st.Size, st.ObservedGeneration = a.Size, a.Generation
		if a.Stopped {
			m.up = false
			st.State = v1.MachineState_MACHINE_STATE_STOPPED
		} else if st.State == v1.MachineState_MACHINE_STATE_STOPPED {
			m.at = h.opts.Clock.Now().Add(h.opts.Boot)
			st.State = v1.MachineState_MACHINE_STATE_STARTING
		}
		if !proto.Equal(st, m.st) {
			m.st = st
			h.touch(a.Id)
		}
	}
	for _, v := range h.spec.Volumes {
		if h.volumes[v.Id] == nil {
			h.volumes[v.Id] = &v1.VolumeStatus{Id: v.Id, Ready: true, SizeBytes: v.SizeBytes}
			h.touch(v.Id)
		}
	}
	for _, id := range h.spec.DeletedVolumes {
		if _, told := h.removed[id]; h.volumes[id] != nil || !told {
			delete(h.volumes, id)
			h.remove("volume", id)
		}
	}
	wanted := map[string]bool{}
	for _, a := range h.spec.Containers {
		wanted[a.Id] = true
		c := h.containers[a.Id]
		if c == nil {
			c = &container{st: &v1.ContainerStatus{Id: a.Id, State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: h.now()}}
			h.containers[a.Id] = c
			delete(h.removed, a.Id)
			h.touch(a.Id)
		}
		c.a = a
	}
	for id, c := range h.containers {
		c.gone = !wanted[id] && (c.gone || !h.spec.Incomplete)
		if !c.gone {
			c.grace = 10 * time.Second
			if d := c.a.StopTimeout; d != nil {
				c.grace = d.AsDuration()
			}
		}
	}
	for _, l := range h.spec.Leaving {
		if c := h.containers[l.Id]; c != nil && c.gone {
			c.grace = l.StopTimeout.AsDuration()
		}
	}
	h.tick()
	for id := range h.machines {
		if machines[id] == nil && !h.inUse(id) && !h.spec.Incomplete {
			delete(h.machines, id)
			h.remove("machine", id)
		}
	}
	h.version++
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *Host) inUse(machine string) bool {
	for _, c := range h.containers {
		if c.a.MachineId == machine {
			return true
		}
	}
	return false
}

func (h *Host) remove(kind, id string) {
	delete(h.touched, id)
	h.version++
	h.removed[id] = gone{kind, h.version}
	close(h.changed)
	h.changed = make(chan struct{})
}

// tickUntil lets time pass: whatever is due happens.
func (h *Host) tickUntil(ctx context.Context) {
	for {
		h.mu.Lock()
		next := h.tick()
		changed := h.changed
		h.mu.Unlock()
		var timer <-chan time.Time
		if next > 0 {
			timer = h.opts.Clock.After(next)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-timer:
		}
	}
}

// tick does what is due and says when it wants to be called again (0: when
// something changes). The lock is held.
func (h *Host) tick() time.Duration {
	next := time.Duration(0)
	now := h.opts.Clock.Now()
	for again := true; again; {
		again, next = false, 0
		later := func(at time.Time) bool {
			d := at.Sub(now)
			if d <= 0 {
				return false
			}
			if next == 0 || d < next {
				next = d
			}
			return true
		}
		for _, id := range slices.Sorted(maps.Keys(h.machines)) {
			m := h.machines[id]
			if m.up || m.a.Stopped || later(m.at) {
				continue
			}
			m.up, again = true, true
			m.st = proto.Clone(m.st).(*v1.MachineStatus)
			m.st.State, m.st.StartedAt = v1.MachineState_MACHINE_STATE_RUNNING, timestamppb.New(now)
			m.st.StartMethod, m.st.StartDuration = "clone", ms(h.opts.Boot)
			h.tell("machine", "start", id)
			h.touch(id)
		}
		for _, id := range slices.Sorted(maps.Keys(h.containers)) {
			before := proto.Clone(h.containers[id].st)
			h.step(id, now, later)
			if c := h.containers[id]; c == nil || !proto.Equal(before, c.st) {
				again = true
				if c != nil {
					h.touch(id)
				}
			}
		}
	}
	return next
}

// step takes one container one step further.
func (h *Host) step(id string, now time.Time, later func(time.Time) bool) {
	c := h.containers[id]
	s := h.scripts[c.a.GetSpec().GetImage()]
	st := c.st
	st.ObservedGeneration = c.a.Generation
	running := st.State == v1.ContainerState_CONTAINER_STATE_RUNNING || st.State == v1.ContainerState_CONTAINER_STATE_PAUSED
	restart := c.a.RestartGeneration > st.ObservedRestartGeneration
	if running && (c.gone || c.a.Stopped || restart) {
		if c.stop.IsZero() {
			c.stop = now
		}
		at, code := c.stop.Add(s.StopsAfter), int32(143)
		if c.grace < s.StopsAfter {
			at, code = c.stop.Add(c.grace), 137
		}
		if !later(at) {
			c.stopped = true
			h.exit(c, code)
		}
		return
	}
	if c.gone {
		delete(h.containers, id)
		h.tell("container", "destroy", id)
		h.remove("container", id)
		if m := c.a.MachineId; m != "" && h.machines[m] != nil && !h.wants(m) && !h.inUse(m) {
			delete(h.machines, m)
			h.remove("machine", m)
		}
		return
	}
	if m := h.machines[c.a.MachineId]; c.a.MachineId != "" && (m == nil || !m.up) {
		return
	}
	switch st.State {
	case v1.ContainerState_CONTAINER_STATE_PENDING:
		st.State, c.ready = v1.ContainerState_CONTAINER_STATE_CREATING, now.Add(h.opts.Prepare)
	case v1.ContainerState_CONTAINER_STATE_CREATING:
		if later(c.ready) {
			return
		}
		if s.Fail != "" {
			st.State, st.Message = v1.ContainerState_CONTAINER_STATE_FAILED, s.Fail
			st.ObservedRestartGeneration = c.a.RestartGeneration
			return
		}
		st.State, st.ImageId = v1.ContainerState_CONTAINER_STATE_CREATED, "sha256:fake-"+c.a.Spec.Image
		h.tell("container", "create", id)
	case v1.ContainerState_CONTAINER_STATE_CREATED:
		if !c.a.Stopped && (!c.a.Hold || st.StartedAt != nil) {
			h.start(c, now)
		}
	case v1.ContainerState_CONTAINER_STATE_FAILED, v1.ContainerState_CONTAINER_STATE_EXITED:
		if !c.a.Stopped && (restart || c.stopped) {
			h.start(c, now)
		}
	case v1.ContainerState_CONTAINER_STATE_RESTARTING:
		if !later(c.again) {
			st.RestartCount++
			h.start(c, now)
		}
	case v1.ContainerState_CONTAINER_STATE_RUNNING, v1.ContainerState_CONTAINER_STATE_PAUSED:
		st.State = v1.ContainerState_CONTAINER_STATE_RUNNING
		if c.a.Paused {
			st.State = v1.ContainerState_CONTAINER_STATE_PAUSED
		}
		if !c.end.IsZero() && !later(c.end) {
			h.exit(c, s.ExitCode)
			return
		}
		if !c.healthy.IsZero() && !later(c.healthy) {
			c.healthy = time.Time{}
			st.Health = v1.Health_HEALTH_HEALTHY
			if s.Unhealthy {
				st.Health, st.HealthOutput = v1.Health_HEALTH_UNHEALTHY, "check failed"
			}
		}
	}
}

func (h *Host) wants(machine string) bool {
	for _, m := range h.spec.Machines {
		if m.Id == machine {
			return true
		}
	}
	return false
}

func (h *Host) start(c *container, now time.Time) {
	s := h.scripts[c.a.Spec.Image]
	st := c.st
	st.State, st.StartedAt, st.Message, st.ExitCode = v1.ContainerState_CONTAINER_STATE_RUNNING, timestamppb.New(now), "", 0
	if c.a.RestartGeneration > st.ObservedRestartGeneration || c.stopped { // a user starts it anew
		st.RestartCount, c.delay = 0, 0
	}
	st.ObservedRestartGeneration = c.a.RestartGeneration
	st.Health = v1.Health_HEALTH_UNSPECIFIED
	c.stopped, c.stop, c.end, c.healthy = false, time.Time{}, time.Time{}, time.Time{}
	if s.Exits {
		c.end = now.Add(s.RunFor)
	}
	if t := c.a.Spec.GetHealthcheck().GetTest(); len(t) > 0 && t[0] != "NONE" {
		st.Health, c.healthy = v1.Health_HEALTH_STARTING, now.Add(s.HealthyAfter)
	}
	for _, l := range s.Output {
		c.log = append(c.log, &v1.LogEntry{Time: timestamppb.New(now), Stream: "stdout", Line: []byte(l + "\n")})
	}
	h.tell("container", "start", c.a.Id)
}

// exit ends a container's process; its restart policy decides what follows.
func (h *Host) exit(c *container, code int32) {
	st := c.st
	st.ExitCode, st.FinishedAt = code, h.now()
	st.State = v1.ContainerState_CONTAINER_STATE_EXITED
	p := c.a.GetSpec().GetRestart()
	again := p.GetName() == "always" || p.GetName() == "unless-stopped" ||
		p.GetName() == "on-failure" && code != 0 && (p.MaxRetries == 0 || st.RestartCount < p.MaxRetries)
	if again && !c.stopped {
		// As an agent does: 100 ms, doubled each time up to a minute, forgotten after 10 s.
		now := h.opts.Clock.Now()
		if now.Sub(st.StartedAt.AsTime()) >= 10*time.Second {
			c.delay = 0
		}
		c.delay = min(max(2*c.delay, 100*time.Millisecond), time.Minute)
		st.State, c.again = v1.ContainerState_CONTAINER_STATE_RESTARTING, now.Add(c.delay)
	}
	h.tell("container", "die", c.a.Id)
	h.touch(c.a.Id)
}

// pipe is a listener in memory.
type pipe struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func newPipe() *pipe { return &pipe{ch: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipe) dial(ctx context.Context) (net.Conn, error) {
	a, b := net.Pipe()
	select {
	case p.ch <- b:
		return a, nil
	case <-p.done:
		return nil, errors.New("the host is gone")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (p *pipe) Accept() (net.Conn, error) {
	select {
	case c := <-p.ch:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (p *pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

// Addr implements net.Listener.
func (p *pipe) Addr() net.Addr { return &net.UnixAddr{Name: "fake", Net: "unix"} }
