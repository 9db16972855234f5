package control

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// Batch work gives way to latency work that fits nowhere else, in three steps, each a
// transaction: it is told to end (GivesWayTo), its place is taken away when it has
// ended, and then there is room for the other one; it waits for a place itself. So the
// two never need the same room at a time. A container that gives way is created anew
// where it goes; its volumes stay.

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

// awaiting is the containers for which others are giving way now.
func awaiting(snap *store.Snapshot) map[string]bool {
	out := map[string]bool{}
	for _, x := range snap.Containers {
		if x.GivesWayTo != "" && !x.Meta.Deleting && x.GetStatus().GetState() != v1.ContainerState_CONTAINER_STATE_UNKNOWN {
			out[x.GivesWayTo] = true
		}
	}
	return out
}

// vacate takes the places of those away that were to give way and have ended.
func (c *Controller) vacate(ctx context.Context, snap *store.Snapshot) error {
	tx := c.store.Txn()
	var said []decision
	for _, x := range snap.Containers {
		if x.GivesWayTo == "" || x.Meta.Deleting || !givenUp(x) {
			continue
		}
		x = clone(x)
		x.GivesWayTo, x.Assignment = "", nil
		x.Meta.Generation++ // what its old host still says of it is old
		x.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: x.GetStatus().GetCreatedAt(), Message: "gave way to latency work"}
		tx.Update(x)
		said = append(said, decision{x.Meta.Name, "has given its place up", ""})
	}
	if tx.Len() == 0 {
		return nil
	}
	if _, err := tx.Commit(ctx); err != nil {
		return err
	}
	c.tell("place", said)
	return nil
}

// givenUp says whether nothing of a container runs any more, or yet.
func givenUp(x *v1.Container) bool {
	switch x.GetStatus().GetState() {
	case v1.ContainerState_CONTAINER_STATE_EXITED, v1.ContainerState_CONTAINER_STATE_FAILED:
		return true
	case v1.ContainerState_CONTAINER_STATE_CREATED, v1.ContainerState_CONTAINER_STATE_PENDING:
		return x.GetStatus().GetStartedAt() == nil
	}
	return x.GetAssignment() == nil
}
