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
	found  []*candidate
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
}

func (f *finder) add(kind Kind, h *host, m *machine) *candidate {
	a := &candidate{kind: kind, host: h, machine: m}
	f.d.weigh(f.c, a)
	f.found = append(f.found, a)
	return a
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
	var ids []string
	restricted := false
	for _, v := range c.Volumes {
		at := s.volumes[v]
		if at == "" && len(s.users[v]) > 0 {
			at = s.users[v][0].Host
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
	// Free slots first; those that do not work out are counted below.
	fresh, looked := 0, 0
	g.free.fitting(c.need, func(m *machine) bool {
		looked++
		if c.need.fits(m.free()) && s.machineRules(c, m).ok() {
			f.add(Place, m.host, m)
			if m.host.all.count(c.service()) == 0 {
				fresh++
			}
		}
		return fresh < maxWeighed && (looked < maxExamined || len(f.found) == 0)
	})
	fresh, looked = 0, 0
	g.room.fitting(c.need, func(m *machine) bool {
		looked++
		x := s.machineRules(c, m)
		switch {
		case !x.ok():
			f.turnedAway("machine", m.ID, x, 1)
		case !c.need.fits(m.free()):
			f.add(Grow, m.host, m)
			if m.host.all.count(c.service()) == 0 {
				fresh++
			}
		}
		return fresh < maxWeighed && (looked < maxExamined || len(f.found) == 0)
	})
	looked = 0
	g.room.lacking(c.need, func(cell []*machine) {
		for i, m := range cell {
			if looked++; looked > maxExplained {
				// The nearest were looked at; the rest lacks at least as much.
				f.turnedAway("machine", "", capacityMiss(c.need.shortOf(m.room())), len(cell)-i)
				return
			}
			if x := s.machineRules(c, m); !x.ok() {
				f.turnedAway("machine", m.ID, x, 1)
			}
		}
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
	rules := s.bootRules
	if kind == PlaceM {
		rules = s.metalRules
	}
	if only, ok := f.pins(); ok {
		for _, h := range only {
			if x := rules(c, h); !x.ok() {
				f.turnedAway("host", h.ID, x, 1)
			} else {
				f.add(kind, h, nil)
			}
		}
		f.turnedAway("host", "", f.pinRule(), len(s.hosts)-len(only))
		return
	}
	if closed := len(s.hosts) - s.open.n; closed > 0 {
		f.closed(closed)
	}
	fresh, looked, found := 0, 0, 0
	s.open.fitting(c.need, func(h *host) bool {
		looked++
		if x := rules(c, h); !x.ok() {
			f.turnedAway("host", h.ID, x, 1)
		} else {
			f.add(kind, h, nil)
			found++
			if h.all.count(c.service()) == 0 {
				fresh++
			}
		}
		return fresh < maxWeighed && (looked < maxExamined || found == 0)
	})
	looked = 0
	s.open.lacking(c.need, func(cell []*host) {
		for i, h := range cell {
			if looked++; looked > maxExplained {
				f.turnedAway("host", "", capacityMiss(c.need.shortOf(h.free())), len(cell)-i)
				return
			}
			if x := rules(c, h); !x.ok() {
				f.turnedAway("host", h.ID, x, 1)
			}
		}
	})
}

// closed counts the hosts that are down or cordoned, naming one in small clusters.
func (f *finder) closed(n int) {
	who, what := "", miss{rule: RuleDown}
	if len(f.d.s.hosts) <= maxExplained {
		for _, id := range slices.Sorted(maps.Keys(f.d.s.hosts)) {
			if h := f.d.s.hosts[id]; !h.takes() {
				who, what = id, f.d.s.hostRules(f.c, h)
				break
			}
		}
	}
	f.turnedAway("host", who, what, n)
}
