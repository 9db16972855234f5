package planner

import (
	"cmp"
	"fmt"
	"slices"
)

// remove takes a placed container away in the tentative state, its standby hosts
// too.
func (d *decision) remove(c *container) {
	h, m, standby, exposed := c.host, c.machine, c.standby, c.exposed
	d.s.unplace(c)
	d.undo.note(func() { d.s.unplace(c) }, func() {
		d.s.place(c, h, m)
		for slot, g := range standby {
			if g != nil {
				d.s.stand(c, slot, g)
			}
		}
		d.s.setExposed(c, exposed)
	})
}

// migrate takes a machine with all that is in it to another host in the tentative
// state, in that size; it says whether there is room and the guarantee holds, and
// leaves the rest to the caller's rollback. force takes, if need be, what others keep
// back there.
func (d *decision) migrate(m *machine, h *host, to Size, force bool) bool {
	s := d.s
	inside := slices.Clone(m.in.byID())
	type was struct {
		standby [2]*host
		exposed bool
	}
	before := make([]was, len(inside))
	for i, c := range inside {
		before[i] = was{c.standby, c.exposed}
		s.release(c)
	}
	old, size, ceiling := m.host, m.Size, m.Ceiling
	top := ceiling.min(h.top).max(to)
	s.rehost(m, inside, h, to, top)
	d.undo.note(func() {
		for _, c := range inside {
			s.release(c)
		}
		s.rehost(m, inside, h, to, top)
	}, func() {
		for _, c := range inside {
			s.release(c)
		}
		s.rehost(m, inside, old, size, ceiling)
		for i, c := range inside {
			for slot, g := range before[i].standby {
				if g != nil {
					s.stand(c, slot, g)
				}
			}
			s.setExposed(c, before[i].exposed)
		}
	})
	if !h.reserve.fits(h.free()) && !(force && d.takeReserve(h, Size{})) {
		return false
	}
	for _, c := range inside {
		if !s.secure(c, &d.undo) && !d.relaxed {
			return false
		}
	}
	return true
}

// rehost is the primitive change of a machine's host; its containers stand by nowhere.
func (s *State) rehost(m *machine, inside []*container, h *host, size, ceiling Size) {
	s.dropMachine(m)
	m.Host, m.Size, m.Ceiling = h.ID, size, ceiling
	s.addMachine(m)
	for _, c := range inside {
		s.place(c, h, m)
	}
}

// migrateRules checks whether m may go to h in that size. restart says that it does
// not run any more, and the back end needs no live migration.
func (d *decision) migrateRules(m *machine, h *host, to Size, restart bool) miss {
	if x := migrateRoom(m, h, to, restart); !x.ok() || h.takes() && d.s.easyAll(m) {
		return x
	}
	return d.s.migrateCompany(m, h)
}

// easyAll says whether only room matters to all that is in m.
func (s *State) easyAll(m *machine) bool {
	for _, c := range m.in.members {
		if !s.easy(c) {
			return false
		}
	}
	return true
}

// migrateRoom checks what depends on sizes and back ends.
func migrateRoom(m *machine, h *host, to Size, restart bool) miss {
	switch {
	case h == m.host:
		return miss{rule: RuleHost, detail: "has it"}
	case !restart && (m.host.Capabilities.MoveSecondsGiB <= 0 || h.Capabilities.MoveSecondsGiB <= 0):
		return miss{rule: RuleCapability, detail: "can't migrate running machines"}
	case !m.used().sub(m.host.GuestExtra).add(h.GuestExtra).fits(to):
		return miss{rule: RuleCapability, detail: "has larger guest overheads"}
	case !to.fits(h.top):
		return miss{rule: RuleCeiling, detail: "makes no machine as large as " + to.String()}
	case !to.add(h.MachineExtra).fits(h.free()):
		return capacityMiss(to.add(h.MachineExtra).shortOf(h.free()))
	}
	return miss{}
}

