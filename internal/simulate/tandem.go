package simulate

import (
	"slices"

	"tandem/internal/planner"
)

// How the main policy asks the planner; the controllers' own habits.
const (
	tandemScan = Time(20 * 1000)  // between two looks at what is idle or waits
	tandemFold = Time(120 * 1000) // between two questions what could be folded
	tandemIdle = Time(0)          // an empty machine is kept that long
	spareHosts = 4                // powered-off hosts that the planner is told of
	maxCredit  = 1000             // moves saved up at most
	// tandemLeave is the part of what is on that may be unused without anything
	// being moved for it: load comes back. Less of it was measured to need more
	// moves and more hosts.
	tandemLeave = 0.08
	// tandemRoom is the largest machine that leaves to make room for others.
	tandemRoom = int64(64) << 30
	// spendable is the part of the budget of moves that each arrival brings; the
	// rest is for what was saved up before the warm-up ended and is spent after it.
	spendable = 0.98
	// tandemSettle is how long nothing must have come to a machine that is folded:
	// most of what is young ends by itself.
	tandemSettle = Time(1800 * 1000)
)

// tandem is Tandem itself: the real planner, asked at each event as the
// controllers ask it, its plans carried out on the simulated world with the times
// that they take. The planner's state is what shall be; what is follows step by
// step (see carryOut).
type tandem struct {
	s        *planner.State
	o        *Options
	machines map[string]*Machine // by the planner's name
	names    map[*Machine]string
	all      map[string]*Container
	place    map[string]string // where the planner has a container
	known    map[string]Offer  // hosts that the planner knows of
	off      int               // of those, switched off
	todo     []step            // committed, not done yet
	pending  []string          // containers without a place, in the order of asking
	empty    map[string]Time   // machines, since when
	losing   []*Container      // of the host that has just failed
	booted   int
	credit   float64 // moves that the budget allows now
	fold     Time    // the next question what could be folded

	flights map[string]*flight // machines that migrate, by the planner's name
	newest  map[string]Time    // when something came to a machine last
	rooming bool               // the plan makes room
	lacking map[string]Time    // groups for which no neighbour could leave, until when
	asked   Size               // sum of what arrived
	arrived int64

	mending bool // a host failed, and the guarantee is not whole again
}

