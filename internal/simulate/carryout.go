package simulate

import (
	"errors"
	"fmt"
	"slices"

	"tandem/internal/planner"
)

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
	last := map[string]int{} // a container may move on within a plan: it goes straight there
	for i := range plan.Actions {
		if plan.Actions[i].Kind == planner.Move {
			last[plan.Actions[i].Container] = i
		}
	}
	var stopped []string
	for i := range plan.Actions {
		if a := &plan.Actions[i]; a.Kind != planner.Move || last[a.Container] == i {
			t.act(w, a, rename, &stopped)
		} else if m := t.machine(w, a.Machine, rename); !slices.Contains(t.busy, m) {
			t.busy = append(t.busy, m)
		}
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