// migrateCompany checks what depends on the containers in m.
func (s *State) migrateCompany(m *machine, h *host) miss {
	for _, c := range m.in.byID() {
		if x := s.hostRules(c, h); !x.ok() {
			return x
		}
		if x := s.residentRule(c, h); !x.ok() {
			return x
		}
	}
	// Two of them may bear others on h, and not both.
	for _, o := range h.all.anti {
		for _, r := range o.Anti {
			k := serviceKey{o.Project, r.Service}
			if r.Layer == "host" && m.in.count(k) > 0 && besides(o, &h.all, k)+m.in.count(k) > r.Max {
				return miss{rule: RuleAnti, detail: fmt.Sprintf("runs %s, which allows at most %d of %s", o.ID, r.Max, r.Service)}
			}
		}
	}
	for _, c := range m.in.byID() {
		for _, r := range c.Anti {
			k := serviceKey{c.Project, r.Service}
			if r.Layer == "host" && h.all.count(k)+besides(c, &m.in, k) > r.Max {
				return miss{rule: RuleAnti, detail: fmt.Sprintf("runs %s, of which %s allows at most %d", r.Service, c.ID, r.Max)}
			}
			if r.Layer == "zone" && m.host.Zone != h.Zone {
				return miss{rule: RuleAnti, detail: "is in another zone, which " + c.ID + " has rules about"}
			}
		}
		for _, v := range c.Volumes {
			if s.volumes[v] != "" && s.volumes[v] != h.ID {
				return miss{rule: RuleVolume, detail: "has no volume " + v}
			}
		}
	}
	return miss{}
}

// mark is a point to which a decision can go back.
type mark struct{ undo, actions, out int }

func (d *decision) mark() mark { return mark{len(d.undo), len(d.actions), len(d.out)} }

func (d *decision) reset(k mark) {
	d.s.rollback(&d.undo, k.undo)
	d.actions, d.out = d.actions[:k.actions], d.out[:k.out]
	for m, i := range d.at {
		if i >= k.actions {
			delete(d.at, m)
		} else {
			d.actions[i].To = m.Size
		}
	}
}

// budget counts what a plan has spent.
type budget struct {
	Budget
	spent Budget
}

func (b *budget) allows(containers, machines int, bytes int64) bool {
	within := func(spent, more, limit int64) bool { return limit < 0 || spent+more <= limit }
	return within(int64(b.spent.Containers), int64(containers), int64(b.Containers)) &&
		within(int64(b.spent.Machines), int64(machines), int64(b.Machines)) &&
		within(b.spent.Bytes, bytes, b.Bytes)
}

func (b *budget) spend(containers, machines int, bytes int64) {
	b.spent.Containers += containers
	b.spent.Machines += machines
	b.spent.Bytes += bytes
}

var unlimited = Budget{-1, -1, -1}

// clear empties h: its machines are migrated or their containers moved, whichever
// disturbs less, within b. It says whether h runs nothing afterwards; what did not
// work out is in d.out with the reason. The caller resets when it wants all or nothing.
func (d *decision) clear(h *host, b *budget, why string) bool {
	was := d.not
	d.not = h
	defer func() { d.not = was }()
	machines := slices.Clone(h.machines)
	slices.SortFunc(machines, func(x, y *machine) int {
		return cmp.Or(cmp.Compare(y.sum.CPU, x.sum.CPU), cmp.Compare(y.sum.Memory, x.sum.Memory), cmp.Compare(x.ID, y.ID))
	})
	all := true
	for _, m := range machines {
		if len(m.in.members) == 0 && !m.Pinned {
			if !m.Stopping {
				d.stop(m, why)
			}
			continue
		}
		if m.Stopping && !d.relaxed {
			return false // it is on its way somewhere else
		}
		if d.migrateAway(m, b, why) { // nothing restarts
			continue
		}
		k := d.mark()
		spent := b.spent
		if d.moveAll(m.in.byID(), b, why) && !m.Pinned {
			d.stop(m, why)
			continue
		}
		if d.relaxed { // as much as can be done, and the rest named
			all = false
			if m.Pinned && len(m.in.members) == 0 {
				d.stays(m.ID, m)
			}
			continue
		}
		failed := slices.Clone(d.out[k.out:])
		d.reset(k)
		b.spent = spent
		d.out = append(d.out, failed...)
		if len(failed) == 0 {
			for _, c := range m.in.byID() {
				d.stays(c.ID, m)
			}
		}
		return false
	}
	if !d.moveAll(h.metal.byID(), b, why) {
		all = false
	}
	return all
}

