package control

import (
	"context"
	"fmt"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// trimmer remembers since when machines are empty or too large. A restart starts
// the clocks anew: machines live a little longer then.
type trimmer struct {
	empty map[string]time.Time
	large map[string]time.Time
	pulse map[string]*pulse
}

// pulse is how a machine's size goes up and down. One that grows again soon after it
// was shrunk waits four times as long before it is shrunk the next time, up to
// calmFactor times ShrinkDelay; it is forgiven when what it holds has kept still for
// twice that long.
type pulse struct {
	size, need    *v1.Size
	shrunk, still time.Time
	delay         time.Duration
}

const calmFactor = 100

// feel looks at a machine's size, and at what it holds.
func (t *trimmer) feel(m *v1.Machine, need *v1.Size, now time.Time, delay time.Duration) {
	p := t.pulse[m.Meta.Id]
	if p == nil {
		p = &pulse{size: m.Size, need: need, still: now, delay: delay}
		t.pulse[m.Meta.Id] = p
	}
	most := calmFactor * delay
	if grew := m.Size.GetMemoryBytes() > p.size.GetMemoryBytes() || m.Size.GetCpuMilli() > p.size.GetCpuMilli(); grew && now.Sub(p.shrunk) < 2*most {
		p.delay = min(4*p.delay, most)
	}
	if need.CpuMilli != p.need.CpuMilli || need.MemoryBytes != p.need.MemoryBytes {
		p.still = now
	} else if now.Sub(p.still) >= 2*most {
		p.delay = delay
	}
	p.size, p.need = m.Size, need
}

// crowdedIdleStop is how long a machine stays empty while a container has no place.
const crowdedIdleStop = time.Second

// trimMachines stops machines that have been empty for a while, shrinks those
// that have long been larger than what they hold, and grows those whose containers
// reserve more now.
func (c *Controller) trimMachines(ctx context.Context) (time.Duration, error) {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	snap := c.store.Snapshot()
	if snap.Unreadable(store.Containers, store.Machines) {
		return 0, nil // what a machine holds is not known: it stays as it is
	}
	c.plan.sync()
	if c.trim.empty == nil {
		c.trim = trimmer{map[string]time.Time{}, map[string]time.Time{}, map[string]*pulse{}}
	}
	now := c.clock.Now()
	holds, needs := map[string]int{}, map[string]*v1.Size{}
	for _, x := range snap.Containers {
		id, r := x.GetAssignment().GetMachineId(), Request(x.GetSpec().GetResources())
		holds[id]++
		if needs[id] != nil {
			r.CpuMilli += needs[id].CpuMilli
			r.MemoryBytes += needs[id].MemoryBytes
		}
		needs[id] = r
	}
	machines := map[string]*v1.Machine{}
	var idle []string
	next := time.Duration(0)
	later := func(d time.Duration) {
		if next == 0 || d < next {
			next = max(d, time.Millisecond)
		}
	}
	idleStop := c.opts.IdleStop
	if len(c.plan.unplaced) > 0 {
		// Somebody waits for room: what is empty and of no use to it gives way.
		idleStop = min(idleStop, crowdedIdleStop)
	}
	empty := map[string]time.Time{}
	for _, m := range snap.Machines {
		if m.Meta.Deleting {
			continue
		}
		machines[m.Meta.Id] = m
		need := needs[m.Meta.Id]
		if need == nil {
			need = &v1.Size{}
		}
		c.trim.feel(m, need, now, c.opts.ShrinkDelay)
		if holds[m.Meta.Id] > 0 || m.ByUser {
			continue
		}
		since, ok := c.trim.empty[m.Meta.Id]
		if !ok {
			since = now
		}
		empty[m.Meta.Id] = since
		if left := idleStop - now.Sub(since); left > 0 {
			later(left)
		} else {
			idle = append(idle, m.Meta.Id)
		}
	}
	c.trim.empty = empty
	for id := range c.trim.pulse {
		if machines[id] == nil {
			delete(c.trim.pulse, id)
		}
	}
	plan, err := c.plan.state.Decide(planner.Question{Trim: &planner.Trim{Idle: idle, Shrink: true}})
	if err != nil {
		return 0, err
	}
	tx := c.store.Txn()
	grown, said := refit(snap, tx)
	large := map[string]time.Time{}
	var shrunk []*v1.Machine
	for _, a := range plan.Actions {
		m := machines[a.Machine]
		if m == nil || m.Stopped || grown[a.Machine] {
			continue
		}
		switch a.Kind {
		case planner.Stop:
			m = clone(m)
			m.Meta.Deleting = true
			m.Meta.Generation++
			tx.Update(m)
			why := fmt.Sprintf("it was empty for %s", idleStop)
			if idleStop < c.opts.IdleStop {
				why += ", and others wait for room"
			}
			said = append(said, decision{m.Meta.Name, "is to stop", why})
		case planner.Shrink:
			if holds[m.Meta.Id] == 0 && !m.ByUser {
				continue // it will stop soon
			}
			since, ok := c.trim.large[m.Meta.Id]
			if !ok {
				since = now
			}
			large[m.Meta.Id] = since
			delay := c.trim.pulse[m.Meta.Id].delay
			if left := delay - now.Sub(since); left > 0 {
				later(left)
				continue
			}
			delete(large, m.Meta.Id)
			m = clone(m)
			was := text(m.Size)
			m.Size = fromSize(a.To)
			m.Meta.Generation++
			tx.Update(m)
			said = append(said, decision{m.Meta.Name, "shrinks from " + was + " to " + text(m.Size), fmt.Sprintf("its containers needed no more for %s", delay)})
			shrunk = append(shrunk, m)
		}
	}
	c.trim.large = large
	if _, err = tx.Commit(ctx); err != nil {
		return next, err
	}
	c.tell("trim", said)
	for _, m := range shrunk {
		p := c.trim.pulse[m.Meta.Id]
		p.size, p.shrunk = m.Size, now
	}
	return next, nil
}
