package control

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// restartLost starts again elsewhere what may run elsewhere of hosts that have been away
// for long. Whatever keeps something stays: its host may come back with it. When it
// does, it is told that the rest is no longer its own, and ends it.
func (c *Controller) restartLost(ctx context.Context) (time.Duration, error) {
	if c.opts.RestartDelay < 0 {
		return 0, nil
	}
	c.planMu.Lock()
	defer c.planMu.Unlock()
	snap := c.store.Snapshot()
	now := c.clock.Now()
	away := map[string]time.Time{}
	next := time.Duration(0)
	var lost []string
	for _, h := range snap.Hosts {
		if h.Connected {
			continue
		}
		since, ok := c.away[h.Meta.Id]
		if !ok {
			since = now
		}
		away[h.Meta.Id] = since
		if left := c.opts.RestartDelay - now.Sub(since); left > 0 {
			if next == 0 || left < next {
				next = left
			}
		} else {
			lost = append(lost, h.Meta.Id)
		}
	}
	c.away = away
	if len(lost) == 0 || snap.Unreadable(store.Containers, store.Machines, store.Hosts) {
		return next, nil
	}
	c.plan.sync()
	bound, loose := c.bindTo(snap, lost)
	if !loose {
		return next, nil
	}
	for _, p := range bound {
		if err := c.plan.state.SetContainer(p); err != nil {
			return next, err
		}
	}
	plan, err := c.plan.state.Decide(planner.Question{HostLost: lost})
	for _, p := range bound { // as it was
		x, e := store.ByID[*v1.Container](c.store, store.Containers, p.ID)
		if e == nil {
			e = c.plan.state.SetContainer(c.plan.container(x))
		}
		if e != nil && !errdefs.IsNotFound(e) && err == nil {
			err = e
		}
	}
	if err != nil || len(plan.Actions) == 0 {
		return next, err
	}
	claimed := c.claims(snap)
	w := newPlacement(c, snap, claimed)
	w.by = "restart"
	for i, a := range plan.Actions {
		if x := w.containers[a.Container]; x != nil && claimed.blocks(x) != nil {
			return next, claimed.blocks(x)
		}
		if a.Kind == planner.Evict { // what was lost does not wait until others have ended
			w.fail(w.evict(a, beneficiary(plan.Actions[i:])))
			continue
		}
		w.action(a)
	}
	return next, w.commit(ctx)
}

// bindTo is how the planner is to see what can't leave its lost host; loose: there is
// something that can.
func (c *Controller) bindTo(snap *store.Snapshot, lost []string) (bound []planner.Container, loose bool) {
	for _, x := range snap.Containers {
		if !slices.Contains(lost, x.GetAssignment().GetHostId()) {
			continue
		}
		if movable(x) {
			loose = true
			continue
		}
		p := c.plan.container(x)
		p.Hosts = []string{x.Assignment.HostId}
		bound = append(bound, p)
	}
	return bound, loose
}

// restart gives a machine of a lost host, with all that is in it, to another host.
func (w *placement) restart(a planner.Action) error {
	m, h := w.edit(a.Machine), w.hosts[a.Host]
	if m == nil || h == nil || m.HostId != a.FromHost {
		return fmt.Errorf("machine %s does not start again on %s: one of them is gone: %w", a.Machine, a.Host, errdefs.ErrFailedPrecondition)
	}
	top := maxMachine(h.GetFacts())
	m.HostId, m.Size = a.Host, fromSize(a.To)
	m.Ceiling = &v1.Size{CpuMilli: max(min(m.Ceiling.GetCpuMilli(), top.CpuMilli), m.Size.CpuMilli), MemoryBytes: max(min(m.Ceiling.GetMemoryBytes(), top.MemoryBytes), m.Size.MemoryBytes)}
	m.Meta.Generation++
	m.Reason = w.named(Reason(a.Reason))
	m.Status = &v1.MachineStatus{State: v1.MachineState_MACHINE_STATE_PENDING, HostId: a.Host}
	w.say(m.Meta.Name, "starts again on "+h.Meta.Name+" with "+text(m.Size), m.Reason)
	for _, x := range w.snap.Containers {
		if x.GetAssignment().GetMachineId() != m.Meta.Id {
			continue
		}
		x = clone(x)
		x.Assignment.HostId, x.Assignment.Reason, x.Assignment.At = a.Host, m.Reason, stamp(w.c.clock.Now())
		x.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: x.GetStatus().GetCreatedAt(), HostId: a.Host,
			MachineId: m.Meta.Id, Ip: x.Assignment.Ip, Ips: further(x)}
		w.tx.Update(x)
	}
	if !w.checked[a.Host] {
		w.checked[a.Host] = true
		w.tx.Check(h)
	}
	return nil
}
