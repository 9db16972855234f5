package planner

import (
	"cmp"
	"maps"
	"slices"
)

// Cover tries harder than events do to find standby hosts for whoever is exposed: for
// everything on his host anew, the large before the small, into the smallest gaps. At
// most so many hosts are tried, others at the next call; when that is all there are,
// then at last all of them together. It says how many containers are exposed afterwards.
// For idle moments: it costs a search for each container of the hosts tried.
func (s *State) Cover(hosts int) int {
	list := s.exposedList()
	if len(list) == 0 || s.policy.HostLosses == 0 {
		return len(list)
	}
	var from []*host
	for _, c := range list {
		if !slices.Contains(from, c.host) {
			from = append(from, c.host)
		}
	}
	slices.SortFunc(from, func(a, b *host) int { return cmp.Compare(a.ID, b.ID) })
	next, _ := slices.BinarySearchFunc(from, s.coveredTo, func(h *host, id string) int { return cmp.Compare(h.ID, id+"\x00") })
	changed := false
	for i := range min(hosts, len(from)) {
		f := from[(next+i)%len(from)]
		s.coveredTo = f.ID
		if s.coverHosts([]*host{f}) {
			changed = true
		}
	}
	if changed {
		s.rev++
		list = s.exposedList()
	}
	if len(list) == 0 || len(s.hosts) > hosts {
		return len(list)
	}
	var all []*host
	for _, id := range slices.Sorted(maps.Keys(s.hosts)) {
		all = append(all, s.hosts[id])
	}
	if s.coverHosts(all) {
		s.rev++
		list = s.exposedList()
	}
	return len(list)
}

// coverHosts finds standby hosts for all on these hosts anew; nothing is changed unless
// more of them have all their standby hosts then.
func (s *State) coverHosts(from []*host) bool {
	type before struct {
		c       *container
		standby [2]*host
		exposed bool
	}
	type breach struct{ from, on *host }
	var list []before
	var broken []breach
	lacking := 0
	for _, f := range from {
		for _, c := range f.all.byID() {
			if s.covered(c) {
				list = append(list, before{c, c.standby, c.exposed})
				if c.exposed || s.void(c, 0) || s.void(c, 1) {
					lacking++
				}
			}
		}
		for _, g := range s.breakers {
			if g.breaks(f) {
				broken = append(broken, breach{f, g})
			}
		}
	}
	clear := func() {
		for _, x := range list {
			s.release(x.c)
		}
		for _, b := range broken {
			s.breakClaims(b.on, []*host{b.from}, false)
		}
	}
	was := slices.Clone(list)
	for _, larger := range []func(a, b Size) int{
		func(a, b Size) int { return cmp.Compare(b.Memory, a.Memory) },
		func(a, b Size) int { return cmp.Compare(b.CPU, a.CPU) },
	} {
		clear()
		slices.SortStableFunc(list, func(a, b before) int { return larger(a.c.need, b.c.need) })
		now := 0
		for _, x := range list {
			if !s.secureTight(x.c) {
				now++
			}
		}
		if now < lacking {
			return true
		}
	}
	clear()
	for _, b := range broken {
		s.breakClaims(b.on, []*host{b.from}, true)
	}
	for _, x := range was {
		for slot, g := range x.standby {
			if g != nil {
				s.stand(x.c, slot, g)
			}
		}
		s.setExposed(x.c, x.exposed)
	}
	return false
}

// secureTight is secure into the smallest gaps, for c without any standby host.
func (s *State) secureTight(c *container) bool {
	for slot := range s.policy.HostLosses {
		g := s.findStandby(c, nil, true)
		if g == nil {
			s.setExposed(c, true)
			return false
		}
		s.stand(c, slot, g)
	}
	return true
}
