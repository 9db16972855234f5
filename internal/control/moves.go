package control

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// A move is two records. The successor is made with its place and the name of the old
// one plus ".next", and says whom it replaces. It stands by: it is started, but has
// neither names nor ports. Once it is ready, the old record says by whom it is
// replaced: with that one write names and ports are the successor's. The old one
// drains, goes, and leaves its name to the successor. Each step is one transaction,
// and what the next one is can be told from the two records.
const (
	nextSuffix = ".next"
	// maxMoving is how many successors are started at a time, of all that stand by.
	maxMoving = 2
	// moveSettle is how long a successor without a health check must have run.
	moveSettle = 5 * time.Second
	// moveDrain is how long the old one goes on after all hosts were told that names and
	// ports are the successor's: twice the time that names are kept by who asked.
	moveDrain = 10 * time.Second
	// moveLimit is how long a successor may take to be ready.
	moveLimit = 10 * time.Minute
	// tellLimit is how long a connected host may take to be told.
	tellLimit = time.Minute
)

// mover remembers what is not worth a record: a restart begins these waits anew.
type mover struct {
	ready map[string]time.Time // successor -> since when it is
	told  map[string]time.Time // replaced container -> since when all hosts know
	asked map[string]time.Time // replaced container -> since when they should
}

// finalName is the name that a container has or will have.
func finalName(x *v1.Container) string {
	if x.Replaces != "" {
		return strings.TrimSuffix(x.Meta.Name, nextSuffix)
	}
	return x.Meta.Name
}

// active leaves out containers that only stand by, and those whose place another has
// taken: names, ports, services and conditions are about the others.
func active(cs []*v1.Container) []*v1.Container {
	by := standingBy(cs)
	if len(by) == 0 && !slices.ContainsFunc(cs, func(x *v1.Container) bool { return x.ReplacedBy != "" }) {
		return cs
	}
	return slices.DeleteFunc(slices.Clone(cs), func(x *v1.Container) bool { return x.ReplacedBy != "" || by[x.Meta.Id] != nil })
}

// standingBy maps successors that have not taken over yet to whom they replace.
func standingBy(cs []*v1.Container) map[string]*v1.Container {
	if !slices.ContainsFunc(cs, func(x *v1.Container) bool { return x.Replaces != "" }) {
		return nil
	}
	ids := make(map[string]*v1.Container, len(cs))
	for _, x := range cs {
		ids[x.Meta.Id] = x
	}
	out := map[string]*v1.Container{}
	for _, x := range cs {
		if old := ids[x.Replaces]; x.Replaces != "" && old != nil && old.ReplacedBy != x.Meta.Id {
			out[x.Meta.Id] = old
		}
	}
	return out
}

// waitsItsTurn are the successors that are not started yet: so many move at a time.
func waitsItsTurn(cs []*v1.Container) map[string]bool {
	by := standingBy(cs)
	if len(by) <= maxMoving {
		return nil
	}
	var queue []*v1.Container
	for _, x := range cs {
		if by[x.Meta.Id] != nil && !x.Meta.Deleting {
			queue = append(queue, x)
		}
	}
	slices.SortStableFunc(queue, func(a, b *v1.Container) int {
		if c := a.Meta.GetCreatedAt().AsTime().Compare(b.Meta.GetCreatedAt().AsTime()); c != 0 {
			return c
		}
		return strings.Compare(a.Meta.Name, b.Meta.Name)
	})
	out := map[string]bool{}
	for _, x := range queue[min(maxMoving, len(queue)):] {
		out[x.Meta.Id] = true
	}
	return out
}

// movable says whether a container may be started a second time elsewhere and ended
// here: it is a service's, its restart policy says that it may be started again, and
// it keeps nothing.
func movable(x *v1.Container) bool {
	return restartable(x) && x.Replaces == "" && x.ReplacedBy == ""
}

// restartable says whether a container may be started elsewhere when its host is lost.
func restartable(x *v1.Container) bool {
	spec := x.GetSpec()
	if x.Service == "" || x.OneOff || x.Meta.Deleting || x.Stopped || x.Paused || len(x.Meta.Name) > 120 {
		return false
	}
	if p := spec.GetRestart().GetName(); p != "always" && p != "unless-stopped" {
		return false
	}
	if spec.GetWorkClass() == v1.WorkClass_WORK_CLASS_BATCH || spec.GetIsolation() == v1.Isolation_ISOLATION_METAL || spec.GetNetworkMode() == "host" {
		return false
	}
	if x.GetStatus().GetAnonymousVolumes() || slices.ContainsFunc(spec.GetMounts(), func(m *v1.Mount) bool { return m.Type != v1.Mount_TYPE_TMPFS }) {
		return false
	}
	return !slices.ContainsFunc(spec.GetNetworks(), func(n *v1.NetworkAttachment) bool { return n.Ipv4 != "" })
}

