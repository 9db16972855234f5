package control

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/store"
)

// Protocol is the version of what server and agent say to each other; one that
// differs by at most one is spoken to.
const ProtocolVersion = 1

// Hosts knows the agents that are connected and what they last said.
type Hosts struct {
	c        *Controller
	mu       sync.Mutex
	sessions map[string]*session // by host id
	progress map[string]*v1.Progress
	moved    chan struct{} // closed and renewed on progress
	joined   chan struct{} // closed and renewed when a host connects
	seq      uint64
	steps    []step
	since    time.Time
	// usage is what changes all the time: kept here, not in the store.
	machines map[string]*v1.MachineStatus
	volumes  map[string]*v1.VolumeStatus
	// addresses are what a host's containers have: host id -> container id -> its addresses.
	addresses map[string]map[string][]string
}

type step struct {
	host string
	p    *v1.Progress
}

func newHosts(c *Controller) *Hosts {
	return &Hosts{c: c, sessions: map[string]*session{}, progress: map[string]*v1.Progress{}, moved: make(chan struct{}), joined: make(chan struct{}), since: c.clock.Now(),
		machines: map[string]*v1.MachineStatus{}, volumes: map[string]*v1.VolumeStatus{}, addresses: map[string]map[string][]string{}}
}

// session is one agent's connection.
type session struct {
	h      *Hosts
	hostID string
	client tandemv1connect.AgentServiceClient
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	full    bool                           // the agent has told everything once
	seen    map[string]bool                // ids that the agent has
	applied uint64                         // revision of the intent that it took last
	removed map[string]bool                // volumes that it was told to remove, and has
	ever    map[string]bool                // ids that the agent has ever spoken of
	sent    map[string]time.Time           // ids it never spoke of, and since when they are not wanted
	ids     map[string]bool                // ids in that intent
	pending *v1.HostStatus                 // statuses to be written
	told    map[string]*v1.ContainerStatus // the latest of each container in them
	more    chan struct{}                  // closed and renewed when there are more
	wake    chan struct{}
	lastIn  time.Time

	// Of push alone: the intent that the agent has, and the delay after a refusal.
	last  *v1.HostSpec
	delay time.Duration
}

var hostNameBad = regexp.MustCompile(`[^a-zA-Z0-9_.-]+`)

// Serve works with one agent, once Run has begun, until its connection breaks or ctx ends. A second
// connection of the same host ends the first.
func (c *Controller) Serve(ctx context.Context, hostID string, client tandemv1connect.AgentServiceClient) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	select {
	case <-c.begun:
	case <-ctx.Done():
		return ctx.Err()
	}
	s, f, err := c.greet(ctx, cancel, hostID, client)
	if err != nil {
		return err
	}
	defer close(s.done)
	c.Hosts.enter(s)
	defer c.Hosts.leave(s)
	if err := c.saveFacts(ctx, f); err != nil {
		return err
	}
	c.log.Info("host connected", "host", f.GetHostname(), "id", hostID)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { s.push(ctx) })
	wg.Go(func() { s.write(ctx) })
	return s.watch(ctx)
}

// greet says hello to an agent and makes its session, which cancel ends.
func (c *Controller) greet(ctx context.Context, cancel context.CancelFunc, hostID string, client tandemv1connect.AgentServiceClient) (*session, *v1.HostFacts, error) {
	hctx, hcancel := context.WithTimeout(ctx, 30*time.Second)
	res, err := client.Hello(hctx, connect.NewRequest(&v1.AgentHelloRequest{Protocol: ProtocolVersion, ClusterId: c.store.ClusterID()}))
	hcancel()
	if err != nil {
		return nil, nil, fmt.Errorf("hello of host %s: %w", hostID, err)
	}
	f := res.Msg.GetFacts()
	if p := res.Msg.GetProtocol(); p+1 < ProtocolVersion || p > ProtocolVersion+1 {
		return nil, nil, fmt.Errorf("host %s speaks protocol %d, this server %d: update the older one: %w", hostID, p, ProtocolVersion, errdefs.ErrFailedPrecondition)
	}
	if f.GetHostId() != hostID || hostID == "" || len(hostID) > 64 {
		return nil, nil, fmt.Errorf("agent %q says that it is host %q: %w", hostID, f.GetHostId(), errdefs.ErrInvalidArgument)
	}
	s := &session{h: c.Hosts, hostID: hostID, client: client, cancel: cancel, done: make(chan struct{}), seen: map[string]bool{}, removed: map[string]bool{}, ever: map[string]bool{},
		sent: map[string]time.Time{}, ids: map[string]bool{}, wake: make(chan struct{}, 1), told: map[string]*v1.ContainerStatus{}, more: make(chan struct{}), lastIn: c.clock.Now()}
	return s, f, nil
}

func (h *Hosts) enter(s *session) {
	h.mu.Lock()
	old := h.sessions[s.hostID]
	h.sessions[s.hostID] = s
	close(h.joined)
	h.joined = make(chan struct{})
	h.mu.Unlock()
	if old != nil {
		old.cancel()
		<-old.done
	}
}

