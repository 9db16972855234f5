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

// ruled says whether c itself is particular about its company.
func (c *container) ruled() bool { return len(c.Ports) > 0 || len(c.Anti) > 0 }

// canStand says whether g may be another standby host of c, capacity included.
func (s *State) canStand(c *container, g *host) bool {
	if g == c.host || g == c.standby[0] || g == c.standby[1] || !g.takes() || g.breaks(c.host) {
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
		if !bootSize(g, sum).fits(g.top) {
			return false
		}
	}
	if len(s.zoneAnti[c.Project]) > 0 && g.Zone != c.host.Zone {
		return false // the company in each zone stays what it is
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
		was := c.standby[slot]
		if was != nil && !s.void(c, slot) {
			continue
		}
		g := s.findStandby(c, nil, false)
		if g == nil {
			s.expose(c, undo)
			return false
		}
		if was != nil {
			s.unstand(c, slot)
			s.stand(c, slot, g)
			s.restood(c, slot, was, g, undo)
			continue
		}
		s.stand(c, slot, g)
		undo.step(step{op: opStand, c: c, h: g, slot: slot})
	}
	if c.exposed {
		s.setExposed(c, false)
		undo.note(func() { s.setExposed(c, false) }, func() { s.setExposed(c, true) })
	}
	return true
}

func (s *State) expose(c *container, undo *journal) {
	if !c.exposed {
		s.setExposed(c, true)
		undo.note(func() { s.setExposed(c, true) }, func() { s.setExposed(c, false) })
	}
}

func (s *State) setExposed(c *container, v bool) {
	switch {
	case v == c.exposed:
		return
	case v:
		s.exposed.insert(c)
	default:
		s.exposed.remove(c)
	}
	c.exposed = v
}

// release takes all of c's claims back.
func (s *State) release(c *container) {
	s.unstand(c, 1)
	s.unstand(c, 0)
	s.setExposed(c, false)
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
		for _, c := range f.all.byID() {
			for slot := range c.standby {
				if c.standby[slot] != h || s.restand(c, slot, h, undo) {
					continue
				}
				all = false
				if undo != nil {
					s.rollback(undo, start)
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

// exposedList is what is covered and without all its standby hosts, by id.
func (s *State) exposedList() []*container {
	list := s.exposed.first(s.exposed.n)
	for _, g := range s.breakers {
		g.broken.all(func(f *host) bool {
			for _, c := range f.all.members {
				if !c.exposed && (c.standby[0] == g || c.standby[1] == g) {
					list = append(list, c)
				}
			}
			return true
		})
	}
	if len(s.breakers) > 0 {
		slices.SortFunc(list, func(a, b *container) int { return cmp.Compare(a.ID, b.ID) })
		list = slices.Compact(list)
	}
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
	if p.HostLosses == s.policy.HostLosses {
		s.policy = p
		return nil
	}
	list := s.sortedContainers()
	for _, c := range list {
		s.release(c)
	}
	s.healAll(nil)
	s.policy = p
	for _, c := range list {
		s.secure(c, nil)
	}
	return nil
}

// Policy is what SetPolicy said last.
func (s *State) Policy() Policy { return s.policy }

// Covered counts the placed containers of which the guarantee speaks.
func (s *State) Covered() int {
	n := 0
	for _, c := range s.containers {
		if c.host != nil && s.covered(c) {
			n++
		}
	}
	return n
}

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
