package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

const (
	scaleEvery    = 15 * time.Second // between two measurements
	scaleWarmUp   = 30 * time.Second // of a container: what it uses to start does not count
	blockedRounds = 4                // so many rounds a target can't be judged before it is said
)

// scaler remembers what was measured and wanted lately. After a restart of the server
// it starts with what there is: nothing gets less for five minutes.
type scaler struct {
	mu       sync.Mutex
	next     time.Time
	services map[string]*scaled   // by service's id
	last     map[string]*v1.Usage // by container's id
}

type scaled struct {
	history []wantedAt // oldest first
	now     string     // what was measured last, in words
	blocked string     // a target that can't be judged
	rounds  int        // for so long
	told    string
}

type wantedAt struct {
	at       time.Time
	replicas int
}

// scales says whether a service has as many containers as its use asks for.
func scales(s *v1.Service) bool {
	return s.Scale != nil && !s.Meta.Deleting && !s.OneOff && !s.Stopped && s.Replicas > 0
}

// scaleServices measures what the services use that scale by themselves, and gives
// them as many replicas as decideScale says.
func (c *Controller) scaleServices(ctx context.Context) (time.Duration, error) {
	snap := c.store.Snapshot()
	list := slices.DeleteFunc(slices.Clone(snap.Services), func(s *v1.Service) bool { return !scales(s) })
	k := &c.scaler
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(list) == 0 {
		k.services, k.last = nil, nil
		return 0, nil
	}
	now := c.clock.Now()
	if left := k.next.Sub(now); left > 0 && left <= scaleEvery {
		return left, nil
	}
	k.next = now.Add(scaleEvery)
	of := map[svcKey][]*v1.Container{}
	var all []*v1.Container
	for _, s := range list {
		of[svcKey{s.Meta.Project, s.Meta.Name}] = nil
	}
	for _, x := range active(snap.Containers) { // of two that move, one counts
		key := svcKey{x.Meta.Project, x.Service}
		if _, ok := of[key]; ok && !x.OneOff && !x.Meta.Deleting {
			of[key] = append(of[key], x)
			all = append(all, x)
		}
	}
	k.mu.Unlock() // hosts may take long to answer
	use := c.measure(ctx, all)
	k.mu.Lock()
	services := map[string]*scaled{}
	var errs error
	for _, s := range list {
		h := k.services[s.Meta.Id]
		if h == nil {
			h = &scaled{history: []wantedAt{{now, int(s.Replicas)}}}
		}
		services[s.Meta.Id] = h
		samples := c.samples(s, of[svcKey{s.Meta.Project, s.Meta.Name}], use, now)
		errs = errors.Join(errs, c.scaleOne(ctx, s, h, samples, now))
	}
	k.services, k.last = services, use
	return scaleEvery, errs
}

// samples is what the containers of a service do, one for each that there shall be.
func (c *Controller) samples(s *v1.Service, list []*v1.Container, use map[string]*v1.Usage, now time.Time) []scaleSample {
	var out []scaleSample
	for _, x := range list {
		a := scaleSample{ready: Ready(x) && !x.Stopped && !x.Paused && now.Sub(x.Status.GetStartedAt().AsTime()) >= scaleWarmUp}
		want := Request(x.GetSpec().GetResources())
		u := use[x.Meta.Id]
		if milli, ok := rate(c.scaler.last[x.Meta.Id], u); ok && u.MemoryBytes >= 0 {
			a.known = true
			a.cpu, a.memory = milli/float64(max(want.CpuMilli, 1)), float64(u.MemoryBytes)/float64(max(want.MemoryBytes, 1))
			a.pressure, a.pressureKnown = max(u.CpuPressure, u.MemoryPressure, u.IoPressure), u.PressureKnown
		}
		out = append(out, a)
	}
	for len(out) < int(s.Replicas) {
		out = append(out, scaleSample{}) // is being made
	}
	return out
}