// stays says that a container, or a machine by its id, can't leave.
func (d *decision) stays(id string, m *machine) {
	in := "on its host"
	if m != nil && id != m.ID {
		in = "in " + m.ID
	}
	d.out = append(d.out, Unplaced{Container: id, Remedy: "stop it, let its host migrate machines, or add a host",
		Reason: Reason{Summary: id + " stays " + in + ": no host takes the machine while it runs, and it may not run twice or the budget is spent"}})
}

// moveAll moves containers by start-before-stop, the large first; all or it says no.
func (d *decision) moveAll(members []*container, b *budget, why string) bool {
	list := slices.Clone(members)
	slices.SortFunc(list, func(x, y *container) int {
		return cmp.Or(cmp.Compare(y.need.CPU, x.need.CPU), cmp.Compare(y.need.Memory, x.need.Memory), cmp.Compare(x.ID, y.ID))
	})
	all := true
	for _, c := range list {
		if c.Stateful || len(c.Volumes) > 0 || !b.allows(1, 0, 0) {
			all = false
			if !d.relaxed {
				return false
			}
			d.stays(c.ID, c.machine)
			continue
		}
		k := d.mark()
		if !d.move(c, why) {
			failed := slices.Clone(d.out[k.out:])
			d.reset(k)
			if !d.swap(c, b, why) {
				all = false
				d.out = append(d.out, failed...)
				if !d.relaxed {
					return false
				}
				continue
			}
		}
		b.spend(1, 0, 0)
	}
	return all
}

// move places c anew and turns what comes of it into a Move.
func (d *decision) move(c *container, why string) bool {
	fromMachine, fromHost := c.machineID(), c.hostID()
	d.remove(c)
	power, evict := d.noPower, d.evict
	d.noPower, d.evict = true, false
	ok := d.decide(c)
	d.noPower, d.evict = power, evict
	if !ok {
		return false
	}
	a := &d.actions[len(d.actions)-1]
	a.Kind, a.FromMachine, a.FromHost, a.Bytes = Move, fromMachine, fromHost, c.need.Memory
	a.Reason.Summary = why + ": " + a.Reason.Summary
	return true
}

// swap moves c into the place of a smaller container that finds another one.
func (d *decision) swap(c *container, b *budget, why string) bool {
	g := d.s.groups[groupOf(c.Isolation, c.Project)]
	if g == nil || d.nor != nil || c.need.CPU < 4 || !b.allows(2, 0, 0) {
		return false
	}
	defer func() { d.nor = nil }()
	type pair struct {
		m *machine
		y *container
	}
	var pairs []pair
	looked := 0
	most := Size{c.need.CPU / 2, c.need.Memory / 2}
	g.room.roomiest(c.need.sub(most), func(m *machine) bool {
		if short := c.need.shortOf(m.room()); m.host != d.not && !short.zero() && short.fits(most) {
			if y := m.smallest(short, most); y != nil {
				pairs = append(pairs, pair{m, y})
			}
		}
		looked++
		return looked < maxExamined && len(pairs) < maxSecured
	})
	for _, p := range pairs {
		if !b.allows(2, 0, 0) {
			continue
		}
		k := d.mark()
		d.nor = p.m.host
		if d.move(p.y, why+", in favour of "+c.ID) {
			d.nor = nil
			if d.move(c, why) {
				b.spend(1, 0, 0)
				return true
			}
		}
		d.nor = nil
		d.reset(k)
	}
	return false
}

// smallest is the smallest container in m that may move and frees what is short.
func (m *machine) smallest(short, most Size) *container {
	var best *container
	for _, y := range m.in.byID() {
		if y.Stateful || len(y.Volumes) > 0 || y.ruled() || !short.fits(y.need) || !y.need.fits(most) {
			continue
		}
		if best == nil || y.need.CPU < best.need.CPU || y.need.CPU == best.need.CPU && y.need.Memory < best.need.Memory {
			best = y
		}
	}
	return best
}

