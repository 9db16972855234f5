package control

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// Bounds of what an agent may make the server hold.
const (
	maxSteps   = 1000
	maxMessage = 4096
)

// watch takes in what the agent sees, until the stream ends.
func (s *session) watch(ctx context.Context) error {
	st, err := s.client.Watch(ctx, connect.NewRequest(&v1.WatchHostRequest{}))
	if err != nil {
		return err
	}
	defer st.Close()
	for st.Receive() {
		s.take(st.Msg())
	}
	if ctx.Err() != nil {
		return nil
	}
	return st.Err()
}

// take notes a status; write puts it into the store.
func (s *session) take(in *v1.HostStatus) {
	h := s.h
	c := h.c
	h.reported(s.hostID, in)
	s.mu.Lock()
	s.lastIn = c.clock.Now()
	if in.Full {
		s.seen, s.removed = map[string]bool{}, map[string]bool{}
	}
	for _, x := range in.Machines {
		s.seen[x.Id], s.ever[x.Id] = true, true
	}
	for _, x := range in.Containers {
		s.seen[x.Id], s.ever[x.Id] = true, true
		x.Message, x.HealthOutput = cut(x.Message), cut(x.HealthOutput)
	}
	for _, x := range in.Volumes {
		delete(s.removed, x.Id)
	}
	removed := len(in.RemovedVolumes)
	for _, id := range in.RemovedVolumes {
		s.removed[id] = true
	}
	for _, l := range [][]string{in.RemovedContainers, in.RemovedMachines} {
		for _, id := range l {
			delete(s.seen, id)
			delete(s.sent, id)
			removed++
		}
	}
	if s.pending == nil {
		s.pending = &v1.HostStatus{}
	}
	p := s.pending
	for _, x := range in.Containers {
		s.told[x.Id] = x
	}
	close(s.more)
	s.more = make(chan struct{})
	p.Machines = append(p.Machines, in.Machines...)
	p.Containers = append(p.Containers, in.Containers...)
	p.Volumes = append(p.Volumes, in.Volumes...)
	if in.Facts != nil && in.Facts.HostId == s.hostID {
		p.Facts = in.Facts
	}
	first := in.Full && !s.full
	s.full = s.full || in.Full
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
	if removed > 0 || first {
		c.poke("collect")
	}
	if first {
		c.poke("place") // what was not known may be now: see claims
	}
	if len(in.Events) > 0 {
		evs := make([]*v1.Event, 0, len(in.Events))
		for _, e := range in.Events {
			evs = append(evs, c.enrich(e, s.hostID))
		}
		c.Events.Add(evs...)
	}
	if len(in.Progress) > 0 {
		h.mu.Lock()
		for _, x := range in.Progress {
			x.Message = cut(x.Message)
			h.steps = append(h.steps, step{s.hostID, x})
		}
		h.seq += uint64(len(in.Progress))
		if over := len(h.steps) - maxSteps; over > 0 {
			h.steps = append([]step(nil), h.steps[over:]...)
		}
		close(h.moved)
		h.moved = make(chan struct{})
		h.mu.Unlock()
	}
}

func cut(s string) string { return s[:min(len(s), maxMessage)] }

// Progress returns the steps of agents' work after number n, the number to go on
// with, and a channel that is closed when there are more. Start with ProgressEnd.
func (h *Hosts) Progress(n uint64) ([]*v1.Progress, uint64, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	have := min(h.seq-min(n, h.seq), uint64(len(h.steps)))
	var out []*v1.Progress
	for _, s := range h.steps[uint64(len(h.steps))-have:] {
		out = append(out, s.p)
	}
	return out, h.seq, h.moved
}

// ProgressEnd is the number of the newest step.
func (h *Hosts) ProgressEnd() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seq
}

// write puts statuses into the store: many in one transaction, only what changed.
func (s *session) write(ctx context.Context) {
	c := s.h.c
	round := c.begin()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
		if !round.rest(ctx) {
			return
		}
		round = c.begin()
		p := s.news()
		if p == nil {
			continue
		}
		for backoff := 10 * time.Millisecond; ; backoff = min(2*backoff, 5*time.Second) {
			err := s.store(ctx, p)
			if err == nil || ctx.Err() != nil {
				s.written(p)
				break
			}
			if !errdefs.IsConflict(err) {
				c.log.Warn("statuses of a host could not be written", "host", s.hostID, "err", err)
			}
			if !c.sleep(ctx, backoff) {
				return
			}
		}
		round.end()
	}
}

