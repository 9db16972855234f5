package planner

import (
	"cmp"
	"fmt"
	"slices"
)

// giveWay makes room for latency work by evicting batch work: on the host where the
// least has to go.
func (d *decision) giveWay(f *finder) bool {
	s, c := d.s, f.c
	hosts := s.batchHosts()
	if only, ok := f.pins(); ok {
		hosts = slices.Clone(only)
	}
	type plan struct {
		h    *host
		list []*container
		lost Size
	}
	var plans []plan
	for _, h := range hosts[:min(len(hosts), maxExplained)] {
		if h == d.not || !h.takes() || !s.hostRules(c, h).ok() {
			continue
		}
		if list, lost, ok := victims(c, h); ok {
			plans = append(plans, plan{h, list, lost})
		}
	}
	slices.SortFunc(plans, func(a, b plan) int {
		return cmp.Or(cmp.Compare(len(a.list), len(b.list)), cmp.Compare(a.lost.Memory, b.lost.Memory), cmp.Compare(a.h.ID, b.h.ID))
	})
	for _, p := range plans[:min(len(plans), maxSecured)] {
		k := d.mark()
		if d.evictFor(f, p.h, p.list) {
			return true
		}
		d.reset(k)
	}
	return false
}

// batchHosts is the hosts that run batch work, by id.
func (s *State) batchHosts() []*host {
	var out []*host
	for _, h := range s.hosts {
		if h.batch > 0 {
			out = append(out, h)
		}
	}
	slices.SortFunc(out, func(a, b *host) int { return cmp.Compare(a.ID, b.ID) })
	return out
}

// victims is the batch containers of h to evict for c, the largest first, so that
// they are few; none that is not needed.
func victims(c *container, h *host) ([]*container, Size, bool) {
	want := c.need.add(h.GuestExtra).add(h.MachineExtra)
	if c.Isolation == Metal {
		want = c.need
	}
	var list []*container
	for _, o := range h.all.byID() {
		if o.machine != nil && o.machine.fresh {
			continue // it has only just been placed
		}
		if o.Class == Batch && o.Isolation != Metal && h.Capabilities.Shrink || o.Class == Batch && o.Isolation == Metal ||
			o.Class == Batch && o.machine != nil && o.machine.group == h.groupFor(c) {
			list = append(list, o)
		}
	}
	slices.SortFunc(list, func(a, b *container) int {
		return cmp.Or(cmp.Compare(b.need.Memory, a.need.Memory), cmp.Compare(b.need.CPU, a.need.CPU), cmp.Compare(a.ID, b.ID))
	})
	room := h.avail()
	var out []*container
	for _, o := range list {
		if want.fits(room) {
			break
		}
		room = room.add(o.need)
		out = append(out, o)
	}
	if !want.fits(room) {
		return nil, Size{}, false
	}
	var lost Size
	for i := len(out) - 1; i >= 0; i-- { // the last ones may have made the first unnecessary
		if less := room.sub(out[i].need); want.fits(less) && len(out) > 1 {
			room = less
			out = slices.Delete(out, i, i+1)
		}
	}
	for _, o := range out {
		lost = lost.add(o.need)
	}
	return out, lost, len(out) > 0
}

// groupFor finds the group of machines that c may share on h.
func (h *host) groupFor(c *container) *group {
	for _, m := range h.machines {
		if groupOf(m.Isolation, m.Project) == groupOf(c.Isolation, c.Project) {
			return m.group
		}
	}
	return nil
}

// evictFor evicts the list from h, gives what their machines held back, and places c there.
func (d *decision) evictFor(f *finder, h *host, list []*container) bool {
	c := f.c
	why := fmt.Sprintf("gives way to %s, which is latency work and fits nowhere else", c.ID)
	var machines []*machine
	for _, o := range list {
		m := o.machine
		if m != nil && !slices.Contains(machines, m) {
			machines = append(machines, m)
		}
		d.actions = append(d.actions, Action{Kind: Evict, Container: o.ID, FromMachine: o.machineID(), FromHost: o.hostID(), Host: o.hostID(), Bytes: o.need.Memory,
			Reason: Reason{Summary: o.ID + " " + why}})
		d.remove(o)
	}
	for _, m := range machines {
		if to := m.shrunk(); to != m.Size && m.host.Capabilities.Shrink && !m.fresh {
			from := m.Size
			d.size(m, to)
			d.actions = append(d.actions, Action{Kind: Shrink, Machine: m.ID, Host: m.Host, From: from, To: to,
				Reason: Reason{Summary: fmt.Sprintf("%s gives back what was evicted from it", m.ID)}})
		}
	}
	for _, m := range h.machines { // growth from here on comes after the evictions
		d.again1(m)
	}
	was, evict, power := d.only, d.evict, d.noPower
	d.only, d.evict, d.noPower = h, false, true
	out := len(d.out)
	ok := d.decide(c)
	d.only, d.evict, d.noPower = was, evict, power
	if !ok {
		d.out = d.out[:out]
	}
	return ok
}

// again1 makes later growth of m an action of its own.
func (d *decision) again1(m *machine) {
	i, ok := d.at[m]
	if !ok {
		return
	}
	if m.fresh && !m.host.Capabilities.Grow { // it has started by then, and stays as it is
		set := func(v bool) {
			d.s.unindexMachine(m)
			m.fresh = v
			d.s.indexMachine(m)
		}
		set(false)
		d.undo.note(func() { set(false) }, func() { set(true) })
	}
	from, had := d.from[m]
	delete(d.at, m)
	if d.from == nil {
		d.from = map[*machine]Size{}
	}
	d.from[m] = m.Size
	d.undo.note(func() {}, func() {
		d.at[m] = i
		if had {
			d.from[m] = from
		} else {
			delete(d.from, m)
		}
	})
}
