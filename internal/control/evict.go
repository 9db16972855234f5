package control

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// Batch work gives way to latency work that fits nowhere else, in three steps, each a
// transaction: it is told to end (GivesWayTo); its place is taken away when it has
// ended; then there is room for the other one. So the two never need the same room at a
// time. It waits for a place itself, and is not asked about before the other one has
// its place. A container that gives way is created anew where it goes; its volumes stay.

// evict tells a container to end and to give its place to another.
func (w *placement) evict(a planner.Action, to string) error {
	x := w.containers[a.Container]
	if x == nil || x.Spec.GetWorkClass() != v1.WorkClass_WORK_CLASS_BATCH {
		return fmt.Errorf("container %s is no batch work, and gives way to nobody: %w", a.Container, errdefs.ErrFailedPrecondition)
	}
	if x.GivesWayTo != "" {
		return nil
	}
	x = clone(x)
	x.GivesWayTo = to
	w.tx.Update(x)
	w.say(x.Meta.Name, "gives way to "+w.called(to), &v1.Reason{Summary: "that is latency work and fits nowhere else"})
	return nil
}

// called is the name of a container or machine.
func (w *placement) called(id string) string {
	if x := w.containers[id]; x != nil {
		return x.Meta.Name
	}
	if m := w.machines[id]; m != nil {
		return m.Meta.Name
	}
	return id
}

// evictions carries out the evictions of a plan, and what comes before them; whoever
// comes after waits until those have ended, and is asked about anew.
func (w *placement) evictions(actions []planner.Action) {
	first := slices.IndexFunc(actions, func(a planner.Action) bool { return a.Kind == planner.Evict })
	if first < 0 {
		first = len(actions)
	}
	for _, a := range actions[:first] {
		w.action(a)
	}
	var ending []planner.Action // of the next one that is placed
	for _, a := range actions[first:] {
		switch a.Kind {
		case planner.Evict:
			ending = append(ending, a)
		case planner.Place, planner.PlaceM:
			for _, e := range ending {
				w.fail(w.evict(e, a.Container))
			}
			if len(ending) > 0 {
				w.waits(a.Container, ending)
			}
			ending = nil
		}
	}
}

// beneficiary is for whom the first of the actions makes room: a container, or a
// machine that starts again.
func beneficiary(actions []planner.Action) string {
	for _, a := range actions {
		switch a.Kind {
		case planner.Place, planner.PlaceM:
			return a.Container
		case planner.Restart:
			return a.Machine
		}
	}
	return actions[0].Container
}

// waits says for whose end a container waits.
func (w *placement) waits(id string, ending []planner.Action) {
	x := w.containers[id]
	if x == nil {
		return
	}
	names := make([]string, 0, len(ending))
	for _, e := range ending {
		names = append(names, w.called(e.Container))
	}
	msg := "waits for the end of " + strings.Join(names, ", ") + ", batch work that gives way to it"
	w.c.plan.unplaced[id] = &v1.Reason{Summary: msg}
	x = clone(x)
	if x.Status == nil {
		x.Status = &v1.ContainerStatus{}
	}
	x.Status.State, x.Status.Message = v1.ContainerState_CONTAINER_STATE_PENDING, msg
	w.tx.Update(x)
	w.say(x.Meta.Name, "waits", &v1.Reason{Summary: strings.TrimPrefix(msg, "waits ")})
}

// giving is who waits because of evictions, and is not asked about now.
func giving(snap *store.Snapshot) map[string]bool {
	ids := map[string]*v1.Container{}
	for _, x := range snap.Containers {
		ids[x.Meta.Id] = x
	}
	out := map[string]bool{}
	for _, x := range snap.Containers {
		to := ids[x.GivesWayTo]
		switch {
		case x.GivesWayTo == "" || x.Meta.Deleting || to == nil || !unplaced(to):
		case x.GetAssignment() == nil:
			out[x.Meta.Id] = true // else it would take its room again
		case x.GetStatus().GetState() != v1.ContainerState_CONTAINER_STATE_UNKNOWN:
			out[to.Meta.Id] = true
		}
	}
	return out
}

// vacate takes the places of those away that were to give way and have ended, and
// with the same stroke what their machines held for them.
func (c *Controller) vacate(ctx context.Context) error {
	snap := c.store.Snapshot()
	var gone []*v1.Container
	for _, x := range snap.Containers {
		if x.GivesWayTo != "" && x.GetAssignment() != nil && !x.Meta.Deleting && givenUp(x) {
			gone = append(gone, x)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	c.plan.sync()
	w := newPlacement(c, snap, c.claims(snap))
	machines := []string{}
	for _, old := range gone {
		if id := old.Assignment.MachineId; id != "" {
			machines = append(machines, id)
		}
		x := clone(old)
		x.Assignment = nil
		x.Meta.Generation++ // what its old host still says of it is old
		x.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: x.GetStatus().GetCreatedAt(),
			Message: "gave way to " + w.called(x.GivesWayTo) + ", and waits for another place"}
		w.tx.Update(x)
		w.say(x.Meta.Name, "has given its place up", nil)
		if err := c.plan.state.SetContainer(c.plan.container(x)); err != nil {
			return err
		}
	}
	plan, err := c.plan.state.Decide(planner.Question{Trim: &planner.Trim{Shrink: true, Only: machines}})
	if err == nil {
		for _, a := range plan.Actions {
			w.action(a)
		}
		err = w.commit(ctx)
	}
	if err != nil { // as it was
		for _, old := range gone {
			err = errors.Join(err, c.plan.state.SetContainer(c.plan.container(old)))
		}
	}
	return err
}

// givenUp says whether nothing of a container runs any more, or yet.
func givenUp(x *v1.Container) bool {
	switch x.GetStatus().GetState() {
	case v1.ContainerState_CONTAINER_STATE_EXITED, v1.ContainerState_CONTAINER_STATE_FAILED:
		return true
	case v1.ContainerState_CONTAINER_STATE_CREATED, v1.ContainerState_CONTAINER_STATE_PENDING:
		return x.GetStatus().GetStartedAt() == nil
	}
	return false
}
