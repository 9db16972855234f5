package simulate

import (
	"slices"

	"tandem/internal/planner"
)

// How the main policy asks the planner; the controllers' own habits.
const (
	tandemScan = Time(20 * 1000)  // between two looks at what is idle or waits
	tandemFold = Time(120 * 1000) // between two questions what could be folded
	tandemIdle = Time(30 * 1000)  // an empty machine is kept that long
	spareHosts = 4                // powered-off hosts that the planner is told of
	maxCredit  = 1000             // moves saved up at most

	// The part of what is on that may be unused without anything being moved for
	// it: the more moves are saved up for each host, the less is tolerated.
	leaveMost  = 0.07
	leaveLeast = 0.045
)

// tandem is Tandem itself: the real planner, asked at each event as the
// controllers ask it, its plans carried out on the simulated world with the times
// that they take. What is under way (a container that starts elsewhere before it
// stops here, a machine that migrates) is kept from new plans until it is done.
type tandem struct {
	s         *planner.State
	o         *Options
	machines  map[string]*Machine // by the planner's name
	names     map[*Machine]string
	all       map[string]*Container
	known     map[string]Offer // hosts that the planner knows to be off
	pending   []string         // containers without a place, in the order of asking
	busy      []*Machine       // sources of moves under way
	empty     map[string]Time  // machines, since when
	fold      Time             // the next question what could be folded
	mending   bool             // a host failed, and the guarantee is not whole again
	measuring bool
	booted    int
	credit    float64      // moves that the budget allows now
	losing    []*Container // of the host that has just failed
}

func newTandem(o *Options) *tandem {
	t := &tandem{s: planner.New(), o: o, machines: map[string]*Machine{}, names: map[*Machine]string{}, all: map[string]*Container{},
		known: map[string]Offer{}, empty: map[string]Time{}}
	if err := t.s.SetPolicy(planner.Policy{HostLosses: o.HA}); err != nil {
		panic(broken{err})
	}
	return t
}

// Name is the policy's key.
func (*tandem) Name() string { return "tandem" }

// Handle asks the planner what the event calls for.
func (t *tandem) Handle(w *World, e Event) int {
	decided := 0
	switch e.Kind {
	case Arrived:
		if w.Measuring() && !t.measuring {
			t.measuring, t.credit = true, 0 // what the warm-up saved up is not spent later
		}
		t.credit = min(t.credit+t.o.Budget/1000, maxCredit)
		decided = t.arrive(w, e.Container)
		w.Wake((w.Now()/tandemScan + 1) * tandemScan)
	case Left:
		delete(t.all, e.Container.ID)
		t.s.RemoveContainer(e.Container.ID)
		if e.Machine == nil {
			t.pending = slices.DeleteFunc(t.pending, func(id string) bool { return id == e.Container.ID })
		} else {
			t.noteEmpty(w, e.Machine)
			t.shrink(w, e.Machine)
		}
		t.settle(w)
		decided = t.retry(w)
	case Booted, Grown, Moved:
		if e.Kind == Moved {
			t.moved(w, e.Machine, e.Host)
		}
		t.settle(w)
	case HostUp:
		decided = t.retry(w)
	case HostLost:
		decided = t.lost(w, e)
	case Tick:
		t.settle(w)
		t.trim(w)
		decided = t.retry(w)
		t.mend(w)
		t.consolidate(w)
		w.Wake(w.Now() + tandemScan)
	}
	return decided
}

// must stops the run on an answer that the planner must not give.
func (t *tandem) must(w *World, err error, what string) {
	w.must(err == nil, "the planner refused %s: %v", what, err)
}

func (t *tandem) isolation(w *World) planner.Isolation {
	switch w.Isolation {
	case IsolationShared:
		return planner.Shared
	case IsolationOwn:
		return planner.Own
	}
	return planner.Project
}

// offer tells the planner of hosts that can be switched on.
func (t *tandem) offer(w *World) {
	if len(t.known) >= spareHosts {
		return
	}
	for _, o := range w.Offers(spareHosts) {
		if _, ok := t.known[o.ID]; !ok {
			t.known[o.ID] = o
			t.must(w, t.s.SetHost(t.host(w, o.ID, o.Zone, o.Size, true)), "host "+o.ID)
		}
	}
}

func (t *tandem) host(w *World, id, zone string, size Size, off bool) planner.Host {
	return planner.Host{ID: id, Zone: zone, Capacity: planner.Size(size), GuestExtra: planner.Size(w.Overhead), Base: planner.Size(w.Overhead), Off: off,
		Capabilities: planner.Capabilities{Grow: true, Shrink: true, CPUStep: 1, MemoryStep: 1, BootSeconds: w.boot.Seconds(), GrowSeconds: w.grow.Seconds(),
			MoveSecondsGiB: float64(1<<30) / float64(w.migrateRate), PowerOnSeconds: w.hostBoot.Seconds()}}
}

func (t *tandem) arrive(w *World, c *Container) int {
	if !w.CanEver(c) {
		w.Refuse(c, "larger than any host")
		return 1
	}
	p := planner.Container{ID: c.ID, Project: c.Project, Service: c.Service, Isolation: t.isolation(w), Request: planner.Size(c.Need)}
	if c.Class == ClassBatch {
		p.Class = planner.Batch
	}
	t.must(w, t.s.SetContainer(p), "container "+c.ID)
	t.all[c.ID] = c
	return t.place(w, []string{c.ID})
}

