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
	d.relaxed, d.hurry, d.evict = true, true, s.policy.Evict
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
		loose = append(loose, h.metal.byID()...)
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

// restart starts m again as a whole: on the host where all of it stands by, or on any
// that has room which is kept back for nobody, so that the other hosts keep their
// standby hosts. Only then does it take, where it stands by, what others keep back.
func (d *decision) restart(m *machine) bool {
	first := m.standby()
	if first != nil && d.startOn(m, first, "where it stood by", false) {
		return true
	}
	size := m.restartSize
	if !d.hopeless(m) {
		f := &finder{d: d}
		for _, t := range d.targets(f, m, size, true) {
			if d.startOn(m, t.h, "which has room for it", false) {
				return true
			}
		}
		d.learn(m, f)
	}
	return first != nil && d.startOn(m, first, "where it stood by", true)
}

// standby is the host where all of m stands by; nil: there is none.
func (m *machine) standby() *host {
	var first *host
	for i, c := range m.in.byID() {
		var g *host
		for _, x := range c.standby {
			if x != nil && x.takes() {
				g = x
				break
			}
		}
		if g == nil || i > 0 && g != first {
			return nil
		}
		first = g
	}
	return first
}

// restartSize is the size in which m starts again on g.
func (m *machine) restartSize(g *host) Size {
	to := bootSize(g, m.sum)
	if m.Pinned || len(m.in.members) == 0 {
		to = to.max(m.Size)
	}
	return to.max(m.Min)
}

// startOn starts m again on g; force takes what is kept back there.
func (d *decision) startOn(m *machine, g *host, why string, force bool) bool {
	s, from, size, to := d.s, m.host, m.Size, m.restartSize(g)
	if x := d.migrateRules(m, g, to, true); !x.ok() {
		return false
	}
	if !force && s.policy.HostLosses == 1 {
		// What the other hosts keep there stays: it is not worth a try if that is too much.
		others := g.tops.without(claimAt(from, g)).one
		if !to.add(g.MachineExtra).add(others).fits(g.free()) {
			return false
		}
	}
	k := d.mark()
	if !d.migrate(m, g, to, force) || !s.fitsNow(g) {
		d.reset(k)
		return false
	}
	d.actions = append(d.actions, Action{Kind: Restart, Machine: m.ID, Host: g.ID, FromHost: from.ID, From: size, To: to,
		Seconds: g.Capabilities.BootSeconds,
		Reason:  Reason{Summary: fmt.Sprintf("%s was lost: %s starts again on %s, %s, with the %d in it", from.ID, m.ID, g.ID, why, len(m.in.members))}})
	return true
}

// hopeless says whether a machine that needed no more than m found no host for want
// of room. Room does not come back while a loss is planned.
func (d *decision) hopeless(m *machine) bool {
	return slices.ContainsFunc(d.tooLarge, func(x Size) bool { return x.fits(m.restartNeed()) })
}

func (m *machine) restartNeed() Size {
	if m.Pinned || len(m.in.members) == 0 {
		return m.Size.max(m.Min)
	}
	return m.sum.max(m.Min)
}

// learn keeps that m found no host, if nothing but room was missing.
func (d *decision) learn(m *machine, f *finder) {
	for i := range f.misses {
		switch f.misses[i].rule {
		case RuleCPU, RuleMemory, RuleFailover:
		default:
			return
		}
	}
	if need := m.restartNeed(); len(d.tooLarge) < maxExplained {
		d.tooLarge = append(d.tooLarge, need)
	}
}

// fitsNow says whether what runs on g fits, whatever g keeps back.
func (s *State) fitsNow(g *host) bool { return (Size{}).fits(g.free()) }

// scatter places the containers of a machine that does not start again as a whole.
func (d *decision) scatter(m *machine) {
	list := slices.Clone(m.in.byID())
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

// again places a container of a lost host: where it stood by, whatever others would
// need there after the next loss, or wherever it fits.
func (d *decision) again(c *container) {
	standby := c.standby
	fromMachine, fromHost := c.machineID(), c.hostID()
	d.remove(c)
	why := fromHost + " was lost"
	for _, g := range standby {
		if g == nil || !g.takes() {
			continue
		}
		k := d.mark()
		d.s.makeWay(c, g, &d.undo)
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