func (h *Hosts) leave(s *session) {
	h.mu.Lock()
	if h.sessions[s.hostID] == s {
		delete(h.sessions, s.hostID)
	}
	h.since = h.c.clock.Now()
	h.mu.Unlock()
	h.c.poke("lost")
}

// saveFacts makes or renews the host's record.
func (c *Controller) saveFacts(ctx context.Context, f *v1.HostFacts) error {
	return retry(ctx, func() error {
		now := stamp(c.clock.Now())
		if h, err := store.ByID[*v1.Host](c.store, store.Hosts, f.HostId); err == nil {
			_, err := store.Update(ctx, c.store, store.KeyOf(h), func(h *v1.Host) error {
				if !h.Connected || h.LastSeen == nil {
					h.LastSeen = now
				}
				h.Facts, h.Connected = f, true
				return nil
			})
			return err
		}
		name := strings.Trim(hostNameBad.ReplaceAllString(f.GetHostname(), "-"), "-_.")
		name = name[:min(len(name), 100)]
		if name == "" {
			name = "host"
		}
		if _, err := store.Get[*v1.Host](c.store, store.Key{Kind: store.Hosts, Name: name}); err == nil {
			name += "-" + f.HostId[:min(8, len(f.HostId))]
		}
		h := &v1.Host{Meta: &v1.Meta{Id: f.HostId, Name: name, CreatedAt: now, Generation: 1}, Facts: f, Connected: true, LastSeen: now}
		_, err := c.store.Create(ctx, h)
		if errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("%w: %w", err, errdefs.ErrConflict)
		}
		return err
	})
}

// Client reaches the agent of a host; Unavailable when it is not connected.
func (h *Hosts) Client(hostID string) (tandemv1connect.AgentServiceClient, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.sessions[hostID]; s != nil {
		return s.client, nil
	}
	name := hostID
	if r, err := store.ByID[*v1.Host](h.c.store, store.Hosts, hostID); err == nil {
		name = r.Meta.Name
	}
	return nil, fmt.Errorf("host %s is not connected: check that its agent runs: %w", name, errdefs.ErrUnavailable)
}

// Await is Client for a caller that can wait: an agent that is away (the server was
// just started, or the connection broke) is given d to connect.
func (h *Hosts) Await(ctx context.Context, hostID string, d time.Duration) (tandemv1connect.AgentServiceClient, error) {
	limit := h.c.clock.After(d)
	for {
		h.mu.Lock()
		joined := h.joined
		h.mu.Unlock()
		client, err := h.Client(hostID)
		if err == nil {
			return client, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-limit:
			return nil, err
		case <-joined:
		}
	}
}

// forgetConnections marks all hosts as not connected: whether they are is seen by
// this process, and it has seen nothing yet.
func (c *Controller) forgetConnections(ctx context.Context) error {
	for _, r := range store.List[*v1.Host](c.store, "") {
		err := retry(ctx, func() error {
			_, err := store.Update(ctx, c.store, store.KeyOf(r), func(r *v1.Host) error {
				r.Connected = false
				return nil
			})
			return err
		})
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("host %s: %w", r.Meta.Name, err)
		}
	}
	return nil
}

// Connected lists the ids of connected hosts, sorted.
func (h *Hosts) Connected() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.sessions))
}

