package planner

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
)

// Fold bounds what a Fold question may do.
type Fold struct {
	Budget Budget
	// Among are the machines that may be emptied or filled; nil: all.
	Among []string
	// From are those of them that may be emptied; nil: all.
	From []string
	// Leave is the part, 0 to 1, of a machine's ceiling that stays unused in those
	// that are filled: load that grows a little must not need another machine at once.
	Leave float64
	// Gain is how many bytes of memory a fold must give back to hosts, growth of the
	// machines that are filled counted against it.
	Gain int64
	// Machines bounds how many machines are emptied in one plan; 0: any number.
	Machines int
}

// fold empties machines into others that are there, those with the fewest containers
// first, each wholly or not at all: the plan has the Moves, the Grows that they need,
// and a Stop of each machine that they empty.
func (s *State) fold(q Fold) (*Plan, error) {
	if !(q.Leave >= 0 && q.Leave < 1) || q.Gain < 0 || q.Machines < 0 {
		return nil, fmt.Errorf("fold: leave %g must be at least 0 and less than 1, gain %d and machines %d not negative", q.Leave, q.Gain, q.Machines)
	}
	d := s.decision()
	d.noPower, d.noBoot = true, true
	defer d.back()
	among, from := s.known(q.Among), s.known(q.From)
	if from == nil {
		from = among
	}
	b := &budget{Budget: q.Budget}
	filled := map[*machine]bool{} // is not emptied by the same plan
	tried, emptied := 0, 0
	for _, m := range d.foldable(from) {
		if tried >= maxTried || q.Machines > 0 && emptied >= q.Machines {
			break
		}
		if filled[m] || among != nil && !among[m] || !b.allows(len(m.in.members), 0, 0) {
			continue
		}
		k, spent := d.mark(), b.spent
		into, ok := d.pour(m, among, b, &q)
		if !ok {
			d.reset(k)
			b.spent = spent
			tried++
			continue
		}
		for _, t := range into {
			filled[t] = true
		}
		d.stop(m, "to fold "+m.ID)
		emptied++
	}
	d.out = nil
	return d.plan(), nil
}

// known is those of the machines that are there; nil: all.
func (s *State) known(ids []string) map[*machine]bool {
	if ids == nil {
		return nil
	}
	set := map[*machine]bool{}
	for _, id := range ids {
		if m := s.machines[id]; m != nil {
			set[m] = true
		}
	}
	return set
}

// foldable is the machines all of whose containers may move, cheapest first.
func (d *decision) foldable(from map[*machine]bool) []*machine {
	var list []*machine
	look := func(m *machine) {
		if len(m.in.members) == 0 || m.Pinned || !m.takes() || !m.host.takes() {
			return
		}
		for _, c := range m.in.members {
			if c.Stateful || len(c.Volumes) > 0 {
				return
			}
		}
		list = append(list, m)
	}
	if from == nil {
		for m := range maps.Values(d.s.machines) {
			look(m)
		}
	}
	for m := range from {
		look(m)
	}
	slices.SortFunc(list, func(x, y *machine) int {
		return cmp.Or(cmp.Compare(len(x.in.members), len(y.in.members)), cmp.Compare(x.sum.Memory, y.sum.Memory),
			cmp.Compare(x.sum.CPU, y.sum.CPU), cmp.Compare(x.ID, y.ID))
	})
	return list
}

// pour moves all that is in m into other machines, and says into which, and whether
// that is allowed and worth it.
func (d *decision) pour(m *machine, among map[*machine]bool, b *budget, q *Fold) ([]*machine, bool) {
	s := d.s
	members := slices.Clone(m.in.byID())
	slices.SortFunc(members, func(x, y *container) int {
		return cmp.Or(cmp.Compare(y.need.Memory, x.need.Memory), cmp.Compare(y.need.CPU, x.need.CPU), cmp.Compare(x.ID, y.ID))
	})
	type company struct{ inMachine, onHost int }
	had := map[serviceKey]company{}
	for _, c := range members {
		had[c.service()] = company{m.in.count(c.service()), m.host.all.count(c.service())}
	}
	d.into = func(c *container, t *machine) bool {
		if t == m || among != nil && !among[t] || !t.used().add(c.need).fits(t.Ceiling.fraction(1-q.Leave)) {
			return false
		}
		if c.Service == "" {
			return true
		}
		// Replicas do not come closer together than they were.
		k := c.service()
		return (c.Spread != "machine" || t.in.count(k) < max(had[k].inMachine, 1)) &&
			(t.host == m.host || t.host.all.count(k) < max(had[k].onHost, 1)) &&
			(c.Spread != "zone" || t.host.Zone == m.host.Zone)
	}
	defer func() { d.into = nil }()
	taken := s.taken
	var into []*machine
	for _, c := range members {
		if !b.allows(1, 0, 0) || !d.move(c, "to fold "+m.ID) || c.machine == nil {
			return nil, false
		}
		b.spend(1, 0, 0)
		if !slices.Contains(into, c.machine) {
			into = append(into, c.machine)
		}
	}
	grown := s.taken.sub(taken).Memory
	if m.Size.Memory+m.host.MachineExtra.Memory-grown < max(q.Gain, 1) {
		return nil, false
	}
	return into, true
}

// fraction is a part of a size.
func (z Size) fraction(f float64) Size {
	return Size{CPU: int64(float64(z.CPU) * f), Memory: int64(float64(z.Memory) * f)}
}