// news takes what is to be written; nil: nothing.
func (s *session) news() *v1.HostStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pending
	s.pending = nil
	return p
}

// written forgets what the store has now.
func (s *session) written(p *v1.HostStatus) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range p.Containers {
		if s.told[x.Id] == x {
			delete(s.told, x.Id)
		}
	}
}

// Told is what a host's agent said of a container a moment ago and is not in the
// store yet, if anything, and a channel that is closed when the agent says more. It
// is a hint for those who wait: decide by the store.
func (h *Hosts) Told(hostID, id string) (*v1.ContainerStatus, <-chan struct{}) {
	h.mu.Lock()
	s := h.sessions[hostID]
	h.mu.Unlock()
	if s == nil {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.told[id], s.more
}

func (s *session) store(ctx context.Context, p *v1.HostStatus) error {
	c := s.h.c
	tx := c.store.Txn()
	containers := map[string]*v1.ContainerStatus{}
	for _, st := range p.Containers {
		containers[st.Id] = st // the last one counts
	}
	for id, st := range containers {
		x, err := store.ByID[*v1.Container](c.store, store.Containers, id)
		if err != nil || x.GetAssignment().GetHostId() != s.hostID {
			continue // not ours, or no longer here
		}
		st = clone(st)
		st.HostId, st.MachineId, st.Ip, st.Ips = s.hostID, x.Assignment.MachineId, x.Assignment.Ip, further(x)
		if st.CreatedAt == nil {
			st.CreatedAt = x.GetStatus().GetCreatedAt()
		}
		if !proto.Equal(x.Status, st) {
			x = clone(x)
			x.Status = st
			tx.Update(x)
		}
	}
	machines := map[string]*v1.MachineStatus{}
	for _, st := range p.Machines {
		machines[st.Id] = st
	}
	for id, st := range machines {
		m, err := store.ByID[*v1.Machine](c.store, store.Machines, id)
		if err != nil || m.HostId != s.hostID {
			continue
		}
		s.h.mu.Lock()
		s.h.machines[id] = st
		s.h.mu.Unlock()
		st = clone(st)
		// What is measured changes all the time: see MachineStatus.
		st.Usage, st.PssBytes, st.HostId = nil, 0, s.hostID
		if !proto.Equal(m.Status, st) {
			m = clone(m)
			m.Status = st
			tx.Update(m)
		}
	}
	volumes := map[string]*v1.VolumeStatus{}
	for _, st := range p.Volumes {
		volumes[st.Id] = st
	}
	for id, st := range volumes {
		v, err := store.ByID[*v1.Volume](c.store, store.Volumes, id)
		if err != nil || v.HostId != s.hostID {
			continue
		}
		s.h.mu.Lock()
		s.h.volumes[id] = st
		s.h.mu.Unlock()
		st = clone(st)
		st.UsedBytes = 0
		if !proto.Equal(v.Status, st) {
			v = clone(v)
			v.Status = st
			tx.Update(v)
		}
	}
	if p.Facts != nil {
		if r, err := store.ByID[*v1.Host](c.store, store.Hosts, s.hostID); err == nil && !proto.Equal(r.Facts, p.Facts) {
			r = clone(r)
			r.Facts = p.Facts
			tx.Update(r)
		}
	}
	_, err := tx.Commit(ctx)
	return err
}

// MachineStatus adds what is measured to a machine's record (a copy).
func (h *Hosts) MachineStatus(m *v1.Machine) *v1.Machine {
	h.mu.Lock()
	st := h.machines[m.Meta.Id]
	h.mu.Unlock()
	if st == nil {
		return m
	}
	m = clone(m)
	if m.Status == nil {
		m.Status = &v1.MachineStatus{}
	}
	m.Status.Usage, m.Status.PssBytes = st.Usage, st.PssBytes
	return m
}

// VolumeStatus adds what is measured to a volume's record (a copy).
func (h *Hosts) VolumeStatus(v *v1.Volume) *v1.Volume {
	h.mu.Lock()
	st := h.volumes[v.Meta.Id]
	h.mu.Unlock()
	if st == nil {
		return v
	}
	v = clone(v)
	if v.Status == nil {
		v.Status = &v1.VolumeStatus{}
	}
	v.Status.UsedBytes = st.UsedBytes
	return v
}
