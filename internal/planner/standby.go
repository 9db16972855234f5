package planner

import (
	"cmp"
	"slices"
)

// The failover guarantee. Every covered container has as many standby hosts as
// hosts may be lost at once. What of host f stands by on host h is f's claim on h;
// h keeps back the largest claim (for two losses the two largest together), because
// no more of them can be called in at once. So used + reserve <= capacity on every
// host is a proof that every loss has a destination that fits, and it is kept by
// every change at the cost of the few claims that the change touches.
//
// Containers of one machine that stand by on the same host start there as one
// machine: its overhead is claimed once. If all do, the machine itself restarts.

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

// covered says whether the guarantee speaks of c: what is bound to its host by a
// disk or a pin can't start elsewhere, and company that must be near can't be
// promised.
func (s *State) covered(c *container) bool {
	if s.policy.HostLosses == 0 || c.Uncovered || len(c.Hosts) == 1 || len(c.Near) > 0 {
		return false
	}
	for _, v := range c.Volumes {
		if s.volumes[v] != "" {
			return false
		}
	}
	return true
}

// standNeed is what containers of m with these requests take on g; m is nil for metal.
func standNeed(g *host, m *machine, sum Size) Size {
	if m == nil {
		return sum
	}
	return bootSize(g, sum).add(g.MachineExtra)
}

