package planner

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// maxTried bounds how many hosts a Consolidate question tries to empty in vain;
// cheapHost is how many containers are moved for a host just before Leave is unused.
const (
	maxTried  = 20
	cheapHost = 12.0
)

// consolidate empties the hosts that are cheapest to empty, as long as much is
// unused, and switches off those that run nothing and that the guarantee does
// without.
func (s *State) consolidate(q Consolidate) (*Plan, error) {
	if !(q.Leave >= 0 && q.Leave <= 1) || q.Hosts < 0 || q.KeepOn < 0 {
		return nil, fmt.Errorf("consolidate: leave %g must be between 0 and 1, hosts %d and keep-on %d not negative", q.Leave, q.Hosts, q.KeepOn)
	}
	d := s.decision()
	d.noPower, d.noBoot = true, true
	defer d.back()
	b := &budget{Budget: q.Budget}
	d.dropEmpty(&q)
	tried, emptied := 0, 0
	for _, h := range d.cheapest(b) {
		if tried >= maxTried || q.Hosts > 0 && emptied >= q.Hosts {
			break
		}
		if d.reached[h] {
			continue // what has just come does not go on
		}
		most, ok := d.worth(h, &q)
		if !ok || most >= 0 && d.disturbs(h, b) > most {
			break // the next ones hold more
		}
		k, spent := d.mark(), b.spent
		if b.Containers = q.Budget.Containers; most >= 0 && (b.Containers < 0 || b.spent.Containers+most < b.Containers) {
			b.Containers = b.spent.Containers + most
		}
		if d.clear(h, b, "to empty "+h.ID) && s.dismiss(h, &d.undo) {
			emptied++
			if q.PowerOff {
				d.powerOff(h)
			}
			continue
		}
		tried++
		d.reset(k)
		b.spent = spent
	}
	d.out = nil
	return d.plan(), nil
}

// dropEmpty switches off hosts that run nothing, the largest id first, so that the
// low numbers stay.
func (d *decision) dropEmpty(q *Consolidate) {
	if !q.PowerOff {
		return
	}
	s := d.s
	var empty []*host
	for _, id := range slices.Sorted(maps.Keys(s.hosts)) {
		if h := s.hosts[id]; h.takes() && len(h.all.members) == 0 && h.idleMachines() {
			empty = append(empty, h)
		}
	}
	slices.Reverse(empty)
	for i, h := range empty {
		if len(empty)-i <= q.KeepOn {
			return
		}
		k := d.mark()
		for _, m := range h.machines {
			if !m.Stopping {
				d.stop(m, "to empty "+h.ID)
			}
		}
		d.power1(h, true)
		if s.dismiss(h, &d.undo) {
			d.actions = append(d.actions, Action{Kind: PowerOff, Host: h.ID,
				Reason: Reason{Summary: h.ID + " runs nothing, and the guarantee does without it"}})
			continue
		}
		d.reset(k)
	}
}

// idleMachines says whether nothing in or about h's machines keeps it on.
func (h *host) idleMachines() bool {
	for _, m := range h.machines {
		if m.Pinned || len(m.in.members) > 0 {
			return false
		}
	}
	return true
}

func (d *decision) powerOff(h *host) {
	d.power1(h, true)
	d.actions = append(d.actions, Action{Kind: PowerOff, Host: h.ID,
		Reason: Reason{Summary: h.ID + " was emptied; the guarantee does without it"}})
}

// worth says how many containers may move for h to be empty, negative for any
// number, and whether all fits without h at all: see Consolidate.Leave.
func (d *decision) worth(h *host, q *Consolidate) (most int, ok bool) {
	s := d.s
	room := s.total.sub(h.Capacity).sub(s.busy)
	if room.CPU < 0 || room.Memory < 0 {
		return 0, false
	}
	unused := min(share(room.CPU, s.total.CPU), share(room.Memory, s.total.Memory))
	if unused >= q.Leave {
		return -1, true
	}
	part := unused / q.Leave
	return int(cheapHost * part * part), true
}

// disturbs is how many containers would have to move for h to be empty: those in
// machines that can't be migrated within the budget, or have one like them on every
// host, and those on metal.
func (d *decision) disturbs(h *host, b *budget) int {
	n := len(h.metal.members)
	for _, m := range h.machines {
		if h.Capabilities.MoveSecondsGiB <= 0 || m.group.size() >= d.s.open.n || !b.allows(0, 1, m.Size.Memory) {
			n += len(m.in.members)
		}
	}
	return n
}

// cheapest is the hosts within the budget by what emptying them disturbs.
func (d *decision) cheapest(b *budget) []*host {
	type entry struct {
		h *host
		n int // containers that would move
	}
	var list []entry
	for id := range d.s.hosts {
		h := d.s.hosts[id]
		if !h.takes() || len(h.all.members) == 0 {
			continue
		}
		if n := d.disturbs(h, b); b.allows(n, 0, 0) {
			list = append(list, entry{h, n})
		}
	}
	slices.SortFunc(list, func(x, y entry) int {
		return cmp.Or(cmp.Compare(x.n, y.n), cmp.Compare(len(x.h.all.members), len(y.h.all.members)), cmp.Compare(x.h.busy.Memory, y.h.busy.Memory), cmp.Compare(x.h.ID, y.h.ID))
	})
	out := make([]*host, 0, min(len(list), 256))
	for _, e := range list[:min(len(list), 256)] {
		out = append(out, e.h)
	}
	return out
}