// LastSeen is when a host last said something.
func (h *Hosts) LastSeen(hostID string) (time.Time, bool) {
	h.mu.Lock()
	s := h.sessions[hostID]
	h.mu.Unlock()
	if s == nil {
		return time.Time{}, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lastIn, true
}

// push hands the host its intent whenever that changes.
func (s *session) push(ctx context.Context) {
	c := s.h.c
	sub := c.store.Subscribe(false)
	defer sub.Close()
	for {
		sub.Take()
		round := c.begin()
		var timer <-chan time.Time
		wait := s.offer(ctx)
		round.end()
		if wait > 0 {
			timer = c.clock.After(wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-timer:
			continue
		case <-sub.Ready():
		}
		if !round.rest(ctx) {
			return
		}
	}
}

// offer gives the host its intent as it is now, if it does not have it yet, and
// says after how long to offer it again (0: when it changes).
func (s *session) offer(ctx context.Context) time.Duration {
	c := s.h.c
	snap := c.store.Snapshot()
	spec := hostSpec(snap, s.hostID, c.store.ClusterID())
	if s.last != nil && sameSpec(s.last, spec) {
		s.took(spec, snap.Revision) // nothing new for it: it is as good as applied
		return 0
	}
	actx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	_, err := s.client.Apply(actx, connect.NewRequest(&v1.ApplyHostRequest{Spec: spec}))
	switch {
	case ctx.Err() != nil:
		return 0
	case err == nil:
		if s.last == nil || s.delay > 0 {
			s.unblame(ctx)
		}
		s.last, s.delay = spec, 0
		s.took(spec, snap.Revision)
		return 0
	}
	s.delay = min(max(2*s.delay, 100*time.Millisecond), 10*time.Second)
	c.log.Warn("host did not take its intent", "host", s.hostID, "revision", spec.Revision, "err", err, "again in", s.delay)
	s.blame(ctx, s.last, spec, err)
	return s.delay
}

// took notes which intent the agent has.
func (s *session) took(spec *v1.HostSpec, rev uint64) {
	ids := make(map[string]bool, len(spec.Containers)+len(spec.Machines))
	for _, x := range spec.Containers {
		ids[x.Id] = true
	}
	for _, x := range spec.Machines {
		ids[x.Id] = true
	}
	s.mu.Lock()
	now := s.h.c.clock.Now()
	for id := range s.ids {
		if !ids[id] && !s.ever[id] {
			s.sent[id] = now
		}
	}
	for id := range ids {
		delete(s.sent, id)
	}
	grew := rev > s.applied
	s.applied, s.ids = rev, ids
	s.mu.Unlock()
	if grew {
		s.h.c.poke("collect")
	}
}

// forgetAfter is how long a thing that was in an agent's intent, and that the
// agent never spoke of, may still be going.
const forgetAfter = 10 * time.Second

// volumeGone says that a volume's data is gone: its agent said so itself.
func (h *Hosts) volumeGone(hostID, id string) bool {
	h.mu.Lock()
	s := h.sessions[hostID]
	h.mu.Unlock()
	if s == nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removed[id]
}

// gone says that nothing is left of a container or machine on a host:
// the agent has an intent without it and does not speak of it any more. When that
// is only a matter of time, it says when to ask again.
func (h *Hosts) gone(hostID, id string, changedAt, _ uint64) (bool, time.Duration) {
	h.mu.Lock()
	s := h.sessions[hostID]
	h.mu.Unlock()
	if s == nil {
		return false, 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.full || s.applied < changedAt || s.ids[id] || s.seen[id] {
		return false, 0
	}
	if since, ok := s.sent[id]; ok {
		if left := forgetAfter - h.c.clock.Now().Sub(since); left > 0 {
			return false, left
		}
	}
	return true, 0
}

// forget drops what is kept in memory of a thing that is gone.
func (h *Hosts) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.machines, id)
	delete(h.volumes, id)
	for _, s := range h.sessions {
		s.mu.Lock()
		delete(s.sent, id)
		delete(s.ever, id)
		delete(s.removed, id)
		s.mu.Unlock()
	}
}

// losses is what findLost remembers: hosts that are away, and since when, and
// those that were marked as lost for that.
type losses struct {
	since  map[string]time.Time
	marked map[string]bool
}

// findLost marks hosts as lost whose agent has been away for longer than the
// grace time.
func (c *Controller) findLost(ctx context.Context) (time.Duration, error) {
	if c.lost.since == nil {
		c.lost.since, c.lost.marked = map[string]time.Time{}, map[string]bool{}
	}
	now := c.clock.Now()
	next := time.Duration(0)
	var failed error
	for _, r := range store.List[*v1.Host](c.store, "") {
		id := r.Meta.Id
		c.Hosts.mu.Lock()
		here := c.Hosts.sessions[id] != nil
		c.Hosts.mu.Unlock()
		if here {
			delete(c.lost.since, id)
			delete(c.lost.marked, id)
		}
		if here || c.lost.marked[id] && !r.Connected {
			continue
		}
		if _, ok := c.lost.since[id]; !ok {
			c.lost.since[id] = now
		}
		if left := c.opts.HostGrace - now.Sub(c.lost.since[id]); left > 0 {
			if next == 0 || left < next {
				next = left
			}
			continue
		}
		err := c.markLost(ctx, r, c.lost.since[id])
		c.lost.marked[id] = err == nil
		if err != nil {
			failed = fmt.Errorf("host %s could not be marked as lost: %w", r.Meta.Name, err)
		}
	}
	return next, failed
}

// markLost writes that a host does not answer and that nobody knows how its
// containers and machines are.
func (c *Controller) markLost(ctx context.Context, h *v1.Host, since time.Time) error {
	snap := c.store.Snapshot()
	tx := c.store.Txn()
	if h.Connected {
		h = clone(h)
		h.Connected, h.LastSeen = false, stamp(since)
		tx.Update(h)
	}
	msg := "host " + h.Meta.Name + " does not answer"
	for _, x := range snap.Containers {
		if x.GetAssignment().GetHostId() == h.Meta.Id && x.GetStatus().GetState() != v1.ContainerState_CONTAINER_STATE_UNKNOWN {
			x = clone(x)
			x.Status.State, x.Status.Message = v1.ContainerState_CONTAINER_STATE_UNKNOWN, msg
			tx.Update(x)
		}
	}
	for _, m := range snap.Machines {
		if m.HostId == h.Meta.Id && m.GetStatus().GetState() != v1.MachineState_MACHINE_STATE_UNREACHABLE {
			m = clone(m)
			if m.Status == nil {
				m.Status = &v1.MachineStatus{}
			}
			m.Status.State, m.Status.Message = v1.MachineState_MACHINE_STATE_UNREACHABLE, msg
			tx.Update(m)
		}
	}
	_, err := tx.Commit(ctx)
	if err == nil {
		c.log.Warn("host lost", "host", h.Meta.Name)
	}
	return err
}