func newTandem(o *Options) *tandem {
	t := &tandem{s: planner.New(), o: o, machines: map[string]*Machine{}, names: map[*Machine]string{}, all: map[string]*Container{},
		place: map[string]string{}, known: map[string]Offer{}, empty: map[string]Time{},
		flights: map[string]*flight{}, newest: map[string]Time{}, lacking: map[string]Time{}}
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
	t.landed(w)
	t.proceed(w)
	switch e.Kind {
	case Arrived:
		t.credit = min(t.credit+spendable*t.o.Budget/1000, maxCredit)
		decided = t.arrive(w, e.Container)
		w.Wake((w.Now()/tandemScan + 1) * tandemScan)
	case Left:
		decided = t.left(w, e)
	case HostLost:
		decided = t.lost(w, e)
	case Tick:
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
	if t.off >= spareHosts {
		return
	}
	for _, o := range w.Offers(2*spareHosts + len(t.todo)) {
		if _, ok := t.known[o.ID]; !ok && t.off < spareHosts*len(w.pools) {
			t.known[o.ID] = o
			t.off++
			t.tell(w, o, true, false)
		}
	}
}

// tell tells the planner of a host; one that is busy takes nothing new.
func (t *tandem) tell(w *World, o Offer, off, busy bool) {
	t.must(w, t.s.SetHost(planner.Host{ID: o.ID, Zone: o.Zone, Capacity: planner.Size(o.Size), GuestExtra: planner.Size(w.Overhead), Base: planner.Size(w.Overhead), Off: off, Cordoned: busy,
		Capabilities: planner.Capabilities{Grow: true, Shrink: true, CPUStep: 1, MemoryStep: 1, BootSeconds: w.boot.Seconds(), GrowSeconds: w.grow.Seconds(),
			MoveSecondsGiB: float64(1<<30) / float64(w.migrateRate), PowerOnSeconds: w.hostBoot.Seconds()}}), "host "+o.ID)
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
	t.asked, t.arrived = t.asked.add(c.Need), t.arrived+1
	n := t.ask(w, []string{c.ID})
	t.roomFor(w, c)
	return n
}

// ask asks for places, and remembers what has none.
func (t *tandem) ask(w *World, ids []string) int {
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
	return t.ask(w, ids)
}

// left takes a container out of the books, and gives back at once what has become
// free in its machine.
func (t *tandem) left(w *World, e Event) int {
	id := e.Container.ID
	at := t.place[id]
	delete(t.all, id)
	delete(t.place, id)
	t.s.RemoveContainer(id)
	t.forget(func(a *planner.Action) bool { return a.Container == id })
	t.pending = slices.DeleteFunc(t.pending, func(p string) bool { return p == id })
	if e.Machine != nil {
		t.noteEmpty(w, e.Machine)
	}
	if at != "" {
		q := planner.Trim{Shrink: true, Only: []string{at}}
		if m := e.Machine; tandemIdle == 0 && m != nil && t.names[m] == at && len(m.Containers)+m.leaving == 0 {
			q.Idle = q.Only
		}
		plan, err := t.s.Decide(planner.Question{Trim: &q})
		t.must(w, err, "a question")
		t.carryOut(w, plan)
	}
	if e.Machine != nil && len(e.Machine.Host.Machines) == 0 {
		t.consolidate(w)
	}
	return t.retry(w)
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
	if w.Now() >= t.fold && len(t.todo) == 0 {
		t.fold = w.Now() + tandemFold
		q.Leave = tandemLeave
		q.Budget = t.budget(w)
		if t.o.Budget < 0 {
			q.Leave = 0
		}
		defer t.foldMachines(w)
	} else if !slices.ContainsFunc(w.Hosts(), func(h *Host) bool { return len(h.Machines) == 0 }) {
		return
	}
	plan, err := t.s.Decide(planner.Question{Consolidate: &q})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
}

// lost brings a failed host's load to other hosts.
func (t *tandem) lost(w *World, e Event) int {
	id := e.Host.ID
	t.losing = e.Lost
	t.stranded(w, id)
	t.forget(func(a *planner.Action) bool { // the planner decides anew about it
		m := t.machines[a.Machine]
		return a.Host == id || m != nil && m.Gone && a.Kind != planner.Place && a.Kind != planner.Move
	})
	t.offer(w)
	plan, err := t.s.Decide(planner.Question{HostLost: []string{id}})
	t.must(w, err, "a question")
	if !t.carryOut(w, plan) {
		plan = &planner.Plan{}
	}
	t.s.RemoveHost(id)
	delete(t.known, id)
	t.sweep(w, id)
	t.losing = nil
	t.proceed(w)
	t.retry(w)
	t.mending = true
	t.mend(w)
	return len(e.Lost)
}

// sweep compares, after a failure, where the planner has containers with where
// they are: machines that don't start again are forgotten, and what is nowhere
// and has no machine to go to asks for a place.
func (t *tandem) sweep(w *World, host string) {
	starts := map[string]bool{}
	brought := map[string]bool{}
	for _, s := range t.todo {
		switch s.Kind {
		case planner.Restart, planner.Boot:
			starts[s.Machine] = true
		case planner.Place, planner.Move:
			brought[s.Container] = true
		}
	}
	var dead []string
	for id, m := range t.machines {
		if m.Gone && !starts[id] {
			dead = append(dead, id)
		}
	}
	for _, id := range dead {
		delete(t.names, t.machines[id])
		delete(t.machines, id)
		delete(t.empty, id)
		delete(t.newest, id)
	}
	t.forget(func(a *planner.Action) bool { return slices.Contains(dead, a.Machine) })
	for _, c := range t.losing {
		at := t.place[c.ID]
		switch {
		case c.Done || c.Machine != nil:
		case at == "" || t.machines[at] == nil && !starts[at]:
			delete(t.place, c.ID)
			t.wait(c.ID)
		case !brought[c.ID]:
			a := planner.Action{Kind: planner.Place, Container: c.ID, Machine: at}
			t.todo = append(t.todo, step{a, keys(&a)})
		}
	}
}

// mend asks, after a failure, for what brings the guarantee back.
func (t *tandem) mend(w *World) {
	if !t.mending || len(t.todo) > 0 {
		return
	}
	t.offer(w)
	plan, err := t.s.Decide(planner.Question{Rebalance: &planner.Budget{Containers: max(0, t.budget(w).Containers), Bytes: -1}})
	t.must(w, err, "a question")
	if t.carryOut(w, plan) {
		ok, _ := t.s.Survives()
		t.mending = !ok
	}
}