// claimed is f's claim on g.
func claimed(f, g *host) Size {
	for _, x := range f.grants {
		if x.on == g {
			return g.claims[x.at].size
		}
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

// reserveWith is g's reserve if f's claim were of that size.
func (s *State) reserveWith(f, g *host, size Size) Size {
	if s.policy.HostLosses < 2 {
		// Only used to raise a claim: the largest of the others is at most the reserve.
		return g.reserve.max(size)
	}
	var one, two Size
	see := func(v Size) {
		if v.CPU > one.CPU {
			one.CPU, two.CPU = v.CPU, one.CPU
		} else {
			two.CPU = max(two.CPU, v.CPU)
		}
		if v.Memory > one.Memory {
			one.Memory, two.Memory = v.Memory, one.Memory
		} else {
			two.Memory = max(two.Memory, v.Memory)
		}
	}
	for i := range g.claims {
		if g.claims[i].from != f {
			see(g.claims[i].size)
		}
	}
	see(size)
	return one.add(two)
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
	old := g.claims[at].size
	now := old.add(delta)
	g.claims[at].size = now
	if now.zero() {
		last := len(g.claims) - 1
		if at != last {
			moved := g.claims[last]
			g.claims[at] = moved
			j := slices.IndexFunc(moved.from.grants, func(x grant) bool { return x.on == g })
			moved.from.grants[j].at = at
		}
		g.claims = g.claims[:last]
		f.grants = slices.Delete(f.grants, i, i+1)
		if last == 0 {
			s.standing = removeByID(s.standing, g)
		}
	}
	was := g.reserve
	switch {
	case s.policy.HostLosses > 1:
		g.reserve = s.reserveWith(nil, g, Size{})
	case old.fits(now):
		g.reserve = g.reserve.max(now)
	case old.CPU == was.CPU && now.CPU < old.CPU || old.Memory == was.Memory && now.Memory < old.Memory:
		g.reserve = Size{}
		for j := range g.claims {
			g.reserve = g.reserve.max(g.claims[j].size)
		}
	}
	if g.reserve != was {
		s.reindexHost(g)
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

// ruled says whether c itself is particular about its company.
func (c *container) ruled() bool { return len(c.Ports) > 0 || len(c.Anti) > 0 }

// canStand says whether g may be another standby host of c, capacity included.
func (s *State) canStand(c *container, g *host) bool {
	if g == c.host || g == c.standby[0] || g == c.standby[1] || !g.takes() {
		return false
	}
	now := claimed(c.host, g).add(standDelta(c, g))
	if free := g.free(); !now.fits(free) || !s.reserveWith(c.host, g, now).fits(free) {
		return false
	}
	if c.machine != nil && !g.Base.add(c.need).fits(g.Capacity) {
		return false
	}
	return s.standRules(c, g)
}

// standRules checks all but capacity.
func (s *State) standRules(c *container, g *host) bool {
	if c.machine == nil && !g.Capabilities.Metal {
		return false
	}
	if c.machine != nil {
		sum := c.need
		if p := partOn(c.machine, g); p != nil {
			sum = sum.add(p.sum)
		}
		if !bootSize(g, sum).fits(g.ceiling()) {
			return false
		}
	}
	if c.Service == "" && !c.ruled() && len(c.Hosts) == 0 && len(c.Zones) == 0 {
		return true
	}
	if !s.hostRules(c, g).ok() {
		return false
	}
	return s.shadowRules(c, g)
}

// findStandby looks for a further standby host of c: where its host has a claim
// already, then where others have, then anywhere. tight looks into the smallest
// gaps instead of the largest.
func (s *State) findStandby(c *container, not *host, tight bool) *host {
	for _, x := range c.host.grants {
		if x.on != not && s.canStand(c, x.on) {
			return x.on
		}
	}
	looked := 0
	var raise *host
	for _, g := range s.standing {
		if looked++; looked > maxStanding {
			break
		}
		if g == not || !s.canStand(c, g) {
			continue
		}
		if claimed(c.host, g).add(standDelta(c, g)).fits(g.reserve) {
			return g // it keeps that back anyway
		}
		if raise == nil || !tight && raise.free().CPU < g.free().CPU {
			raise = g
		}
	}
	if raise != nil && !tight {
		return raise
	}
	var found *host
	looked = 0
	look := func(g *host) bool {
		if looked++; g != not && s.canStand(c, g) {
			found = g
			return false
		}
		return looked < maxExamined
	}
	if tight {
		s.open.fitting(c.need, look)
	} else {
		s.open.roomiest(c.need, look)
	}
	if found == nil {
		return raise
	}
	return found
}

// secure gives c, which is placed, the standby hosts that it lacks; it says whether
// it has them all. What it did is added to the undo list, when there is one.
func (s *State) secure(c *container, undo *journal) bool {
	if c.host == nil || !s.covered(c) {
		return true
	}
	for slot := range s.policy.HostLosses {
		if c.standby[slot] != nil {
			continue
		}
		g := s.findStandby(c, nil, false)
		if g == nil {
			s.expose(c, undo)
			return false
		}
		s.stand(c, slot, g)
		undo.note(func() { s.stand(c, slot, g) }, func() { s.unstand(c, slot) })
	}
	if s.exposed[c] {
		delete(s.exposed, c)
		undo.note(func() { delete(s.exposed, c) }, func() { s.exposed[c] = true })
	}
	return true
}

func (s *State) expose(c *container, undo *journal) {
	if !s.exposed[c] {
		s.exposed[c] = true
		undo.note(func() { s.exposed[c] = true }, func() { delete(s.exposed, c) })
	}
}

// release takes all of c's claims back.
func (s *State) release(c *container) {
	s.unstand(c, 1)
	s.unstand(c, 0)
	delete(s.exposed, c)
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
	from := slices.DeleteFunc(s.claimants(h), func(f *host) bool { return claimed(f, h).fits(each) })
	start := len(*undo)
	for _, f := range from {
		if !s.lowerClaim(f, h, each, undo) {
			rollback(undo, start)
			return false
		}
	}
	return h.reserve.fits(limit)
}

// lowerClaim moves standby places of f's containers away from h until its claim
// there is at most limit.
func (s *State) lowerClaim(f, h *host, limit Size, undo *journal) bool {
	var list []*container
	for _, c := range f.all.members {
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

// shed gives up standby places on h until need fits: after a loss what was lost
// comes before what may be lost next. Who stood by there is exposed.
func (s *State) shed(h *host, need Size, undo *journal) bool {
	limit := h.free().sub(need)
	if !(Size{}).fits(limit) {
		return false
	}
	each := limit
	if s.policy.HostLosses > 1 {
		each = Size{limit.CPU / 2, limit.Memory / 2}
	}
	for _, f := range s.claimants(h) {
		for _, c := range f.all.members {
			if claimed(f, h).fits(each) {
				break
			}
			for slot := range c.standby {
				if c.standby[slot] != h {
					continue
				}
				s.unstand(c, slot)
				undo.note(func() { s.unstand(c, slot) }, func() { s.stand(c, slot, h) })
				s.expose(c, undo)
			}
		}
	}
	return h.reserve.fits(limit)
}

// dismiss finds other standby hosts for all that stands by on h; it says whether
// all found one. With a nil undo list the rest is left exposed, else nothing is
// changed when it did not.
func (s *State) dismiss(h *host, undo *journal) bool {
	start := 0
	if undo != nil {
		start = len(*undo)
	}
	all := true
	for _, f := range s.claimants(h) {
		for _, c := range f.all.members {
			for slot := range c.standby {
				if c.standby[slot] != h || s.restand(c, slot, h, undo) {
					continue
				}
				all = false
				if undo != nil {
					rollback(undo, start)
					return false
				}
				s.unstand(c, slot)
				s.expose(c, nil)
			}
		}
	}
	return all
}

// claimants is the hosts with claims on h, by id.
func (s *State) claimants(h *host) []*host {
	from := make([]*host, 0, len(h.claims))
	for _, x := range h.claims {
		from = append(from, x.from)
	}
	slices.SortFunc(from, func(a, b *host) int { return cmp.Compare(a.ID, b.ID) })
	return from
}

// restand finds another standby host than h for c; nothing is changed if there is none.
func (s *State) restand(c *container, slot int, h *host, undo *journal) bool {
	s.unstand(c, slot)
	g := s.findStandby(c, h, false)
	if g == nil {
		s.stand(c, slot, h)
		return false
	}
	s.stand(c, slot, g)
	s.restood(c, slot, h, g, undo)
	return true
}

// restood notes that c stands by on g in place of h.
func (s *State) restood(c *container, slot int, h, g *host, undo *journal) {
	change := func(to *host) func() {
		return func() {
			s.unstand(c, slot)
			s.stand(c, slot, to)
		}
	}
	undo.note(change(g), change(h))
}

// mend tries again for containers that have no standby host, after an event that
// may have made room.
func (s *State) mend() {
	if len(s.exposed) == 0 {
		return
	}
	tried := 0
	for _, c := range s.exposedList() {
		if tried++; tried > 8 || !s.secure(c, nil) {
			return
		}
	}
}

func (s *State) exposedList() []*container {
	list := make([]*container, 0, len(s.exposed))
	for c := range s.exposed {
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *container) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// SetPolicy changes what holds for the whole state. Everything covered gets new
// standby hosts: O(everything), for configuration, not for daily use.
func (s *State) SetPolicy(p Policy) error {
	if p.HostLosses < 0 || p.HostLosses > 2 {
		return errLosses(p.HostLosses)
	}
	if p == s.policy {
		return nil
	}
	s.rev++
	list := s.sortedContainers()
	for _, c := range list {
		s.release(c)
	}
	s.policy = p
	for _, c := range list {
		s.secure(c, nil)
	}
	return nil
}

// Policy is what SetPolicy said last.
func (s *State) Policy() Policy { return s.policy }

// Survives says whether every loss that the policy speaks of has a destination
// that fits for everything covered, and names the containers that have none.
func (s *State) Survives() (bool, []string) {
	var out []string
	for _, c := range s.exposedList() {
		out = append(out, c.ID)
	}
	return len(out) == 0, out
}

// Standby names the hosts on which a container would start again, in the order in
// which they are tried.
func (s *State) Standby(container string) []string {
	var out []string
	if c := s.containers[container]; c != nil {
		for _, g := range c.standby {
			if g != nil {
				out = append(out, g.ID)
			}
		}
	}
	return out
}
