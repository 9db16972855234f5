package control

import (
	"context"
	"sync"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// Events keeps what happened lately, bounded, and tells followers.
type Events struct {
	mu    sync.Mutex
	ring  []*v1.Event
	first uint64 // number of ring[0]
	max   int
	moved chan struct{}
}

func newEvents(max int) *Events { return &Events{max: max, moved: make(chan struct{})} }

// Add appends events. Their strings are cut at sane lengths.
func (e *Events) Add(evs ...*v1.Event) {
	if len(evs) == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ring = append(e.ring, evs...)
	if over := len(e.ring) - e.max; over > e.max/10 {
		e.ring = append([]*v1.Event(nil), e.ring[over:]...)
		e.first += uint64(over)
	}
	close(e.moved)
	e.moved = make(chan struct{})
}

// From returns the events from number n on (0: the oldest kept), the number to
// go on with, and a channel that is closed when there are more.
func (e *Events) From(n uint64) ([]*v1.Event, uint64, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	end := e.first + uint64(len(e.ring))
	n = min(max(n, e.first), end)
	return append([]*v1.Event(nil), e.ring[n-e.first:]...), end, e.moved
}

// End is the number that the next event will have.
func (e *Events) End() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.first + uint64(len(e.ring))
}

// followEvents makes events of records that come and go; what happens to a
// container or machine itself the agents tell.
func (c *Controller) followEvents(ctx context.Context) {
	sub := c.store.Subscribe(false, store.Projects, store.Containers, store.Volumes, store.Networks, store.Machines, store.Hosts)
	defer sub.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case <-sub.Ready():
		}
		for _, ch := range sub.Take() {
			if ch.Old == nil || ch.New == nil {
				action, r := "create", ch.New
				if ch.New == nil {
					action, r = "destroy", ch.Old
				}
				c.Events.Add(c.eventOf(ch.Key, r, action))
			} else if h, ok := ch.New.(*v1.Host); ok && h.Connected != ch.Old.(*v1.Host).Connected {
				action := "disconnect"
				if h.Connected {
					action = "connect"
				}
				c.Events.Add(c.eventOf(ch.Key, h, action))
			}
		}
	}
}

func (c *Controller) eventOf(k store.Key, r store.Record, action string) *v1.Event {
	e := &v1.Event{At: stamp(c.clock.Now()), Kind: string(k.Kind), Action: action, Id: r.GetMeta().GetId(), Name: k.Name, Project: k.Project}
	if k.Kind == store.Projects {
		e.Project = k.Name
	}
	if x, ok := r.(*v1.Container); ok {
		e.Attributes = map[string]string{"image": x.GetSpec().GetImage()}
		if x.Service != "" {
			e.Attributes["service"] = x.Service
		}
	}
	return e
}

// enrich adds to an agent's event what only the server knows.
func (c *Controller) enrich(e *v1.Event, hostID string) *v1.Event {
	e = clone(e)
	if e.Attributes == nil {
		e.Attributes = map[string]string{}
	}
	e.Attributes["host"] = hostID
	if e.At == nil {
		e.At = stamp(c.clock.Now())
	}
	switch e.Kind {
	case "container":
		if x, err := store.ByID[*v1.Container](c.store, store.Containers, e.Id); err == nil {
			e.Name, e.Project = x.Meta.Name, x.Meta.Project
			e.Attributes["image"] = x.GetSpec().GetImage()
			if x.Service != "" {
				e.Attributes["service"] = x.Service
			}
		}
	case "machine":
		if x, err := store.ByID[*v1.Machine](c.store, store.Machines, e.Id); err == nil {
			e.Name, e.Project = x.Meta.Name, x.Meta.Project
		}
	}
	return e
}

// tombs remembers removed containers for a while, so that who waits for one to
// exit still learns how.
type tombs struct {
	mu   sync.Mutex
	byID map[string]*v1.Container
	fifo []string
}

func (t *tombs) add(c *v1.Container) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID == nil {
		t.byID = map[string]*v1.Container{}
	}
	t.byID[c.Meta.Id] = c
	t.fifo = append(t.fifo, c.Meta.Id)
	if len(t.fifo) > 1000 {
		delete(t.byID, t.fifo[0])
		t.fifo = t.fifo[1:]
	}
}

// Removed returns the last that was known of a container that is gone.
func (c *Controller) Removed(id string) *v1.Container {
	c.tombs.mu.Lock()
	defer c.tombs.mu.Unlock()
	return c.tombs.byID[id]
}

// holds counts who still reads from a container that removes itself.
type holds struct {
	mu sync.Mutex
	n  map[string]int
}

// Hold delays auto_remove of a container until release is called (a client reads
// its last output), for a minute at most after its end.
func (c *Controller) Hold(id string) (release func()) {
	c.held.mu.Lock()
	if c.held.n == nil {
		c.held.n = map[string]int{}
	}
	c.held.n[id]++
	c.held.mu.Unlock()
	return sync.OnceFunc(func() {
		c.held.mu.Lock()
		if c.held.n[id]--; c.held.n[id] <= 0 {
			delete(c.held.n, id)
		}
		c.held.mu.Unlock()
		c.poke("deploy")
	})
}

func (c *Controller) isHeld(x *v1.Container) bool {
	c.held.mu.Lock()
	defer c.held.mu.Unlock()
	if c.held.n[x.Meta.Id] == 0 {
		return false
	}
	end := x.GetStatus().GetFinishedAt()
	return end == nil || c.clock.Now().Sub(end.AsTime()) < time.Minute
}
