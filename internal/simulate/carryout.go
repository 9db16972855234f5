package simulate

import (
	"errors"
	"fmt"
	"slices"

	"tandem/internal/planner"
)

// step is an action of a plan that is committed, and perhaps not done yet.
type step struct {
	planner.Action
	keys []string // of what it touches: steps that share one are done in order
}

// carryOut commits a plan and does its actions, or what can be done of them now:
// the planner sees the end at once, the world goes there step by step. It says
// whether the plan was taken.
func (t *tandem) carryOut(w *World, p *planner.Plan) bool {
	if len(p.Actions) == 0 {
		return true
	}
	rename := map[string]string{}
	for i := range p.Actions {
		if a := &p.Actions[i]; a.Kind == planner.Boot {
			t.booted++
			rename[a.Machine] = fmt.Sprintf("m-%06d", t.booted)
		}
	}
	if err := t.s.Commit(p, rename); errors.Is(err, planner.ErrStale) {
		return false
	} else if err != nil {
		t.must(w, err, "its own plan")
	}
	for i := range p.Actions {
		a := p.Actions[i]
		if n, ok := rename[a.Machine]; ok {
			a.Machine = n
		}
		if n, ok := rename[a.FromMachine]; ok {
			a.FromMachine = n
		}
		t.note(w, &a)
		t.todo = append(t.todo, step{a, keys(&a)})
		if a.Kind == planner.Restart {
			for _, c := range t.losing {
				if t.place[c.ID] == a.Machine {
					b := planner.Action{Kind: planner.Place, Container: c.ID, Machine: a.Machine}
					t.todo = append(t.todo, step{b, keys(&b)})
				}
			}
		}
	}
	t.proceed(w)
	return true
}

// note keeps what the planner takes for true from now on.
func (t *tandem) note(w *World, a *planner.Action) {
	switch a.Kind {
	case planner.Place, planner.Move:
		t.place[a.Container] = a.Machine
		t.newest[a.Machine] = w.Now()
	case planner.Migrate:
		t.flies(w, a)
	case planner.Evict:
		delete(t.place, a.Container)
		t.wait(a.Container)
	case planner.PowerOn:
		t.off--
	case planner.PowerOff:
		t.tell(w, t.known[a.Host], true, true) // nobody switches it on before it is off
	case planner.Stop:
		delete(t.empty, a.Machine)
		delete(t.newest, a.Machine)
		t.s.RemoveMachine(a.Machine)
	}
}

// keys names what a step touches. Steps that need room on a host are done in
// order, so that later ones don't take it from earlier ones.
func keys(a *planner.Action) []string {
	var k []string
	if a.Container != "" {
		k = append(k, "container "+a.Container)
	}
	if a.Machine != "" {
		k = append(k, "machine "+a.Machine)
	}
	if a.FromMachine != "" {
		k = append(k, "machine "+a.FromMachine)
	}
	switch a.Kind {
	case planner.Boot, planner.Grow, planner.Migrate, planner.Restart, planner.PowerOn, planner.PowerOff:
		k = append(k, "host "+a.Host)
	}
	return k
}

// proceed does the steps whose time has come.
func (t *tandem) proceed(w *World) {
	for progress := true; progress && len(t.todo) > 0; {
		progress = false
		var blocked map[string]bool
		rest := t.todo[:0]
		for _, s := range t.todo {
			if !slices.ContainsFunc(s.keys, func(k string) bool { return blocked[k] }) && t.act(w, &s.Action) {
				progress = true
				continue
			}
			if blocked == nil {
				blocked = map[string]bool{}
			}
			for _, k := range s.keys {
				blocked[k] = true
			}
			rest = append(rest, s)
		}
		clear(t.todo[len(rest):])
		t.todo = rest
	}
}

// forget drops the steps that are about what is gone.
func (t *tandem) forget(gone func(a *planner.Action) bool) {
	t.todo = slices.DeleteFunc(t.todo, func(s step) bool { return gone(&s.Action) })
}

func (t *tandem) host(w *World, id string) *Host {
	for _, h := range w.Hosts() {
		if h.ID == id {
			return h
		}
	}
	return nil
}

// act does an action if it can be done now, and says whether it is settled.
func (t *tandem) act(w *World, a *planner.Action) bool {
	m := t.machines[a.Machine]
	switch a.Kind {
	case planner.PowerOn:
		if t.host(w, a.Host) != nil {
			return false
		}
		o, ok := t.known[a.Host]
		w.must(ok, "the planner switches on host %q, which nobody has", a.Host)
		w.Accept(o)
	case planner.PowerOff:
		h := t.host(w, a.Host)
		if h == nil || len(h.Machines) > 0 || h.arriving > 0 {
			return h == nil
		}
		w.PowerOff(h)
		t.off++
		t.tell(w, t.known[a.Host], true, false)
	case planner.Boot, planner.Restart:
		return t.boot(w, a)
	case planner.Grow, planner.Shrink:
		w.must(m != nil, "the planner resizes machine %q, which is not there", a.Machine)
		to := Size(a.To)
		if m.Gone || m.target != nil || !m.Used.fits(to) || !to.sub(m.Size).max(Size{}).fits(m.Host.Free().max(Size{})) {
			return false
		}
		w.Resize(m, to)
	case planner.Place, planner.Move:
		return t.bring(w, t.all[a.Container], m)
	case planner.Evict:
		c := t.all[a.Container]
		if c.Machine == nil || c.from != nil {
			return c.Machine == nil
		}
		w.Evict(c)
	case planner.Migrate:
		h := t.host(w, a.Host)
		if m == nil || h == nil || !m.Up || !h.Up || m.target != nil || m.Live != m.Size || !m.Size.fits(h.Free()) {
			return false
		}
		w.Migrate(m, h)
		t.flights[a.Machine].begun = true
	case planner.Stop:
		if m.leaving > 0 || len(m.Containers) > 0 || m.target != nil {
			return false
		}
		w.Stop(m)
		delete(t.machines, a.Machine)
		delete(t.names, m)
	default:
		w.must(false, "the planner answers with an action %q that the simulator does not know", a.Kind)
	}
	return true
}

// boot starts a machine, also again on another host: the planner keeps its name.
func (t *tandem) boot(w *World, a *planner.Action) bool {
	h := t.host(w, a.Host)
	group, own, size := a.Project, a.Isolation == planner.Own, Size(a.To)
	if a.Kind == planner.Restart {
		old := t.machines[a.Machine]
		w.must(old != nil && old.Gone, "the planner restarts machine %q, which is not lost", a.Machine)
		group, own = old.Project, old.Own
		if size == (Size{}) {
			size = old.Size
		}
	} else if w.Isolation == IsolationShared {
		group = ""
	}
	if h == nil || !size.fits(h.Free()) {
		return false
	}
	if old := t.machines[a.Machine]; old != nil {
		delete(t.names, old)
	}
	m := w.Boot(h, group, own, size)
	t.machines[a.Machine], t.names[m] = m, a.Machine
	return true
}

// bring gets a container to a machine, from wherever it is.
func (t *tandem) bring(w *World, c *Container, m *Machine) bool {
	switch {
	case c == nil || c.Done:
		return true // it left meanwhile
	case m == nil:
		return false
	case c.Machine == m:
		return true
	case !c.Need.fits(m.Free()) || m.Own && len(m.Containers)+m.leaving > 0:
		return false
	case c.Machine == nil:
		w.Place(c, m)
	case !c.Running || c.from != nil:
		return false
	default:
		from := c.Machine
		t.credit--
		w.Move(c, m)
		t.noteEmpty(w, from)
	}
	t.noteEmpty(w, m)
	return true
}
