package planner

// Rules between containers hold after a loss too: what stands by on a host is a
// shadow there. Shadows of different hosts don't meet when one host may be lost;
// when two may, all shadows of a host are taken to meet.

// meets says whether the shadows of two containers on one host may come true at
// the same time.
func (s *State) meets(a, b *container) bool {
	return s.policy.HostLosses > 1 || a.host == b.host
}

// shadowsOf counts the shadows on g of a service that may meet c's.
func (s *State) shadowsOf(k serviceKey, g *host, c *container) int {
	if k.service == "" {
		return 0
	}
	on := func(f *host) (n int) {
		if f.all.count(k) == 0 || claimAt(f, g) < 0 {
			return 0
		}
		for _, o := range f.all.members {
			if o != c && o.service() == k && (o.standby[0] == g || o.standby[1] == g) {
				n++
			}
		}
		return n
	}
	if c.host != nil && s.policy.HostLosses < 2 {
		return on(c.host)
	}
	n := 0
	for f := range s.services[k] { // a sum: order does not matter
		n += on(f)
	}
	return n
}

// reach is whom on g a rule of o about c, or about all if c is nil, may meet: a rule
// about machines speaks of the host's own kernel where both run on metal.
func (r AntiRule) reach(o, c *container, g *host) *box {
	switch {
	case r.Layer == "host":
		return &g.all
	case r.Layer == "machine" && o.Isolation == Metal && (c == nil || c.Isolation == Metal):
		return &g.metal
	}
	return nil
}

// shadowRules checks c, which is on a host, as a shadow on g against those there.
func (s *State) shadowRules(c *container, g *host) bool {
	for _, r := range c.Anti {
		k := serviceKey{c.Project, r.Service}
		if b := r.reach(c, nil, g); b != nil && b.count(k)+s.shadowsOf(k, g, c) > r.Max {
			return false
		}
	}
	for _, o := range g.shadows {
		if o != c && s.meets(o, c) && !s.friends(c, o, g) {
			return false
		}
	}
	// Those who live there must bear it with all other shadows.
	for _, o := range g.all.anti {
		for _, r := range o.Anti {
			if b := r.reach(o, c, g); b != nil && r.Service == c.Service && o.Project == c.Project &&
				besides(o, b, c.service())+s.shadowsOf(c.service(), g, c)+1 > r.Max {
				return false
			}
		}
	}
	return true
}

// friends says whether c, as a shadow or for real, may be on g beside shadow o.
func (s *State) friends(c, o *container, g *host) bool {
	for _, r := range o.Anti {
		b := r.reach(o, c, g)
		if b == nil || r.Service != c.Service || o.Project != c.Project {
			continue
		}
		k := c.service()
		if b.count(k)+s.shadowsOf(k, g, o)+1 > r.Max {
			return false
		}
	}
	if c.Service != "" && c.service() == o.service() {
		return true
	}
	for _, p := range c.Ports {
		for _, q := range o.Ports {
			if p.overlaps(q) {
				return false
			}
		}
	}
	return true
}

// nobody is a container that is nowhere and has no shadows.
var nobody = &container{demands: noDemands}

// besides counts a service in b without o itself.
func besides(o *container, b *box, k serviceKey) int {
	n := b.count(k)
	if o.Service != "" && o.service() == k {
		n--
	}
	return n
}

// residentRule checks c, as a newcomer on h, against the shadows there: they must
// find the rules kept when they come true.
func (s *State) residentRule(c *container, h *host) miss {
	if len(h.claims) == 0 {
		return miss{}
	}
	for _, o := range h.shadows {
		if o != c && o.host != h && !s.friends(c, o, h) {
			return miss{rule: RuleFailover, detail: "is where " + o.ID + " would start if " + o.hostID() + " were lost, which must not be beside it"}
		}
	}
	for _, r := range c.Anti {
		k := serviceKey{c.Project, r.Service}
		b := r.reach(c, nil, h)
		if b == nil || k.service == "" || len(s.services[k]) == 0 {
			continue
		}
		if b.count(k)+s.shadowsOf(k, h, nobody) > r.Max {
			return miss{rule: RuleFailover, detail: "is where " + r.Service + " would start after a loss, which must not be beside it"}
		}
	}
	if c.Service == "" {
		return miss{}
	}
	for _, o := range h.all.anti { // who lives there must bear it and its like that would come
		for _, r := range o.Anti {
			b := r.reach(o, c, h)
			if b == nil || r.Service != c.Service || o.Project != c.Project || o == c {
				continue
			}
			k := c.service()
			if besides(o, b, k)+s.shadowsOf(k, h, nobody)+1 > r.Max {
				return miss{rule: RuleFailover, detail: "is where more of " + c.Service + " would start after a loss than " + o.ID + " allows beside it"}
			}
		}
	}
	return miss{}
}

// makeWay lets c come to h after a loss, or as a fact: who stands by there and could
// not bear it, or who it could not bear, finds another standby host or is exposed.
// Those whose own host is down start there themselves and stay.
func (s *State) makeWay(c *container, h *host, undo *journal) {
	for s.residentRule(c, h).rule == RuleFailover {
		o := s.inTheWay(c, h)
		if o == nil {
			return
		}
		slot := 0
		if o.standby[0] != h {
			slot = 1
		}
		if s.restand(o, slot, h, undo) {
			continue
		}
		s.unstand(o, slot)
		undo.note(func() { s.unstand(o, slot) }, func() { s.stand(o, slot, h) })
		s.expose(o, undo)
	}
}

// inTheWay is one of the shadows that keep c from h, the first by id; nil: none does, or
// none that may go.
func (s *State) inTheWay(c *container, h *host) *container {
	for _, o := range h.shadows {
		if o != c && o.host != h && !o.host.Down && !s.friends(c, o, h) {
			return o
		}
	}
	for _, r := range c.Anti {
		k := serviceKey{c.Project, r.Service}
		if b := r.reach(c, nil, h); b != nil && b.count(k)+s.shadowsOf(k, h, nobody) > r.Max {
			if o := firstShadow(k, h, c); o != nil {
				return o
			}
		}
	}
	for _, o := range h.all.anti {
		for _, r := range o.Anti {
			if b := r.reach(o, c, h); b != nil && r.Service == c.Service && o.Project == c.Project && o != c &&
				besides(o, b, c.service())+s.shadowsOf(c.service(), h, nobody)+1 > r.Max {
				if x := firstShadow(c.service(), h, c); x != nil {
					return x
				}
			}
		}
	}
	return nil
}

// firstShadow is the first shadow on h, by id, of a service, but for c and those whose
// host is down.
func firstShadow(k serviceKey, h *host, c *container) (first *container) {
	for _, x := range h.claims {
		if x.from.Down || x.from.all.count(k) == 0 {
			continue
		}
		for _, o := range x.from.all.members {
			if o != c && o.service() == k && (o.standby[0] == h || o.standby[1] == h) && (first == nil || o.ID < first.ID) {
				first = o
			}
		}
	}
	return first
}

// zoneShadows counts a service's containers in other zones that stand by in this one.
// Once a project has rules about zones no more of them come.
func (s *State) zoneShadows(k serviceKey, zone string) int {
	n := 0
	if s.policy.HostLosses == 0 || k.service == "" {
		return 0
	}
	for f := range s.services[k] { // a sum: order does not matter
		if f.Zone == zone {
			continue
		}
		for _, o := range f.all.members {
			if o.service() == k && (o.standby[0] != nil && o.standby[0].Zone == zone || o.standby[1] != nil && o.standby[1].Zone == zone) {
				n++
			}
		}
	}
	return n
}