// place asks for places, and remembers what has none.
func (t *tandem) place(w *World, ids []string) int {
	t.offer(w)
	plan, err := t.s.Decide(planner.Question{Place: ids})
	t.must(w, err, "a question")
	if !t.carryOut(w, plan) {
		t.wait(ids...) // asked for again at the next scan
		return len(ids)
	}
	for _, u := range plan.Unplaced {
		t.wait(u.Container)
	}
	return len(ids)
}

// wait remembers containers without a place.
func (t *tandem) wait(ids ...string) {
	for _, id := range ids {
		if !slices.Contains(t.pending, id) {
			t.pending = append(t.pending, id)
		}
	}
}

// retry asks again for what has no place.
func (t *tandem) retry(w *World) int {
	if len(t.pending) == 0 {
		return 0
	}
	ids := t.pending
	t.pending = nil
	return t.place(w, ids)
}

// noteEmpty remembers since when a machine is empty.
func (t *tandem) noteEmpty(w *World, m *Machine) {
	id, ok := t.names[m]
	if !ok || m.Gone {
		return
	}
	if len(m.Containers) > 0 {
		delete(t.empty, id)
	} else if _, ok := t.empty[id]; !ok {
		t.empty[id] = w.Now()
	}
}

// shrink gives back at once what has become free in a machine.
func (t *tandem) shrink(w *World, m *Machine) {
	id, ok := t.names[m]
	if !ok || m.Gone || slices.Contains(t.busy, m) {
		return
	}
	plan, err := t.s.Decide(planner.Question{Trim: &planner.Trim{Shrink: true, Only: []string{id}}})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
}

// trim stops machines that have been empty for long enough.
func (t *tandem) trim(w *World) {
	var idle []string
	for id, since := range t.empty {
		if w.Now()-since >= tandemIdle {
			idle = append(idle, id)
		}
	}
	if len(idle) == 0 {
		return
	}
	slices.Sort(idle)
	plan, err := t.s.Decide(planner.Question{Trim: &planner.Trim{Idle: idle, Only: idle}})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
}

// consolidate asks what could be folded within the budget, and what be switched
// off. Between two times it asks for the latter only, and only if something is empty.
func (t *tandem) consolidate(w *World) {
	q := planner.Consolidate{PowerOff: true, Leave: 1}
	if w.Now() >= t.fold && len(t.busy) == 0 {
		t.fold = w.Now() + tandemFold
		each := t.credit / float64(len(w.Hosts())+1)
		q.Leave = leaveMost - (leaveMost-leaveLeast)*max(0, min(1, (each-1)/1.5))
		if q.Budget = (planner.Budget{Containers: int(t.credit), Bytes: -1}); t.o.Budget < 0 {
			q.Budget.Containers, q.Leave = -1, 0
		}
	} else if !slices.ContainsFunc(w.Hosts(), func(h *Host) bool { return len(h.Machines) == 0 }) {
		return
	}
	plan, err := t.s.Decide(planner.Question{Consolidate: &q})
	t.must(w, err, "a question")
	if t.feasible(plan) {
		t.carryOut(w, plan)
	}
}

// feasible says whether all that a plan moves can move now; what does not is asked
// for again at the next scan.
func (t *tandem) feasible(p *planner.Plan) bool {
	for i := range p.Actions {
		a := &p.Actions[i]
		switch a.Kind {
		case planner.Move, planner.Evict:
			if c := t.all[a.Container]; c == nil || !c.Running || c.from != nil {
				return false
			}
		case planner.Migrate:
			if m := t.machines[a.Machine]; m == nil || !m.Up || m.target != nil || m.Live != m.Size || m.leaving > 0 || len(m.waiting) > 0 {
				return false
			}
		}
	}
	return true
}

// lost brings a failed host's load to other hosts.
func (t *tandem) lost(w *World, e Event) int {
	for m, id := range t.names { // what was moving away from there: its planner knows better
		if m.Gone && m.Host == e.Host {
			delete(t.empty, id)
		}
	}
	t.busy = slices.DeleteFunc(t.busy, func(m *Machine) bool { return m.Gone })
	t.losing = e.Lost
	t.offer(w)
	plan, err := t.s.Decide(planner.Question{HostLost: []string{e.Host.ID}})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
	t.s.RemoveHost(e.Host.ID)
	for m, id := range t.names {
		if m.Gone {
			delete(t.names, m)
			delete(t.machines, id)
		}
	}
	var left []string
	for _, c := range e.Lost {
		if c.Machine == nil && !c.Done {
			left = append(left, c.ID)
		}
	}
	if len(left) > 0 {
		t.place(w, left)
	}
	t.mending = true
	t.mend(w)
	return len(e.Lost)
}

// mend asks, after a failure, for what brings the guarantee back.
func (t *tandem) mend(w *World) {
	if !t.mending || len(t.busy) > 0 {
		return
	}
	t.offer(w)
	plan, err := t.s.Decide(planner.Question{Rebalance: &planner.Budget{Containers: max(0, int(t.credit)), Bytes: -1}})
	t.must(w, err, "a question")
	if t.feasible(plan) && t.carryOut(w, plan) {
		ok, _ := t.s.Survives()
		t.mending = !ok
	}
}
