package planner

import (
	"cmp"
	"fmt"
	"slices"
)

// hostLost answers where what ran on lost hosts starts again: whole machines on
// their standby hosts where all that was in them stands by there, else their
// containers, by themselves. Latency work comes first.
func (s *State) hostLost(ids []string) (*Plan, error) {
	hosts, err := s.named(ids)
	if err != nil {
		return nil, err
	}
	d := s.decision()
	d.relaxed, d.evict = true, s.policy.Evict
	defer d.back()
	for _, h := range hosts {
		was := h.Down
		set := func(v bool) {
			s.unindexHost(h)
			h.Down = v
			s.indexHost(h)
		}
		set(true)
		d.undo.note(func() {}, func() { set(was) }) // the caller says so himself
	}
	var machines []*machine
	var loose []*container
	for _, h := range hosts {
		machines = append(machines, h.machines...)
		loose = append(loose, h.metal.members...)
	}
	slices.SortFunc(machines, func(x, y *machine) int {
		return cmp.Or(cmp.Compare(x.class(), y.class()), cmp.Compare(y.sum.Memory, x.sum.Memory), cmp.Compare(x.ID, y.ID))
	})
	var split []*machine
	for _, m := range machines {
		if len(m.in.members) == 0 && !m.Pinned {
			continue // nothing to start
		}
		if !d.restart(m) {
			split = append(split, m)
		}
	}
	for _, m := range split {
		d.scatter(m)
	}
	slices.SortFunc(loose, func(x, y *container) int {
		return cmp.Or(cmp.Compare(x.Class, y.Class), cmp.Compare(y.need.Memory, x.need.Memory), cmp.Compare(x.ID, y.ID))
	})
	for _, c := range loose {
		d.again(c)
	}
	return d.plan(), nil
}

func (s *State) named(ids []string) ([]*host, error) {
	var hosts []*host
	for _, id := range slices.Compact(slices.Sorted(slices.Values(ids))) {
		h := s.hosts[id]
		if h == nil {
			return nil, fmt.Errorf("host %q is not known", id)
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

func (m *machine) class() Class {
	for _, c := range m.in.members {
		if c.Class == Latency {
			return Latency
		}
	}
	return Batch
}

// restart starts m on the host where all of it stands by, or on any that takes it.
func (d *decision) restart(m *machine) bool {
	s := d.s
	from, size := m.host, m.Size
	var first *host
	for i, c := range m.in.members {
		var g *host
		for _, x := range c.standby {
			if x != nil && x.takes() {
				g = x
				break
			}
		}
		if i == 0 {
			first = g
		} else if g != first {
			first = nil
		}
	}
	try := func(g *host, why string) bool {
		to := bootSize(g, m.sum)
		if m.Pinned || len(m.in.members) == 0 {
			to = to.max(size)
		}
		to = to.max(m.Min)
		if x := d.migrateRules(m, g, to, true); !x.ok() {
			return false
		}
		k := d.mark()
		if !d.migrate(m, g, to) || !s.fitsNow(g) {
			d.reset(k)
			return false
		}
		d.actions = append(d.actions, Action{Kind: Restart, Machine: m.ID, Host: g.ID, FromHost: from.ID, From: size, To: to,
			Seconds: g.Capabilities.BootSeconds,
			Reason:  Reason{Summary: fmt.Sprintf("%s was lost: %s starts again on %s, %s, with the %d in it", from.ID, m.ID, g.ID, why, len(m.in.members))}})
		return true
	}
	if first != nil && try(first, "where it stood by") {
		return true
	}
	if first == nil && len(m.in.members) > 0 && s.coveredAll(m) {
		return false // its parts have their places
	}
	for _, t := range d.targets(m, m.Size, true) {
		if try(t.h, "which has room for it") {
			return true
		}
	}
	return false
}

// fitsNow says whether what runs on g fits, whatever g keeps back.
func (s *State) fitsNow(g *host) bool { return (Size{}).fits(g.free()) }

func (s *State) coveredAll(m *machine) bool {
	for _, c := range m.in.members {
		if c.standby[0] == nil {
			return false
		}
	}
	return true
}

// scatter places the containers of a machine that does not start again as a whole.
func (d *decision) scatter(m *machine) {
	list := slices.Clone(m.in.members)
	slices.SortFunc(list, func(x, y *container) int {
		return cmp.Or(cmp.Compare(x.Class, y.Class), cmp.Compare(y.need.CPU, x.need.CPU), cmp.Compare(y.need.Memory, x.need.Memory), cmp.Compare(x.ID, y.ID))
	})
	for _, c := range list {
		d.again(c)
	}
	if len(list) == 0 {
		d.out = append(d.out, Unplaced{Container: m.ID, Remedy: "add a host, or take one back",
			Reason: Reason{Summary: "machine " + m.ID + " starts nowhere: no host has room for " + m.Size.String()}})
	}
}

// again places a container of a lost host: where it stood by, or wherever it fits.
func (d *decision) again(c *container) {
	standby := c.standby
	fromMachine, fromHost := c.Machine, c.Host
	d.remove(c)
	why := fromHost + " was lost"
	for _, g := range standby {
		if g == nil || !g.takes() {
			continue
		}
		k := d.mark()
		d.only = g
		power, evict := d.noPower, d.evict
		d.noPower, d.evict = true, false
		ok := d.decide(c)
		d.only, d.noPower, d.evict = nil, power, evict
		if ok {
			d.came(fromMachine, fromHost, why+", and it stood by here")
			return
		}
		d.reset(k)
	}
	if d.decide(c) {
		d.came(fromMachine, fromHost, why)
	}
}

// came notes where the container of the last action was before.
func (d *decision) came(machine, host, why string) {
	a := &d.actions[len(d.actions)-1]
	a.FromMachine, a.FromHost = machine, host
	a.Reason.Summary = why + ": " + a.Reason.Summary
}
