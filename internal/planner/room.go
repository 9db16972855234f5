package planner

import (
	"cmp"
	"fmt"
	"slices"
)

// Room asks that a machine of a group have room for a container of a size before
// one comes: who shares a host with a large machine goes elsewhere while it runs, so
// that the large one grows and no further one boots.
type Room struct {
	Isolation Isolation
	Project   string // "" with Shared
	Size      Size   // what a machine should have room for
	Budget    Budget // Machines and Bytes
}

// roomAhead migrates a neighbour of one of the group's machines, which has the room
// then: nobody where one has it, or where the group has no machine. Where no neighbour
// can leave, Unplaced says so.
func (s *State) roomAhead(q *Room) (*Plan, error) {
	if !q.Size.valid() || q.Isolation > Own {
		return nil, fmt.Errorf("room: size %s or isolation %d is out of range", q.Size, q.Isolation)
	}
	d := s.decision()
	defer d.back()
	g := s.groups[groupOf(q.Isolation, q.Project)]
	if g.size() == 0 || g.has(q.Size) {
		return d.plan(), nil
	}
	b := &budget{Budget: q.Budget}
	for _, o := range s.roomier(g, q) {
		if d.migrateAway(o.neighbour, b, "to make room beside it") {
			return d.plan(), nil
		}
	}
	d.out = append(d.out, Unplaced{Remedy: "allow larger migrations, or add a host",
		Reason: Reason{Summary: fmt.Sprintf("no machine has room for %s, and no neighbour can leave", q.Size)}})
	return d.plan(), nil
}

// has says whether one of the group's machines has that room.
func (g *group) has(need Size) bool {
	found := false
	g.room.fitting(need, func(m *machine) bool {
		found = need.fits(m.room())
		return !found
	})
	return found
}

// exit is a neighbour that could leave.
type exit struct {
	neighbour *machine
	cost      float64
}

// roomier is the neighbours of g's machines without whom one of them would have the
// room, the cheapest first: what is copied, and room beside a machine that holds much
// is worth 128 s, as many GiB, more than beside one that holds next to nothing.
func (s *State) roomier(g *group, q *Room) []exit {
	b := &budget{Budget: q.Budget}
	var out []exit
	looked := 0
	g.room.roomiest(Size{}, func(m *machine) bool {
		looked++
		if len(m.host.machines) < 2 || !m.host.Capabilities.Grow || !q.Size.fits(m.Ceiling.sub(m.used())) {
			return looked < maxExamined
		}
		for _, n := range m.host.machines {
			if n == m || n.group == g || len(n.in.members) == 0 || n.Pinned || n.Stopping || !b.allows(0, 1, n.Size.Memory) {
				continue
			}
			free := m.host.avail().add(n.Size).add(m.host.MachineExtra)
			if !q.Size.sub(m.free()).fits(free) {
				continue
			}
			out = append(out, exit{n, WeightMoveGiB*float64(n.Size.Memory)/gib + 16*WeightSparse*decay(len(m.in.members))})
		}
		return looked < maxExamined
	})
	slices.SortFunc(out, func(x, y exit) int {
		return cmp.Or(cmp.Compare(x.cost, y.cost), cmp.Compare(x.neighbour.ID, y.neighbour.ID))
	})
	return out[:min(len(out), maxSecured)]
}
