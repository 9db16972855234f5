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
		c.trim.empty, c.trim.large = map[string]time.Time{}, map[string]time.Time{}
	}
	now := c.clock.Now()
	holds := map[string]int{}
	for _, x := range snap.Containers {
		holds[x.GetAssignment().GetMachineId()]++
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
	plan, err := c.plan.state.Decide(planner.Question{Trim: &planner.Trim{Idle: idle, Shrink: true}})
	if err != nil {
		return 0, err
	}
	tx := c.store.Txn()
	grown, said := refit(snap, tx)
	large := map[string]time.Time{}
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
			if left := c.opts.ShrinkDelay - now.Sub(since); left > 0 {
				later(left)
				continue
			}
			delete(large, m.Meta.Id)
			m = clone(m)
			was := text(m.Size)
			m.Size = fromSize(a.To)
			m.Meta.Generation++
			tx.Update(m)
			said = append(said, decision{m.Meta.Name, "shrinks from " + was + " to " + text(m.Size), fmt.Sprintf("its containers needed no more for %s", c.opts.ShrinkDelay)})
		}
	}
	c.trim.large = large
	if _, err = tx.Commit(ctx); err == nil {
		c.tell("trim", said)
	}
	return next, err
}