// move makes a container's successor.
func (w *placement) move(a planner.Action) error {
	x := w.containers[a.Container]
	m := w.machines[a.Machine]
	if x == nil || m == nil {
		return fmt.Errorf("a move of %s to %s, which are not both there: %w", a.Container, a.Machine, errdefs.ErrFailedPrecondition)
	}
	if !movable(x) {
		return fmt.Errorf("container %s can't run twice, and is not moved: %w", x.Meta.Name, errdefs.ErrFailedPrecondition)
	}
	now := stamp(w.c.clock.Now())
	n := &v1.Container{
		Meta: &v1.Meta{Id: w.c.NewID(16), Project: x.Meta.Project, Name: x.Meta.Name + nextSuffix, CreatedAt: now, Generation: 1},
		// Whatever the old one is, but for its place.
		Service: x.Service, Ordinal: x.Ordinal, ServiceHash: x.ServiceHash, Spec: clone(x.Spec), StopTimeout: x.StopTimeout, Replaces: x.Meta.Id,
		Assignment: &v1.Assignment{HostId: m.HostId, MachineId: m.Meta.Id, Reason: w.named(Reason(a.Reason)), At: now, Ports: x.GetAssignment().GetPorts()},
	}
	if err := w.address(n, m); err != nil {
		return fmt.Errorf("move container %s to %s: %w", x.Meta.Name, m.Meta.Name, err)
	}
	n.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: now, HostId: m.HostId, MachineId: m.Meta.Id, Ip: n.Assignment.Ip, Ips: further(n)}
	w.tx.Check(x)
	w.tx.Create(n)
	if w.changed[m.Meta.Id] == nil {
		w.checked[m.Meta.Id] = true
	}
	w.say(x.Meta.Name, "moves to "+m.Meta.Name+", "+strings.Join(ips(n.Assignment.Addresses), ", "), n.Assignment.Reason)
	return nil
}

// moves takes every move a step further.
func (c *Controller) moves(ctx context.Context) (time.Duration, error) {
	snap := c.store.Snapshot()
	if c.mover.ready == nil {
		c.mover = mover{map[string]time.Time{}, map[string]time.Time{}, map[string]time.Time{}}
	}
	r := &moveRun{c: c, snap: snap, now: c.clock.Now(), ids: map[string]*v1.Container{}, names: map[store.Key]bool{}, failed: map[string]string{}}
	for _, x := range snap.Containers {
		r.ids[x.Meta.Id], r.names[store.KeyOf(x)] = x, true
	}
	for _, k := range snap.Corrupt {
		r.names[k] = true
	}
	c.mover.forget(r.ids)
	for _, x := range snap.Containers {
		if x.ReplacedBy != "" && !x.Meta.Deleting {
			r.drain(ctx, x)
		}
	}
	for _, x := range snap.Containers {
		if x.Replaces != "" && !x.Meta.Deleting {
			r.step(ctx, x)
		}
	}
	r.giveUpAll(ctx)
	return r.next, r.err
}

func (m *mover) forget(ids map[string]*v1.Container) {
	for _, of := range []map[string]time.Time{m.ready, m.told, m.asked} {
		for id := range of {
			if ids[id] == nil {
				delete(of, id)
			}
		}
	}
}

// moveRun is one pass over all moves.
type moveRun struct {
	c      *Controller
	snap   *store.Snapshot
	now    time.Time
	ids    map[string]*v1.Container
	names  map[store.Key]bool
	failed map[string]string // machine that was to be emptied -> why a move out of it failed
	next   time.Duration
	err    error
}

func (r *moveRun) later(d time.Duration) {
	if d = max(d, time.Millisecond); r.next == 0 || d < r.next {
		r.next = d
	}
}

// write commits one step; one that somebody else's change has overtaken is looked at
// again when that wakes us.
func (r *moveRun) write(ctx context.Context, tx *store.Txn, d decision) {
	switch _, err := tx.Commit(ctx); {
	case err == nil:
		r.c.tell("moves", []decision{d})
	case !errdefs.IsConflict(err) && !errdefs.IsNotFound(err) && !errdefs.IsAlreadyExists(err):
		r.err = fmt.Errorf("move of %s: %w", d.whom, err)
	default:
		r.later(10 * time.Millisecond)
	}
}

