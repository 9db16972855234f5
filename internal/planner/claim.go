package planner

import (
	"cmp"
	"slices"
)

// claim is what host from would bring to the host that has it in its list.
type claim struct {
	from *host
	size Size
}

// grant is the other end: the claim number at of host on.
type grant struct {
	on *host
	at int
}

// part is what of one machine stands by on one host.
type part struct {
	on   *host
	sum  Size // requests of its containers
	need Size // what a machine for them takes there, overheads included
	n    int
}

// standNeed is what containers of m with these requests take on g; m is nil for metal.
func standNeed(g *host, m *machine, sum Size) Size {
	if m == nil {
		return sum
	}
	return bootSize(g, sum).add(g.MachineExtra)
}

// claimAt is the number of f's claim in g's list, -1 if it has none.
func claimAt(f, g *host) int {
	for i := range f.grants {
		if f.grants[i].on == g {
			return f.grants[i].at
		}
	}
	return -1
}

// claimed is f's claim on g.
func claimed(f, g *host) Size {
	if at := claimAt(f, g); at >= 0 {
		return g.claims[at].size
	}
	return Size{}
}

func partOn(m *machine, g *host) *part {
	if m == nil {
		return nil
	}
	for i := range m.parts {
		if m.parts[i].on == g {
			return &m.parts[i]
		}
	}
	return nil
}

// standDelta is by how much c would raise its host's claim on g.
func standDelta(c *container, g *host) Size {
	if c.machine == nil {
		return c.need
	}
	var sum, had Size
	if p := partOn(c.machine, g); p != nil {
		sum, had = p.sum, p.need
	}
	return standNeed(g, c.machine, sum.add(c.need)).sub(had)
}

// reserveWith is g's reserve if f's claim were of that size, and not broken.
func (s *State) reserveWith(f, g *host, size Size) Size {
	if s.policy.HostLosses < 2 {
		// Only used to raise a claim: the largest of the others is at most the reserve.
		return g.reserve.max(size)
	}
	return g.tops.without(claimAt(f, g)).merge(top{one: size}).together(s.policy.HostLosses)
}

// setClaim changes f's claim on g by delta and keeps g's reserve right.
func (s *State) setClaim(f, g *host, delta Size) {
	i := slices.IndexFunc(f.grants, func(x grant) bool { return x.on == g })
	if i < 0 {
		// By id: what is found first must not depend on what was tried before.
		i, _ = slices.BinarySearchFunc(f.grants, g.ID, func(x grant, id string) int { return cmp.Compare(x.on.ID, id) })
		f.grants = slices.Insert(f.grants, i, grant{g, len(g.claims)})
		g.claims = append(g.claims, claim{from: f})
		if len(g.claims) == 1 {
			s.standing = insertByID(s.standing, g)
		}
	}
	at := f.grants[i].at
	now := g.claims[at].size.add(delta)
	g.claims[at].size = now
	if now.zero() {
		last := len(g.claims) - 1
		if at != last {
			moved := g.claims[last]
			g.claims[at] = moved
			j := slices.IndexFunc(moved.from.grants, func(x grant) bool { return x.on == g })
			moved.from.grants[j].at = at
			g.enter(at)
		}
		g.tops.set(last, Size{})
		g.claims = g.claims[:last]
		f.grants = slices.Delete(f.grants, i, i+1)
		if last == 0 {
			s.standing = removeByID(s.standing, g)
		}
	} else {
		g.enter(at)
	}
	s.keepBack(g)
}

// enter counts claim number at, unless it is broken.
func (h *host) enter(at int) {
	x := h.claims[at]
	if h.breaks(x.from) {
		x.size = Size{}
	}
	h.tops.set(at, x.size)
}

// keepBack follows a change of what claims h has.
func (s *State) keepBack(h *host) {
	if now := h.tops.root().together(s.policy.HostLosses); now != h.reserve {
		h.reserve = now
		s.reindexHost(h)
	}
}

// stand makes g the standby host number slot of c.
func (s *State) stand(c *container, slot int, g *host) {
	delta := standDelta(c, g)
	if m := c.machine; m != nil {
		p := partOn(m, g)
		if p == nil {
			m.parts = append(m.parts, part{on: g})
			p = &m.parts[len(m.parts)-1]
		}
		p.sum, p.need, p.n = p.sum.add(c.need), p.need.add(delta), p.n+1
	}
	s.setClaim(c.host, g, delta)
	c.standby[slot] = g
	if c.ruled() {
		g.shadows = insertByID(g.shadows, c)
	}
}

// unstand takes it back.
func (s *State) unstand(c *container, slot int) {
	g := c.standby[slot]
	if g == nil {
		return
	}
	delta := c.need
	if m := c.machine; m != nil {
		p := partOn(m, g)
		p.sum, p.n = p.sum.sub(c.need), p.n-1
		var now Size
		if p.n > 0 {
			now = standNeed(g, m, p.sum)
		}
		delta, p.need = p.need.sub(now), now
		if p.n == 0 {
			m.parts = slices.DeleteFunc(m.parts, func(p part) bool { return p.n == 0 })
		}
	}
	c.standby[slot] = nil
	s.setClaim(c.host, g, Size{}.sub(delta))
	if c.ruled() {
		g.shadows = removeByID(g.shadows, c)
	}
}

// makeRoom lowers what h keeps back until need fits beside it, by letting others
// keep it back; it says whether that worked out, and has changed nothing if not.
func (s *State) makeRoom(h *host, need Size, undo *journal) bool {
	limit := h.free().sub(need)
	if !(Size{}).fits(limit) {
		return false
	}
	if h.reserve.fits(limit) {
		return true
	}
	if len(h.claims) > maxClaims {
		return false
	}
	each := limit
	if s.policy.HostLosses > 1 {
		each = Size{limit.CPU / 2, limit.Memory / 2}
	}
	from := h.above(each)
	start := len(*undo)
	for _, f := range from {
		if !s.lowerClaim(f, h, each, undo) {
			s.rollback(undo, start)
			return false
		}
	}
	return h.reserve.fits(limit)
}

// lowerClaim moves standby places of f's containers away from h until its claim
// there is at most limit.
func (s *State) lowerClaim(f, h *host, limit Size, undo *journal) bool {
	var list []*container
	for _, c := range f.all.byID() {
		if c.standby[0] == h || c.standby[1] == h {
			list = append(list, c)
		}
	}
	// Small ones fit into gaps; of those the fewest that do.
	slices.SortStableFunc(list, func(a, b *container) int {
		return cmp.Or(cmp.Compare(a.need.CPU, b.need.CPU), cmp.Compare(a.need.Memory, b.need.Memory))
	})
	for _, c := range list {
		if claimed(f, h).fits(limit) {
			return true
		}
		slot := 0
		if c.standby[1] == h {
			slot = 1
		}
		s.unstand(c, slot)
		g := s.findStandby(c, h, true)
		if g == nil {
			s.stand(c, slot, h)
			return false
		}
		s.stand(c, slot, g)
		s.restood(c, slot, h, g, undo)
	}
	return claimed(f, h).fits(limit)
}

// above is the hosts whose claims on h are kept and larger than that, by id.
func (h *host) above(size Size) []*host {
	var from []*host
	h.tops.above(size, func(i int) { from = append(from, h.claims[i].from) })
	slices.SortFunc(from, func(a, b *host) int { return cmp.Compare(a.ID, b.ID) })
	return from
}
