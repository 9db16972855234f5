package planner

// After a loss what was lost comes before what may be lost next: claims on a host that
// is needed now are broken. A broken claim keeps nothing back. Who stands by there is
// exposed, though his standby host is still known: a loss that breaks the claims of all
// other hosts costs one entry for each of them, not one for each of their containers.
// Room that comes back, and Rebalance, make claims good or find other standby hosts.

// breaks says whether f's claim on h is broken.
func (h *host) breaks(f *host) bool {
	return h.broken.n > 0 && h.broken.has(f)
}

// shed breaks claims on h until need fits.
func (s *State) shed(h *host, need Size, undo *journal) bool {
	limit := h.free().sub(need)
	if !(Size{}).fits(limit) {
		return false
	}
	each := limit
	if s.policy.HostLosses > 1 && !h.reserve.fits(limit) {
		each = Size{limit.CPU / 2, limit.Memory / 2}
	}
	if from := h.above(each); len(from) > 0 {
		s.breakClaims(h, from, true)
		undo.note(func() { s.breakClaims(h, from, true) }, func() { s.breakClaims(h, from, false) })
	}
	return h.reserve.fits(limit)
}

// breakClaims breaks the claims of these hosts on h, or makes them good.
func (s *State) breakClaims(h *host, from []*host, broken bool) {
	before := h.broken.n
	for _, f := range from {
		if broken {
			h.broken.insert(f)
		} else {
			h.broken.remove(f)
		}
		if at := claimAt(f, h); at >= 0 {
			h.enter(at)
		}
	}
	switch {
	case before == 0 && h.broken.n > 0:
		s.breakers = insertByID(s.breakers, h)
	case before > 0 && h.broken.n == 0:
		s.breakers = removeByID(s.breakers, h)
	}
	s.keepBack(h)
}

// forget drops what was noted about a host that goes.
func (s *State) forget(h *host) {
	for _, g := range append([]*host{h}, s.breakers...) {
		from := g.broken.first(g.broken.n)
		if g != h {
			if !g.breaks(h) {
				continue
			}
			from = []*host{h}
		}
		s.breakClaims(g, from, false)
	}
}

// void says whether c's standby host number slot would not have it: the claim is broken.
func (s *State) void(c *container, slot int) bool {
	g := c.standby[slot]
	return g != nil && len(s.breakers) > 0 && g.breaks(c.host)
}

// heal makes the claim of f on h good if there is room for it again.
func (s *State) heal(f, h *host, undo *journal) bool {
	if size := claimed(f, h); !size.zero() {
		if free := h.free(); !h.takes() || !size.fits(free) || !s.reserveWith(f, h, size).fits(free) {
			return false
		}
	}
	from := []*host{f}
	s.breakClaims(h, from, false)
	undo.note(func() { s.breakClaims(h, from, false) }, func() { s.breakClaims(h, from, true) })
	return true
}

// healAll makes good what there is room for.
func (s *State) healAll(undo *journal) {
	for _, h := range append([]*host(nil), s.breakers...) {
		for _, f := range h.broken.first(h.broken.n) {
			s.heal(f, h, undo)
		}
	}
}

// yield follows what has come to h as a fact: who stands by there finds other hosts, or
// is exposed, as far as there is no room left for it.
func (s *State) yield(h *host) {
	if h.reserve.fits(h.free()) || s.makeRoom(h, Size{}, &journal{}) || s.shed(h, Size{}, nil) {
		return
	}
	s.dismiss(h, nil)
}

// maxMended bounds what one event mends.
const maxMended = 8

// mend tries again for containers that have no standby host, after an event that
// may have made room.
func (s *State) mend() {
	left := maxMended
	for _, c := range s.exposed.first(left) {
		if left--; !s.secure(c, nil) {
			return
		}
	}
	for left > 0 && len(s.breakers) > 0 {
		h := s.breakers[0]
		f := h.broken.first(1)[0]
		if left--; s.heal(f, h, nil) {
			continue
		}
		for _, c := range f.standingBy(h, left) {
			if left--; !s.secure(c, nil) {
				return
			}
		}
	}
}

// standingBy is at most n of h's containers that stand by on g.
func (h *host) standingBy(g *host, n int) []*container {
	var out []*container
	for _, c := range h.all.byID() {
		if len(out) == n {
			break
		}
		if c.standby[0] == g || c.standby[1] == g {
			out = append(out, c)
		}
	}
	return out
}
