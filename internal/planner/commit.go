package planner

import (
	"errors"
	"fmt"
)

// ErrStale is returned by Commit when the state changed in what the plan relies
// on: decide again.
var ErrStale = errors.New("the plan is stale: what it relies on has changed; plan again")

// Commit applies a plan: boots, growth, shrinkage and placements become part of
// the state; a machine to be stopped is marked Stopping and holds its size until
// RemoveMachine. rename gives booted machines their names ("new-1" -> "m-7");
// those without one keep theirs. A plan of an older revision is applied if every
// step still keeps all rules, else nothing is and the error wraps ErrStale.
func (s *State) Commit(p *Plan, rename map[string]string) error {
	d := &decision{s: s}
	for i := range p.Actions {
		if err := d.commit(&p.Actions[i], rename); err != nil {
			for j := len(d.undo) - 1; j >= 0; j-- {
				d.undo[j]()
			}
			return err
		}
	}
	for _, a := range p.Actions {
		if a.Kind == Boot { // from now on it is like any other
			m := s.machines[named(a.Machine, rename)]
			s.unindexMachine(m)
			m.fresh = false
			s.indexMachine(m)
		}
	}
	if len(p.Actions) > 0 {
		s.rev++
	}
	return nil
}

func named(id string, rename map[string]string) string {
	if n, ok := rename[id]; ok {
		return n
	}
	return id
}

func (d *decision) commit(a *Action, rename map[string]string) error {
	s := d.s
	stale := func(format string, args ...any) error {
		return fmt.Errorf("%s of %s%s: %s: %w", a.Kind, a.Container, a.Machine, fmt.Sprintf(format, args...), ErrStale)
	}
	id := named(a.Machine, rename)
	h := s.hosts[a.Host]
	if h == nil {
		return stale("host %s is gone", a.Host)
	}
	m := s.machines[id]
	switch a.Kind {
	case Boot:
		if m != nil {
			return fmt.Errorf("boot of %s: a machine of that name exists; pass another one in rename", id)
		}
		if !h.takes() || !a.To.add(h.MachineExtra).fits(h.free()) {
			return stale("%s has no room for it", h.ID)
		}
		m = &machine{fresh: true, Machine: Machine{ID: id, Host: h.ID, Project: a.Project, Isolation: a.Isolation, Size: a.To, Ceiling: a.Ceiling.max(a.To)}}
		s.addMachine(m)
		d.undo = append(d.undo, func() { s.dropMachine(m) })
		return nil
	case PlaceM:
		c := s.containers[a.Container]
		if c == nil || c.host != nil {
			return stale("the container is gone or placed")
		}
		if x := s.metalRules(c, h); !x.ok() {
			return stale("%s (%s)", h.ID, x.rule)
		}
		d.apply(c, &candidate{kind: PlaceM, host: h})
		return nil
	}
	if m == nil || m.host != h {
		return stale("the machine is gone from %s", h.ID)
	}
	switch a.Kind {
	case Place:
		c := s.containers[a.Container]
		if c == nil || c.host != nil {
			return stale("the container is gone or placed")
		}
		if !c.need.fits(m.free()) {
			return stale("%s has no free slot", m.ID)
		}
		if x := s.machineRules(c, m); !x.ok() {
			return stale("%s (%s)", m.ID, x.rule)
		}
		d.apply(c, &candidate{kind: Place, host: h, machine: m})
	case Grow:
		if m.Size != a.From || !m.takes() || !h.Capabilities.Grow || !a.To.fits(m.Ceiling) || !a.To.sub(a.From).fits(h.free()) {
			return stale("it can't grow to %s", a.To)
		}
		d.size(m, a.To)
	case Shrink:
		if m.Size != a.From || !h.Capabilities.Shrink || !m.used().fits(a.To) {
			return stale("it can't shrink to %s", a.To)
		}
		d.size(m, a.To)
	case Stop:
		if len(m.in.members) > 0 {
			return stale("it is not empty")
		}
		was := m.Stopping
		d.stopping(m, true)
		d.undo = append(d.undo, func() { d.stopping(m, was) })
	default:
		return fmt.Errorf("plan with an action %q that this planner does not know", a.Kind)
	}
	return nil
}

func (d *decision) size(m *machine, to Size) {
	from := m.Size
	d.s.resize(m, to)
	d.undo = append(d.undo, func() { d.s.resize(m, from) })
}

func (d *decision) stopping(m *machine, v bool) {
	d.s.unindexMachine(m)
	m.Stopping = v
	d.s.indexMachine(m)
}
