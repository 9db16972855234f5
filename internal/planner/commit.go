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
	if !s.replay(p, rename) {
		d := &decision{s: s, relaxed: p.Relaxed}
		for i := range p.Actions {
			if err := d.commit(&p.Actions[i], rename); err != nil {
				d.back()
				return err
			}
		}
	}
	for i := range p.Actions {
		if a := &p.Actions[i]; a.Kind == Boot { // from now on it is like any other
			m := s.machines[named(a.Machine, rename)]
			s.unindexMachine(m)
			m.fresh, m.Ceiling = false, a.Ceiling.max(m.Size)
			s.indexMachine(m)
			s.reindexHost(m.host)
		}
	}
	if len(p.Actions) > 0 {
		s.rev++
		s.mend()
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
	if h == nil && a.Kind != Evict {
		return stale("host %s is gone", a.Host)
	}
	m := s.machines[id]
	switch a.Kind {
	case PowerOn:
		if !h.Off {
			return stale("%s is on", h.ID)
		}
		d.power1(h, false)
		return nil
	case PowerOff:
		return d.commitPowerOff(h, stale)
	case Evict:
		c := s.containers[a.Container]
		if c == nil || c.host == nil || c.machineID() != a.FromMachine || c.hostID() != a.FromHost {
			return stale("it is no longer there")
		}
		d.remove(c)
		return nil
	case Move:
		return d.commitMove(a, h, m, stale)
	case Migrate, Restart:
		return d.commitMigrate(a, h, m, stale)
	case Boot:
		if m != nil {
			return fmt.Errorf("boot of %s: a machine of that name exists; pass another one in rename", id)
		}
		if !h.takes() || !s.makeRoom(h, a.To.add(h.MachineExtra), &d.undo) {
			return stale("%s has no room for it", h.ID)
		}
		m = &machine{fresh: true, Machine: Machine{ID: id, Host: h.ID, Project: a.Project, Isolation: a.Isolation, Size: a.To, Ceiling: a.Ceiling.max(a.To)}}
		s.addMachine(m)
		d.undo.note(nil, func() { s.dropMachine(m) })
		return nil
	case PlaceM:
		c := s.containers[a.Container]
		if c != nil && a.FromHost != "" && c.hostID() == a.FromHost && c.machineID() == a.FromMachine {
			d.remove(c) // from a host that was lost
		}
		if c == nil || c.host != nil {
			return stale("the container is gone or placed")
		}
		s.makeRoom(h, c.need, &d.undo)
		if d.relaxed {
			s.makeWay(c, h, &d.undo)
		}
		if x := s.admission(c); !x.ok() {
			return stale("%s", x.detail)
		}
		if x := s.metalRules(c, h); !x.ok() {
			return stale("%s (%s)", h.ID, x.rule)
		}
		d.apply(c, &candidate{kind: PlaceM, host: h})
		return d.commitSecure(c, stale)
	}
	if m == nil || m.host != h {
		return stale("the machine is gone from %s", h.ID)
	}
	switch a.Kind {
	case Place:
		c := s.containers[a.Container]
		if c != nil && a.FromHost != "" && c.hostID() == a.FromHost && c.machineID() == a.FromMachine {
			d.remove(c) // from a host that was lost
		}
		if c == nil || c.host != nil {
			return stale("the container is gone or placed")
		}
		if !c.need.fits(m.free()) {
			return stale("%s has no free slot", m.ID)
		}
		if d.relaxed {
			s.makeWay(c, h, &d.undo)
		}
		if x := s.admission(c); !x.ok() {
			return stale("%s", x.detail)
		}
		if x := s.machineRules(c, m); !x.ok() {
			return stale("%s (%s)", m.ID, x.rule)
		}
		d.apply(c, &candidate{kind: Place, host: h, machine: m})
		return d.commitSecure(c, stale)
	case Grow:
		if m.Size != a.From || !m.takes() || !h.Capabilities.Grow || !a.To.fits(m.Ceiling) || !s.makeRoom(h, a.To.sub(a.From), &d.undo) {
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
		d.undo.note(nil, func() { d.stopping(m, was) })
	default:
		return fmt.Errorf("plan with an action %q that this planner does not know", a.Kind)
	}
	return nil
}

func (d *decision) size(m *machine, to Size) {
	from := m.Size
	d.s.resize(m, to)
	d.undo.step(step{op: opResize, m: m, from: from, to: to})
}

func (d *decision) stopping(m *machine, v bool) {
	d.s.unindexMachine(m)
	m.Stopping = v
	d.s.indexMachine(m)
}

// commitSecure: a plan that was made with the guarantee holds only with it.
func (d *decision) commitSecure(c *container, stale func(string, ...any) error) error {
	if !d.s.secure(c, &d.undo) && !d.relaxed {
		return stale("no other host would have room for it after a loss")
	}
	return nil
}

func (d *decision) commitPowerOff(h *host, stale func(string, ...any) error) error {
	if h.Off || len(h.all.members) > 0 || !h.allStopping() {
		return stale("%s runs something", h.ID)
	}
	d.power1(h, true)
	if !d.s.dismiss(h, &d.undo) {
		return stale("the guarantee needs %s", h.ID)
	}
	return nil
}

func (h *host) allStopping() bool {
	for _, m := range h.machines {
		if !m.Stopping {
			return false
		}
	}
	return true
}

func (d *decision) commitMove(a *Action, h *host, m *machine, stale func(string, ...any) error) error {
	s := d.s
	c := s.containers[a.Container]
	if c == nil || c.machineID() != a.FromMachine || c.hostID() != a.FromHost {
		return stale("it is no longer in %s on %s", a.FromMachine, a.FromHost)
	}
	d.remove(c)
	if a.Machine == "" {
		s.makeRoom(h, c.need, &d.undo)
		if x := s.metalRules(c, h); !x.ok() {
			return stale("%s (%s)", h.ID, x.rule)
		}
		d.apply(c, &candidate{kind: PlaceM, host: h})
		return d.commitSecure(c, stale)
	}
	if m == nil || m.host != h {
		return stale("machine %s is gone from %s", a.Machine, h.ID)
	}
	if !c.need.fits(m.free()) {
		return stale("%s has no free slot", m.ID)
	}
	if x := s.machineRules(c, m); !x.ok() {
		return stale("%s (%s)", m.ID, x.rule)
	}
	d.apply(c, &candidate{kind: Place, host: h, machine: m})
	return d.commitSecure(c, stale)
}

func (d *decision) commitMigrate(a *Action, h *host, m *machine, stale func(string, ...any) error) error {
	if m == nil || m.Host != a.FromHost || m.Size != a.From {
		return stale("the machine is no longer on %s with %s", a.FromHost, a.From)
	}
	if x := d.migrateRules(m, h, a.To, a.Kind == Restart); !x.ok() {
		return stale("%s (%s)", h.ID, x.rule)
	}
	if !d.migrate(m, h, a.To, true) {
		return stale("%s has no room for it that the guarantee allows", h.ID)
	}
	return nil
}
