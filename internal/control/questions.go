package control

import (
	"context"
	"fmt"
	"reflect"
	"slices"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// Copy is what the planner knows, for questions: nobody else sees what is done to it.
type Copy struct {
	Revision uint64 // of the state; see CarryOut
	Snapshot *store.Snapshot
	State    *planner.State
}

// Copy makes a copy of what the planner knows. One question is answered at a time, as
// a copy is as large as the original: release it when done.
func (c *Controller) Copy(ctx context.Context) (cp *Copy, release func(), err error) {
	select {
	case c.asking <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, fmt.Errorf("waiting for another question to be answered: %w", ctx.Err())
	}
	c.planMu.Lock()
	defer c.planMu.Unlock()
	snap := c.store.Snapshot()
	c.plan.sync() // after the snapshot: the planner knows at least as much
	cp = &Copy{Revision: max(snap.Revision, c.plan.moved), Snapshot: snap, State: c.plan.state.Clone()}
	for _, x := range snap.Containers {
		if x.GetAssignment().GetHostId() == "" && !unplaced(x) {
			cp.State.RemoveContainer(x.Meta.Id) // it is not to run: no question is about it
		}
	}
	return cp, func() { <-c.asking }, nil
}

// PlanContainer is a container as the planner sees it.
func (c *Controller) PlanContainer(x *v1.Container) planner.Container { return c.plan.container(x) }

// note remembers when something changed that plans rely on: not that a container is
// healthy, but that it, its machine or its host came, went or has another size or place.
func (p *planState) note(ch store.Change) {
	if ch.New == nil {
		if ch.Key.Kind == store.Services {
			return // its containers are told of themselves
		}
		p.moved = max(p.moved, p.c.store.Revision())
		return
	}
	same := ch.Key.Kind == store.Services && ch.Old == nil
	if ch.Old != nil && ch.Old.GetMeta().GetId() == ch.New.GetMeta().GetId() {
		switch now := ch.New.(type) {
		case *v1.Host:
			same = reflect.DeepEqual(planHost(ch.Old.(*v1.Host)), planHost(now))
		case *v1.Machine:
			same = planMachine(ch.Old.(*v1.Machine)) == planMachine(now)
		case *v1.Volume:
			same = ch.Old.(*v1.Volume).HostId == now.HostId
		case *v1.Service:
			same = samePlacing(ch.Old.(*v1.Service), now)
		case *v1.Container:
			was := ch.Old.(*v1.Container)
			same = unplaced(was) == unplaced(now) && was.Meta.Deleting == now.Meta.Deleting && was.ServiceHash == now.ServiceHash &&
				reflect.DeepEqual(p.container(was), p.container(now))
		}
	}
	if !same {
		p.moved = max(p.moved, ch.New.GetMeta().GetRevision())
	}
}

// Unchanged is an error when something changed since a revision that plans rely on;
// then what was planned at that revision may not hold any more.
func (c *Controller) Unchanged(revision uint64) error {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	return c.unchanged(revision)
}

func (c *Controller) unchanged(revision uint64) error {
	now := c.store.Revision()
	c.plan.sync()
	switch {
	case revision > max(now, c.plan.moved):
		return fmt.Errorf("there is no revision %d yet, the state is at %d: use the revision that the plan says: %w", revision, now, errdefs.ErrInvalidArgument)
	case c.plan.moved > revision:
		return Stale(revision)
	}
	return nil
}

// Stale is the error of a plan that was made at a revision and does not hold any more.
func Stale(revision uint64) error {
	return fmt.Errorf("the plan is stale: the state has changed since revision %d; ask again: %w", revision, errdefs.ErrAborted)
}

// CarryOut does what a plan says that was made at a revision, if nothing that it
// relies on has changed since; else the error is of the class Aborted.
func (c *Controller) CarryOut(ctx context.Context, revision uint64, plan *planner.Plan) error {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	if err := c.unchanged(revision); err != nil {
		return err
	}
	return c.carryOut(ctx, plan)
}

// carryOut writes down a plan that somebody asked for: all of it or nothing. The plan
// is of the present state, and planMu is held. Moves go on by themselves then, two at a
// time; a machine that they empty is stopped by trim, and so a Stop needs nothing here.
func (c *Controller) carryOut(ctx context.Context, plan *planner.Plan) error {
	snap := c.store.Snapshot()
	if snap.Unreadable(store.Containers, store.Machines, store.Hosts, store.Services) {
		return fmt.Errorf("a record of the state can't be read, and nothing is moved until it is: see `tandem state ls`: %w", errdefs.ErrUnavailable)
	}
	if slices.ContainsFunc(snap.Containers, func(x *v1.Container) bool { return x.Replaces != "" || x.ReplacedBy != "" }) {
		return fmt.Errorf("containers are being moved: ask again when that is done: %w", errdefs.ErrAborted)
	}
	claimed := c.claims(snap)
	w := newPlacement(c, snap, claimed)
	w.by = "asked"
	for _, a := range plan.Actions {
		switch a.Kind {
		case planner.Stop:
			continue
		case planner.Move:
			if err := claimed.blocks(w.containers[a.Container]); err != nil {
				return err
			}
		}
		w.action(a)
	}
	err := w.commit(ctx)
	if errdefs.IsConflict(err) {
		return fmt.Errorf("the plan is stale: something changed while it was written down; ask again: %w", errdefs.ErrAborted)
	}
	return err
}

// PlanHost is a host as the planner sees it.
func PlanHost(h *v1.Host) planner.Host { return planHost(h) }