// step looks at a successor.
func (r *moveRun) step(ctx context.Context, x *v1.Container) {
	c := r.c
	old := r.ids[x.Replaces]
	switch {
	case old == nil:
		k := store.Key{Kind: store.Containers, Project: x.Meta.Project, Name: finalName(x)}
		if r.names[k] {
			return // somebody has the name: when he goes, this is looked at again
		}
		n := clone(x)
		n.Meta.Name, n.Replaces, n.Meta.Revision = k.Name, "", 0
		r.write(ctx, c.store.Txn().Delete(x).Create(n), decision{k.Name, "has moved", "the old one is gone"})
	case old.ReplacedBy == x.Meta.Id:
	case r.spoiled(old, x) != "":
		r.failed[old.GetAssignment().GetMachineId()] = r.spoiled(old, x)
		r.giveUp(ctx, x, r.spoiled(old, x))
	case !Ready(x):
		delete(c.mover.ready, x.Meta.Id)
		r.later(moveLimit - r.now.Sub(x.Meta.GetCreatedAt().AsTime()))
	default:
		since, ok := c.mover.ready[x.Meta.Id]
		if !ok {
			since = r.now
			c.mover.ready[x.Meta.Id] = since
		}
		if left := moveSettle - r.now.Sub(since); left > 0 && !HasCheck(x) {
			r.later(left)
			return
		}
		o := clone(old)
		o.ReplacedBy = x.Meta.Id
		r.write(ctx, c.store.Txn().Check(x).Update(o), decision{x.Meta.Name, "takes over from " + old.Meta.Name, "it is ready"})
	}
}

// spoiled says why a move does not go on; "" when it does.
func (r *moveRun) spoiled(old, x *v1.Container) string {
	st := x.GetStatus()
	switch {
	case old.Meta.Deleting:
		return old.Meta.Name + " goes"
	case old.ReplacedBy != "":
		return "another has taken over"
	case old.Stopped || old.Paused:
		return old.Meta.Name + " was stopped"
	case old.ServiceHash != x.ServiceHash || !proto.Equal(old.Spec, x.Spec):
		return old.Meta.Name + " has changed"
	case st.GetState() == v1.ContainerState_CONTAINER_STATE_FAILED, st.GetState() == v1.ContainerState_CONTAINER_STATE_EXITED:
		return "it does not run: " + containerEnd(st)
	case st.GetState() == v1.ContainerState_CONTAINER_STATE_UNKNOWN:
		return "its host does not answer"
	case st.GetRestartCount() > 0:
		return "it did not keep running"
	case r.now.Sub(x.Meta.GetCreatedAt().AsTime()) >= moveLimit:
		return fmt.Sprintf("it was not ready within %s", moveLimit)
	}
	return ""
}

func containerEnd(st *v1.ContainerStatus) string {
	if st.GetMessage() != "" {
		return st.Message
	}
	return fmt.Sprintf("exit code %d", st.GetExitCode())
}

func (r *moveRun) giveUp(ctx context.Context, x *v1.Container, why string) {
	n := clone(x)
	n.Meta.Deleting = true
	n.Meta.Generation++
	r.write(ctx, r.c.store.Txn().Update(n), decision{x.Meta.Name, "is given up", why})
}

// giveUpAll: a machine is emptied wholly or not at all. It is left in peace for a while.
func (r *moveRun) giveUpAll(ctx context.Context) {
	if len(r.failed) == 0 {
		return
	}
	for _, x := range r.snap.Containers {
		old := r.ids[x.Replaces]
		if x.Replaces == "" || x.Meta.Deleting || old == nil || old.ReplacedBy == x.Meta.Id || r.spoiled(old, x) != "" {
			continue
		}
		if _, ok := r.failed[old.GetAssignment().GetMachineId()]; ok {
			r.giveUp(ctx, x, "another could not leave its machine")
		}
	}
	r.c.planMu.Lock()
	defer r.c.planMu.Unlock()
	for id := range r.failed {
		r.c.folder.avoid(id, r.now)
	}
}

// drain looks at a container whose place another has taken.
func (r *moveRun) drain(ctx context.Context, x *v1.Container) {
	m := &r.c.mover
	if _, ok := m.asked[x.Meta.Id]; !ok {
		m.asked[x.Meta.Id] = r.now
	}
	since, ok := m.told[x.Meta.Id]
	if !ok && !r.c.Hosts.allTook(x.Meta.Revision) && r.now.Sub(m.asked[x.Meta.Id]) < tellLimit {
		r.later(100 * time.Millisecond)
		return
	}
	if !ok {
		since = r.now
		m.told[x.Meta.Id] = since
	}
	running := x.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING
	if left := moveDrain - r.now.Sub(since); left > 0 && running {
		r.later(left)
		return
	}
	n := clone(x)
	n.Meta.Deleting = true
	n.Meta.Generation++
	r.write(ctx, r.c.store.Txn().Update(n), decision{x.Meta.Name, "is to go", "another has taken its place"})
}

// allTook says whether all connected hosts have an intent as new as rev.
func (h *Hosts) allTook(rev uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range h.sessions {
		s.mu.Lock()
		ok := s.applied >= rev
		s.mu.Unlock()
		if !ok {
			return false
		}
	}
	return true
}
