package planner

import (
	"maps"
	"slices"
)

// finder gathers the feasible options for one container, and why the others
// were turned away.
type finder struct {
	d      *decision
	c      *container
	found  []candidate
	misses []missed
	// only, when not nil, are the hosts that pins and volumes leave.
	only      []*host
	onlyKnown bool
}

type missed struct {
	rule, layer string
	count       int
	who         string
	what        miss
	shortness   float64
	end         int // where its detail ends in a text that is being made
}

// add weighs an option; it says how many replicas of the service its host has.
func (f *finder) add(kind Kind, h *host, m *machine) int {
	beside := 0
	if len(f.d.replicas) > 0 {
		beside = f.d.replicas[h]
	}
	if h == f.d.not || h == f.d.nor || m != nil && f.d.into != nil && !f.d.into(f.c, m) {
		return beside
	}
	f.found = append(f.found, candidate{})
	a := &f.found[len(f.found)-1]
	a.kind, a.host, a.machine, a.beside = kind, h, m, beside
	f.d.weigh(f.c, a)
	return beside
}

// turnedAway counts n candidates excluded by x, of which who is one.
func (f *finder) turnedAway(layer, who string, x miss, n int) {
	if n <= 0 {
		return
	}
	shortness := float64(x.short.CPU)/1000 + float64(x.short.Memory)/gib
	for i := range f.misses {
		e := &f.misses[i]
		if e.rule != x.rule || e.layer != layer {
			continue
		}
		e.count += n
		if who != "" && (e.who == "" || shortness < e.shortness) {
			e.who, e.what, e.shortness = who, x, shortness
		}
		return
	}
	f.misses = append(f.misses, missed{rule: x.rule, layer: layer, count: n, who: who, what: x, shortness: shortness})
}

// pins returns the hosts that the container's host list and volumes leave, and
// whether they leave out any.
func (f *finder) pins() ([]*host, bool) {
	if f.onlyKnown {
		return f.only, f.only != nil
	}
	f.onlyKnown = true
	s, c := f.d.s, f.c
	if f.d.only != nil {
		f.only = []*host{f.d.only}
		return f.only, true
	}
	var ids []string
	restricted := false
	for _, v := range c.Volumes {
		at := s.volumes[v]
		if at == "" && len(s.users[v]) > 0 {
			at = s.users[v][0].host.ID
		}
		if at != "" && !slices.Contains(ids, at) {
			ids, restricted = append(ids, at), true
		}
	}
	if !restricted && len(c.Hosts) > 0 {
		ids, restricted = slices.Clone(c.Hosts), true
	}
	if !restricted {
		return nil, false
	}
	slices.Sort(ids)
	f.only = []*host{}
	for _, id := range slices.Compact(ids) {
		if h := s.hosts[id]; h != nil {
			f.only = append(f.only, h)
		}
	}
	return f.only, true
}

// pinRule names what restricts the hosts.
func (f *finder) pinRule() miss {
	for _, v := range f.c.Volumes {
		if at := f.d.s.volumes[v]; at != "" {
			return miss{rule: RuleVolume, detail: "volume " + v + " is on " + at}
		}
	}
	for _, v := range f.c.Volumes {
		if list := f.d.s.users[v]; len(list) > 0 {
			return miss{rule: RuleVolume, detail: "volume " + v + " is in use by " + list[0].ID}
		}
	}
	return miss{rule: RuleHost, detail: "pinned to other hosts"}
}

// search bounds a look-up: enough good candidates, or too long a search with some.
type search struct{ fresh, looked, found int }

// hit counts a good candidate with so many replicas of the service on its host.
func (x *search) hit(beside int) {
	x.found++
	if beside == 0 {
		x.fresh++
	}
}

// enough is how many good candidates of a kind are weighed: where there are many, the
// first ones are tight fits already.
func (f *finder) enough() int {
	if f.d.s.open.n > 256 {
		return maxWeighed / 3
	}
	return maxWeighed
}

func (x *search) on(enough int) bool {
	return x.fresh < enough && x.found < 2*enough && (x.looked < maxExamined || x.found == 0)
}

// machines finds free slots and machines that can grow.
func (f *finder) machines() {
	s, c := f.d.s, f.c
	k := groupOf(c.Isolation, c.Project)
	g := s.groups[k]
	others := len(s.machines) - s.perKind[c.Isolation]
	f.turnedAway("machine", "", miss{rule: RuleIsolation, detail: "of another isolation"}, others)
	f.turnedAway("machine", "", miss{rule: RuleProject, detail: "of other projects"}, s.perKind[c.Isolation]-g.size())
	if g == nil {
		return
	}
	if only, ok := f.pins(); ok {
		seen := 0
		for _, h := range only {
			for _, m := range h.machines {
				if m.group == g {
					seen++
					f.machine(m)
				}
			}
		}
		f.turnedAway("machine", "", f.pinRule(), g.size()-seen)
		return
	}
	f.turnedAway("machine", "", miss{rule: RuleDown, detail: "stopping, or on a host that takes nothing new"}, g.closed)
	// What is in the index takes something, and is of the group: where no rules matter
	// nothing but room does, and a look at the entry is mostly enough.
	own, easy := c.Isolation == Own, s.easy(c)
	free := func(m *machine) bool { return !own && (easy || !s.matters(c, m.host)) }
	// Free slots first; those that do not work out are counted below.
	var x search
	enough := f.enough()
	g.free.entries(c.need, func(e *entry[*machine]) bool {
		x.looked++
		if m := e.t; c.need.fits(e.space) && (free(m) || s.machineRules(c, m).ok()) {
			x.hit(f.add(Place, m.host, m))
		}
		return x.on(enough)
	})
	x = search{}
	g.room.entries(c.need, func(e *entry[*machine]) bool {
		x.looked++
		m, slot := e.t, c.need.fits(e.space)
		if (slot || c.need.fits(m.reach)) && free(m) {
			// Nothing else can turn it away.
		} else if v := s.machineRules(c, m); !v.ok() {
			f.turnedAway("machine", m.ID, v, 1)
			return x.on(enough)
		}
		if !slot {
			x.hit(f.add(Grow, m.host, m))
		}
		return x.on(enough)
	})
	f.lackingMachines(g)
}