// stop stops a machine that holds nothing any more.
func (d *decision) stop(m *machine, why string) {
	was := m.Stopping
	d.stopping(m, true)
	d.undo.note(func() { d.stopping(m, true) }, func() { d.stopping(m, was) })
	d.actions = append(d.actions, Action{Kind: Stop, Machine: m.ID, Host: m.Host, From: m.Size,
		Reason: Reason{Summary: fmt.Sprintf("%s: %s holds nothing any more; stopping it frees %s on %s", why, m.ID, m.Size.add(m.host.MachineExtra), m.Host)}})
}

// migrateAway migrates m to the fullest host that takes it.
func (d *decision) migrateAway(m *machine, b *budget, why string) bool {
	if !b.allows(0, 1, m.Size.Memory) {
		return false
	}
	from, size := m.host, m.Size
	k := d.mark()
	f := &finder{d: d}
	found := d.targets(f, m, func(*host) Size { return size }, false)
	for i, o := range found {
		if d.migrate(m, o.h, size, true) {
			r := f.targetReason(m, found, i)
			r.Summary = fmt.Sprintf("%s: %s goes to %s while it runs, with the %d in it", why, m.ID, o.h.ID, len(m.in.members))
			b.spend(0, 1, size.Memory)
			if d.reached == nil {
				d.reached = map[*host]bool{}
			}
			d.reached[o.h] = true
			d.actions = append(d.actions, Action{Kind: Migrate, Machine: m.ID, Host: o.h.ID, FromHost: from.ID, From: size, To: size, Bytes: size.Memory,
				Seconds: from.Capabilities.MoveSecondsGiB * float64(size.Memory) / gib, Cost: o.cost, Reason: r})
			return true
		}
		d.reset(k)
	}
	return false
}

// target is a host that would take a machine.
type target struct {
	h    *host
	cost float64
}

// targets is the hosts that take m in the size that it gets there, cheapest first, at
// most maxSecured. f takes why others don't.
func (d *decision) targets(f *finder, m *machine, size func(*host) Size, restart bool) []target {
	s := d.s
	var out []target
	looked, easy := 0, s.easyAll(m)
	s.open.fitting(m.sum, func(h *host) bool {
		if h == d.not || h == m.host || !d.relaxed && !restart && h.hasOf(m.group) {
			return true // two machines of a group side by side are one too many
		}
		looked++
		to := size(h)
		var x miss
		if whole := to.add(h.MachineExtra); !whole.fits(h.avail()) {
			x = hostMiss(whole, h)
		} else if x = migrateRoom(m, h, to, restart); x.ok() && !easy {
			x = s.migrateCompany(m, h)
		}
		if !x.ok() {
			f.turnedAway("host", h.ID, x, 1)
			return looked < maxExamined || len(out) == 0
		}
		left := h.idle().sub(m.used()).sub(h.MachineExtra)
		cpu, mem := share(left.CPU, h.Capacity.CPU), share(left.Memory, h.Capacity.Memory)
		t := target{h: h, cost: WeightFit*(cpu*cpu+mem*mem)/2 + WeightMoveGiB*float64(m.Size.Memory)/gib}
		if d.switchable() {
			t.cost += WeightSparse * decay(len(h.all.members))
		}
		at := len(out)
		for at > 0 && t.cost < out[at-1].cost {
			at--
		}
		if at < maxSecured {
			out = slices.Insert(out, at, t)
			out = out[:min(len(out), maxSecured)]
		}
		return looked < maxExamined
	})
	return out
}

// hasOf says whether h has a machine of g.
func (h *host) hasOf(g *group) bool {
	return slices.ContainsFunc(h.machines, func(m *machine) bool { return m.group == g })
}

// targetReason gives number i of the targets of m its reason.
func (f *finder) targetReason(m *machine, out []target, i int) Reason {
	var r Reason
	r.Exclusions, _ = f.list(nil)
	for j, t := range out[:min(len(out), maxOptions)] {
		r.Options = append(r.Options, Option{Action: string(Migrate), Machine: m.ID, Host: t.h.ID, Cost: t.cost, Chosen: j == i})
	}
	return r
}
