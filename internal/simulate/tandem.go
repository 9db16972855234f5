package simulate

import (
	"errors"
	"fmt"
	"slices"

	"tandem/internal/planner"
)

// How the main policy asks the planner; the controllers' own habits.
const (
	tandemScan = Time(20 * 1000) // between two questions what could be folded
	tandemIdle = Time(30 * 1000) // an empty machine is kept that long
	spareHosts = 4               // powered-off hosts that the planner is told of
	maxCredit  = 500             // moves saved up at most
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

// trim lets machines shrink to what they hold, and stops those empty for long.
func (t *tandem) trim(w *World) {
	q := planner.Trim{Shrink: true}
	for id, since := range t.empty {
		if w.Now()-since >= tandemIdle {
			q.Idle = append(q.Idle, id)
		}
	}
	slices.Sort(q.Idle)
	plan, err := t.s.Decide(planner.Question{Trim: &q})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
}

// consolidate asks what could be folded within the budget, and what be switched off.
func (t *tandem) consolidate(w *World) {
	if len(t.busy) > 0 {
		return // the last one is still under way
	}
	moves := int(t.credit)
	if t.o.Budget < 0 {
		moves = -1
	}
	plan, err := t.s.Decide(planner.Question{Consolidate: &planner.Consolidate{Budget: planner.Budget{Containers: moves, Bytes: -1}, Hosts: 1, PowerOff: true}})
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
	return len(e.Lost)
}

// settle frees for new plans what is not under way any more.
func (t *tandem) settle(w *World) {
	if len(t.busy) == 0 {
		return
	}
	var idle []string
	t.busy = slices.DeleteFunc(t.busy, func(m *Machine) bool {
		if m.Gone {
			return true
		}
		if m.leaving > 0 || m.target != nil {
			return false
		}
		t.must(w, t.s.SetMachine(t.record(w, m)), "machine "+m.ID)
		if t.noteEmpty(w, m); len(m.Containers) == 0 {
			idle = append(idle, t.names[m])
		}
		return true
	})
	if len(idle) > 0 { // they were emptied to be stopped
		plan, err := t.s.Decide(planner.Question{Trim: &planner.Trim{Idle: idle}})
		t.must(w, err, "a question")
		t.carryOut(w, plan)
	}
}

// moved ends a migration: what was kept from the planner meanwhile is freed.
func (t *tandem) moved(w *World, m *Machine, from *Host) {
	if from.Gone || from.arriving > 0 || slices.ContainsFunc(from.Machines, func(o *Machine) bool { return o.target != nil }) {
		return
	}
	t.must(w, t.s.SetHost(t.host(w, from.ID, from.Zone, from.Size, false)), "host "+from.ID)
}

// record is a machine as the planner is to see it.
func (t *tandem) record(w *World, m *Machine) planner.Machine {
	host := m.Host
	if m.target != nil {
		host = m.target
	}
	r := planner.Machine{ID: t.names[m], Host: host.ID, Project: m.Project, Isolation: t.isolation(w), Size: planner.Size(m.Size),
		Ceiling: planner.Size(host.Size), Stopping: m.leaving > 0 || m.target != nil}
	if r.Isolation == planner.Own {
		r.Project = ""
		if len(m.Containers) > 0 {
			r.Project = m.Containers[0].Project
		}
	}
	return r
}

func (t *tandem) find(w *World, id string) *Host {
	for _, h := range w.Hosts() {
		if h.ID == id {
			return h
		}
	}
	o, ok := t.known[id]
	w.must(ok, "the planner acts on host %q, which is not there", id)
	delete(t.known, id)
	return w.Accept(o)
}

func (t *tandem) machine(w *World, id string, rename map[string]string) *Machine {
	if n, ok := rename[id]; ok {
		id = n
	}
	m := t.machines[id]
	w.must(m != nil, "the planner acts on machine %q, which is not there", id)
	return m
}

// carryOut commits a plan and does its actions. Shrinking and stopping where
// something is still leaving has to wait: it is asked for again. It says whether
// the plan was taken.
func (t *tandem) carryOut(w *World, p *planner.Plan) bool {
	if len(p.Actions) == 0 {
		return true
	}
	rename := map[string]string{}
	sources := map[string]bool{}
	plan := planner.Plan{Revision: p.Revision}
	for i := range p.Actions {
		a := &p.Actions[i]
		switch a.Kind {
		case planner.Boot:
			t.booted++
			rename[a.Machine] = fmt.Sprintf("m-%06d", t.booted)
		case planner.Move:
			sources[a.FromMachine] = true
		case planner.Shrink, planner.Stop:
			if m := t.machines[a.Machine]; sources[a.Machine] || m != nil && (m.leaving > 0 || m.target != nil) {
				continue
			}
		case planner.PowerOff:
			continue // see powerOff
		}
		plan.Actions = append(plan.Actions, *a)
	}
	if err := t.s.Commit(&plan, rename); errors.Is(err, planner.ErrStale) {
		return false
	} else if err != nil {
		t.must(w, err, "its own plan")
	}
	var stopped []string
	for i := range plan.Actions {
		t.act(w, &plan.Actions[i], rename, &stopped)
	}
	for _, id := range stopped {
		m := t.machines[id]
		delete(t.machines, id)
		delete(t.names, m)
		delete(t.empty, id)
		t.s.RemoveMachine(id)
	}
	for _, m := range t.busy {
		t.must(w, t.s.SetMachine(t.record(w, m)), "machine "+m.ID)
	}
	t.powerOff(w, p)
	return true
}

// powerOff does what carryOut put off until the stopped machines were gone.
func (t *tandem) powerOff(w *World, p *planner.Plan) {
	for i := range p.Actions {
		if p.Actions[i].Kind != planner.PowerOff {
			continue
		}
		for _, h := range w.Hosts() {
			if h.ID == p.Actions[i].Host && len(h.Machines) == 0 && h.arriving == 0 {
				size, zone := h.Size, h.Zone
				o := Offer{ID: h.ID, Zone: zone, Size: size, pool: h.pool, number: h.number}
				w.PowerOff(h)
				t.known[o.ID] = o
				t.must(w, t.s.SetHost(t.host(w, o.ID, zone, size, true)), "host "+o.ID)
				break
			}
		}
	}
}

// act does one action that is committed.
func (t *tandem) act(w *World, a *planner.Action, rename map[string]string, stopped *[]string) {
	switch a.Kind {
	case planner.PowerOn:
		t.find(w, a.Host)
	case planner.Boot:
		group := a.Project
		if w.Isolation == IsolationShared {
			group = ""
		}
		m := w.Boot(t.find(w, a.Host), group, a.Isolation == planner.Own, Size(a.To))
		id := rename[a.Machine]
		t.machines[id], t.names[m] = m, id
	case planner.Grow, planner.Shrink:
		w.Resize(t.machine(w, a.Machine, rename), Size(a.To))
	case planner.Place:
		m := t.machine(w, a.Machine, rename)
		w.Place(t.all[a.Container], m)
		t.noteEmpty(w, m)
	case planner.Move:
		c, to := t.all[a.Container], t.machine(w, a.Machine, rename)
		from := c.Machine
		w.Move(c, to)
		t.credit--
		t.noteEmpty(w, to)
		if !slices.Contains(t.busy, from) {
			t.busy = append(t.busy, from)
		}
		t.noteEmpty(w, from)
	case planner.Migrate:
		m := t.machine(w, a.Machine, rename)
		t.credit -= float64(len(m.Containers))
		w.Migrate(m, t.find(w, a.Host))
		t.busy = append(t.busy, m)
		h := t.host(w, m.Host.ID, m.Host.Zone, m.Host.Size, false)
		h.Cordoned = true // until the copy here is gone
		t.must(w, t.s.SetHost(h), "host "+h.ID)
	case planner.Restart:
		t.restart(w, a, rename)
	case planner.Evict:
		w.Evict(t.all[a.Container])
		t.pending = append(t.pending, a.Container)
	case planner.Stop:
		m := t.machine(w, a.Machine, rename)
		w.Stop(m)
		*stopped = append(*stopped, t.names[m])
	default:
		w.must(false, "the planner answers with an action %q that the simulator does not know", a.Kind)
	}
}

// restart starts a machine of a failed host again, with all that was in it. The
// planner keeps its name.
func (t *tandem) restart(w *World, a *planner.Action, rename map[string]string) {
	old := t.machine(w, a.Machine, rename)
	size := a.To
	if size == (planner.Size{}) {
		size = planner.Size(old.Size)
	}
	m := w.Boot(t.find(w, a.Host), old.Project, old.Own, Size(size))
	id := t.names[old]
	delete(t.names, old)
	t.machines[id], t.names[m] = m, id
	for _, c := range t.losing {
		if c.lostFrom == old && c.Machine == nil && !c.Done {
			w.Place(c, m)
		}
	}
}