// lackingMachines looks at some that surely have no room, for the reasons.
func (f *finder) lackingMachines(g *group) {
	s, c, looked := f.d.s, f.c, 0
	limit := maxExplained
	if len(f.found) > 0 {
		limit = maxNearMisses
	}
	g.room.lacking(c.need, func(cell *ordered[*machine]) {
		i := 0
		cell.all(func(m *machine) bool {
			if looked++; looked > limit {
				// The nearest were looked at; the rest lacks at least as much.
				f.turnedAway("machine", "", capacityMiss(c.need.shortOf(m.room())), cell.n-i)
				return false
			}
			i++
			if x := s.machineRules(c, m); !x.ok() {
				f.turnedAway("machine", m.ID, x, 1)
			}
			return true
		})
	})
}

func (f *finder) machine(m *machine) {
	switch x := f.d.s.machineRules(f.c, m); {
	case !x.ok():
		f.turnedAway("machine", m.ID, x, 1)
	case f.c.need.fits(m.free()):
		f.add(Place, m.host, m)
	default:
		f.add(Grow, m.host, m)
	}
}

// hosts finds where a machine can be booted, or the container run on metal.
func (f *finder) hosts(kind Kind) {
	s, c := f.d.s, f.c
	rules := func(h *host) miss {
		if kind == PlaceM {
			return s.metalRules(c, h)
		}
		return s.bootRules(c, h)
	}
	if kind == Boot && f.d.noBoot {
		return
	}
	if x := s.machineQuota(c, kind); !x.ok() {
		f.turnedAway("host", "", x, len(s.hosts))
		return
	}
	if only, ok := f.pins(); ok {
		for _, h := range only {
			if x := rules(h); !x.ok() {
				f.turnedAway("host", h.ID, x, 1)
			} else {
				f.add(kind, h, nil)
			}
		}
		f.turnedAway("host", "", f.pinRule(), len(s.hosts)-len(only))
		return
	}
	if closed := len(s.hosts) - s.open.n - len(s.off); closed > 0 {
		f.closed(closed)
	}
	var y search
	enough := f.enough()
	easy := kind == Boot && s.easy(c)
	look := func(h *host) bool {
		y.looked++
		var x miss
		if easy { // many are looked at, and those in the index take something
			x = bootCapacity(c.need, h)
		} else {
			x = rules(h)
		}
		if !x.ok() {
			f.turnedAway("host", h.ID, x, 1)
		} else {
			y.hit(f.add(kind, h, nil))
		}
		return y.on(enough)
	}
	if kind == Boot && c.Isolation == Project && f.d.switchable() {
		s.open.roomiest(c.need, look) // see WeightCrowd
	} else {
		s.open.fitting(c.need, look)
	}
	looked, limit := 0, maxExplained
	if len(f.found) > 0 {
		limit = maxNearMisses
	}
	s.open.lacking(c.need, func(cell *ordered[*host]) {
		i := 0
		cell.all(func(h *host) bool {
			if looked++; looked > limit {
				f.turnedAway("host", "", capacityMiss(c.need.shortOf(h.avail())), cell.n-i)
				return false
			}
			i++
			if x := rules(h); !x.ok() {
				f.turnedAway("host", h.ID, x, 1)
			}
			return true
		})
	})
}

// closed counts the hosts that are down or cordoned, naming one in small clusters.
func (f *finder) closed(n int) {
	who, what := "", miss{rule: RuleDown}
	if len(f.d.s.hosts) <= maxExplained {
		for _, id := range slices.Sorted(maps.Keys(f.d.s.hosts)) {
			if h := f.d.s.hosts[id]; !h.takes() && !h.Off {
				who, what = id, f.d.s.hostRules(f.c, h)
				break
			}
		}
	}
	f.turnedAway("host", who, what, n)
}

// reserved adds options on hosts that have room only if others keep back for a
// loss what they keep back now.
func (f *finder) reserved() {
	s, c := f.d.s, f.c
	looked := 0
	k := groupOf(c.Isolation, c.Project)
	for _, h := range s.standing {
		if !h.takes() || h.avail().fits(Size{}) && !c.need.fits(h.free()) || !c.need.fits(h.free()) {
			continue
		}
		if looked++; looked > maxStanding {
			return
		}
		kept := h.reserve
		h.reserve = Size{} // as if nothing were kept back
		if c.Isolation == Metal {
			if s.metalRules(c, h).ok() {
				f.add(PlaceM, h, nil)
			}
		} else {
			for _, m := range h.machines {
				if groupOf(m.Isolation, m.Project) == k && s.machineRules(c, m).ok() && !c.need.fits(m.free()) {
					f.add(Grow, h, m)
				}
			}
			if !f.d.noBoot && s.machineQuota(c, Boot).ok() && s.bootRules(c, h).ok() {
				f.add(Boot, h, nil)
			}
		}
		h.reserve = kept
	}
}