// scaleOne decides about one service and writes it down.
func (c *Controller) scaleOne(ctx context.Context, s *v1.Service, h *scaled, samples []scaleSample, now time.Time) error {
	h.history = slices.DeleteFunc(h.history, func(w wantedAt) bool { return now.Sub(w.at) >= scaleDownWindow })
	var past []wanted
	for _, w := range h.history {
		past = append(past, wanted{now.Sub(w.at), w.replicas})
	}
	a := decideScale(s.Scale, int(s.Replicas), samples, past)
	h.history = append(h.history, wantedAt{now, a.wanted})
	h.now = a.reason
	c.tellBlocked(s, h, a.blocked)
	if a.replicas == int(s.Replicas) {
		return nil
	}
	was := s.Replicas
	s = clone(s)
	s.Replicas = int32(a.replicas)
	s.Meta.Generation++
	s.ScaleStatus = &v1.ScaleStatus{From: was, To: s.Replicas, Reason: a.reason, At: stamp(now)}
	tx := c.store.Txn()
	tx.Update(s)
	if _, err := tx.Commit(ctx); err != nil {
		if errdefs.IsConflict(err) {
			return nil // somebody has just changed it: the next measurement is about what there is then
		}
		return fmt.Errorf("scaling service %s of %s to %d: %w", s.Meta.Name, s.Meta.Project, s.Replicas, err)
	}
	c.Events.Add(&v1.Event{At: stamp(now), Kind: "service", Action: "scale", Id: s.Meta.Id, Name: s.Meta.Name, Project: s.Meta.Project,
		Attributes: map[string]string{"from": strconv.Itoa(int(was)), "to": strconv.Itoa(a.replicas), "reason": a.reason}})
	c.tell("scale", []decision{{"service " + s.Meta.Name, fmt.Sprintf("goes from %d to %d", was, a.replicas), a.reason}})
	return nil
}

// tellBlocked makes an event of a target that could not be judged for a while, once.
func (c *Controller) tellBlocked(s *v1.Service, h *scaled, blocked string) {
	if blocked == "" || blocked != h.blocked {
		h.blocked, h.rounds = blocked, 0
	}
	if blocked == "" {
		h.told = ""
		return
	}
	if h.rounds++; h.rounds < blockedRounds || h.told == blocked {
		return
	}
	h.told = blocked
	c.Events.Add(&v1.Event{At: stamp(c.clock.Now()), Kind: "service", Action: "scale-blocked", Id: s.Meta.Id, Name: s.Meta.Name, Project: s.Meta.Project,
		Attributes: map[string]string{"reason": blocked}})
	c.tell("scale", []decision{{"service " + s.Meta.Name, "can't be judged", blocked}})
}

// Scale is why a service that scales by itself has as many containers as it has; nil
// for others.
func (c *Controller) Scale(s *v1.Service) *v1.ServiceScale {
	if s.GetScale() == nil {
		return nil
	}
	out := &v1.ServiceScale{Project: s.Meta.Project, Service: s.Meta.Name, Replicas: s.Replicas, Policy: s.Scale, Status: s.ScaleStatus}
	switch {
	case s.Replicas == 0:
		out.Now = "it is switched off: `tandem scale` or `tandem up` gives it containers"
	case s.Stopped:
		out.Now = "it is stopped"
	default:
		out.Now = "nothing was measured yet"
		c.scaler.mu.Lock()
		if h := c.scaler.services[s.Meta.Id]; h != nil && h.now != "" {
			out.Now = h.now
		}
		c.scaler.mu.Unlock()
	}
	return out
}

// ScaleOf is Scale of a container's service.
func (c *Controller) ScaleOf(x *v1.Container) *v1.ServiceScale {
	if x.Service == "" || x.OneOff {
		return nil
	}
	s, err := store.Get[*v1.Service](c.store, store.Key{Kind: store.Services, Project: x.Meta.Project, Name: x.Service})
	if err != nil {
		return nil
	}
	return c.Scale(s)
}

// ScaledReplicas is how many replicas a service has when its definition is applied,
// and why: one that scaled by itself and still does keeps what it has, within the
// bounds, unless it was switched off.
func ScaledReplicas(sp *v1.ServiceSpec, old *v1.Service) (int32, *v1.ScaleStatus) {
	if sp.Scale == nil || old.GetScale() == nil || old.Replicas == 0 {
		return sp.Replicas, nil
	}
	return min(max(old.Replicas, sp.Scale.Min), sp.Scale.Max), old.ScaleStatus
}
