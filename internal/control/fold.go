package control

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

const (
	// foldLeave is the part of a machine's ceiling that a fold leaves unused: a little
	// more load must not need another machine at once.
	foldLeave = 0.2
	// foldGain is what a fold must give back to its hosts.
	foldGain = 64 << 20
	// foldPause is the least time between two questions about the same machines.
	foldPause = time.Minute
	// foldAvoid is how long a machine is left in peace after a move out of it failed.
	foldAvoid = time.Hour
)

// folder remembers how long machines have been as they are, which are left in peace,
// and how many moves there may be. Controller.planMu guards it.
type folder struct {
	steady  map[string]steady
	avoided map[string]time.Time
	tokens  float64
	filled  time.Time
	asked   string // machines that the last question was about
	askedAt time.Time
}

type steady struct {
	as    string // what the machine is and holds
	since time.Time
}

func (f *folder) avoid(machine string, now time.Time) {
	if f.avoided == nil {
		f.avoided = map[string]time.Time{}
	}
	f.avoided[machine] = now
}

// refill adds to the budget what time has brought: perHour moves an hour, and not more
// than that saved up.
func (f *folder) refill(now time.Time, perHour int) {
	if f.filled.IsZero() {
		f.tokens = float64(perHour)
	} else {
		f.tokens = min(float64(perHour), f.tokens+now.Sub(f.filled).Hours()*float64(perHour))
	}
	f.filled = now
}

// fold empties a machine into others when all of them have been as they are for a
// while: one machine at a time, as far as the budget of moves goes.
func (c *Controller) fold(ctx context.Context) (time.Duration, error) {
	if c.opts.FoldDelay < 0 {
		return 0, nil
	}
	c.planMu.Lock()
	defer c.planMu.Unlock()
	snap := c.store.Snapshot()
	if snap.Unreadable(store.Containers, store.Machines, store.Hosts, store.Services) {
		return 0, nil
	}
	c.plan.sync()
	now := c.clock.Now()
	f := &c.folder
	among, next := f.settled(snap, now, c.opts.FoldDelay)
	moving := slices.ContainsFunc(snap.Containers, func(x *v1.Container) bool { return x.Replaces != "" || x.ReplacedBy != "" })
	if len(among) < 2 || moving {
		return next, nil
	}
	// Most of what wakes this changes nothing about the answer.
	asked := strings.Join(among, " ")
	if left := min(c.opts.FoldDelay, foldPause) - now.Sub(f.askedAt); f.asked == asked && left > 0 {
		if next == 0 || left < next {
			next = left
		}
		return next, nil
	}
	f.asked, f.askedAt = asked, now
	f.refill(now, c.opts.FoldsPerHour)
	if f.tokens < 1 {
		return c.tokenAfter(1), nil
	}
	in := map[string]bool{}
	for _, id := range among {
		in[id] = true
	}
	for _, x := range snap.Containers {
		// What its service says may have changed since.
		if in[x.GetAssignment().GetMachineId()] {
			if err := c.plan.state.SetContainer(c.plan.container(x)); err != nil {
				return 0, err
			}
		}
	}
	plan, err := c.plan.state.Decide(planner.Question{Fold: &planner.Fold{
		Budget: planner.Budget{Containers: int(f.tokens), Bytes: -1}, Among: among, Leave: foldLeave, Gain: foldGain, Machines: 1}})
	if err != nil {
		return 0, err
	}
	if len(plan.Actions) == 0 {
		if full := float64(c.opts.FoldsPerHour); f.tokens < full && (next == 0 || next > foldPause) {
			next = foldPause // a larger budget may allow what this one does not
		}
		return next, nil
	}
	claimed := c.claims(snap)
	w := newPlacement(c, snap, claimed)
	w.by = "fold"
	moves := 0
	for _, a := range plan.Actions {
		switch a.Kind {
		case planner.Stop: // trim stops what is empty
		case planner.Move:
			if err := claimed.blocks(w.containers[a.Container]); err != nil {
				return 0, fmt.Errorf("fold: %w", err)
			}
			moves++
			fallthrough
		default:
			w.action(a)
		}
	}
	if err := w.commit(ctx); err != nil {
		return 0, err
	}
	f.tokens -= float64(moves)
	return next, nil
}

// tokenAfter is how long it takes until there are n moves in the budget.
func (c *Controller) tokenAfter(n float64) time.Duration {
	return max(time.Duration(math.Ceil((n-c.folder.tokens)/float64(c.opts.FoldsPerHour)*float64(time.Hour))), time.Second)
}

// settled lists the machines that have long been as they are, and says after how long
// others will be.
func (f *folder) settled(snap *store.Snapshot, now time.Time, delay time.Duration) ([]string, time.Duration) {
	hosts := map[string]bool{}
	for _, h := range snap.Hosts {
		hosts[h.Meta.Id] = h.Connected && !h.Cordoned
	}
	holds := map[string][]*v1.Container{}
	for _, x := range snap.Containers {
		if id := x.GetAssignment().GetMachineId(); id != "" {
			holds[id] = append(holds[id], x)
		}
	}
	was := f.steady
	f.steady = map[string]steady{}
	var out []string
	next := time.Duration(0)
	for _, m := range snap.Machines {
		id := m.Meta.Id
		as := ""
		if hosts[m.HostId] && !m.Meta.Deleting && !m.Stopped && m.GetStatus().GetState() == v1.MachineState_MACHINE_STATE_RUNNING {
			as = condition(m, holds[id])
		}
		if as == "" {
			continue
		}
		s := steady{as, now}
		if old, ok := was[id]; ok && old.as == as {
			s.since = old.since
		}
		f.steady[id] = s
		left := delay - now.Sub(s.since)
		if at, ok := f.avoided[id]; ok {
			left = max(left, foldAvoid-now.Sub(at))
		}
		if left <= 0 {
			delete(f.avoided, id)
			out = append(out, id)
		} else if next == 0 || left < next {
			next = left
		}
	}
	for id := range f.avoided {
		if _, ok := f.steady[id]; !ok && now.Sub(f.avoided[id]) > foldAvoid {
			delete(f.avoided, id)
		}
	}
	slices.Sort(out)
	return out, next
}

// condition is what a machine is and holds; "" while anything in it is on its way.
func condition(m *v1.Machine, holds []*v1.Container) string {
	parts := []string{m.HostId, text(m.Size)}
	for _, x := range holds {
		if x.Meta.Deleting || !(Ready(x) || Ended(x) || x.Stopped) {
			return ""
		}
		parts = append(parts, fmt.Sprint(x.Meta.Id, x.GetStatus().GetState(), x.GetStatus().GetRestartCount()))
	}
	slices.Sort(parts[2:])
	return strings.Join(parts, " ")
}

// refusal is for actions that the hosts there are can't carry out: their capabilities
// keep them out of plans, and one that comes nevertheless is not ignored.
func refusal(a planner.Action) error {
	return fmt.Errorf("the plan wants a %s of %s%s on %s, which no back end of this version can: %w", a.Kind, a.Container, a.Machine, a.Host, errdefs.ErrNotImplemented)
}
