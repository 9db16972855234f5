package planner

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// maxOptions bounds how many weighed options a Reason keeps.
const maxOptions = 4

// best is the number of the cheapest option.
func (f *finder) best() int {
	best := 0
	for i := 1; i < len(f.found); i++ {
		if f.found[i].less(&f.found[best]) {
			best = i
		}
	}
	return best
}

// ranked appends the numbers of the n cheapest options to out, which is empty,
// cheapest first.
func (f *finder) ranked(out []int, n int) []int {
	for i := range f.found {
		at := len(out)
		for at > 0 && f.found[i].less(&f.found[out[at-1]]) {
			at--
		}
		if at == n {
			continue
		}
		if len(out) < n {
			out = append(out, 0)
		}
		copy(out[at+1:], out[at:])
		out[at] = i
	}
	return out
}

// notable appends the options to keep: the cheapest, the chosen one, and the best of
// each action.
func (f *finder) notable(keep []int, chosen int) []int {
	keep = f.ranked(keep, maxOptions)
	if !slices.Contains(keep, chosen) {
		keep = append(keep, chosen)
	}
	for _, kind := range [...]Kind{Boot, Grow, Place} {
		best := -1
		for i := range f.found {
			if f.found[i].kind == kind && (best < 0 || f.found[i].less(&f.found[best])) {
				best = i
			}
		}
		if best >= 0 && !slices.Contains(keep, best) {
			keep = append(keep, best)
		}
	}
	return keep
}

// list is the exclusions, the machine layer first, most frequent first, and the
// sentence that more appends, all in one piece of text.
func (f *finder) list(more func([]byte) []byte) ([]Exclusion, string) {
	var out []Exclusion
	if len(f.misses) > 0 {
		out = make([]Exclusion, len(f.misses))
	}
	s := f.d.s
	b := s.text[:0]
	for i := range f.misses {
		b = f.misses[i].appendDetail(b)
		f.misses[i].end = len(b)
	}
	rest := len(b)
	if more != nil {
		b = more(b)
	}
	text := string(b)
	s.text = b
	start := 0
	for i := range f.misses {
		e := &f.misses[i]
		out[i] = Exclusion{Rule: e.rule, Layer: e.layer, Count: e.count, Detail: text[start:e.end]}
		start = e.end
	}
	slices.SortStableFunc(out, func(a, b Exclusion) int {
		if a.Layer != b.Layer {
			return strings.Compare(b.Layer, a.Layer)
		}
		if a.Count != b.Count {
			return b.Count - a.Count
		}
		return strings.Compare(a.Rule, b.Rule)
	})
	return out, text[rest:]
}

func (e *missed) appendDetail(b []byte) []byte {
	switch {
	case e.who == "":
		return e.what.appendText(b)
	case e.what.short.zero() || e.rule == RuleCapability:
		return e.appendWhole(b)
	case e.rule == RuleCeiling:
		return appends(e.what.short.appendTo(b), " above the ceiling at best (", e.who, ")")
	default:
		return appends(e.what.short.appendTo(b), " short at best (", e.who, ")")
	}
}

// appendWhole appends who and, if there is more to say, what.
func (e *missed) appendWhole(b []byte) []byte {
	b = append(append(b, e.who...), ' ')
	who := len(b)
	if b = e.what.appendText(b); len(b) == who {
		b = b[:who-1]
	}
	return b
}

// appendSentence says of one candidate why it was turned away: "m-5 was 1.2 CPU short".
func (e *missed) appendSentence(b []byte) []byte {
	switch {
	case e.what.short.zero() || e.rule == RuleCapability:
		return e.appendWhole(b)
	case e.rule == RuleCeiling:
		return append(e.what.short.appendTo(appends(b, e.who, " was ")), " short at its ceiling"...)
	case e.rule == RuleFailover:
		return append(e.what.short.appendTo(appends(b, e.who, " was ")), " short beside what it keeps for the loss of another host"...)
	default:
		return append(e.what.short.appendTo(appends(b, e.who, " was ")), " short"...)
	}
}

// nearest is the best near miss among machines, nil if there was none.
func (f *finder) nearest() *missed {
	var best *missed
	for i := range f.misses {
		e := &f.misses[i]
		if e.layer != "machine" || e.who == "" {
			continue
		}
		if best == nil || best.what.short.zero() && !e.what.short.zero() ||
			!e.what.short.zero() && e.shortness < best.shortness {
			best = e
		}
	}
	return best
}

// nothing says why a container fits nowhere.
func (f *finder) nothing() string {
	var parts []string
	for i := range f.misses {
		e := &f.misses[i]
		switch {
		case e.who != "":
			text := string(e.appendSentence(nil))
			switch {
			case e.count > 1 && e.what.short.zero():
				text += fmt.Sprintf(" (and %d likewise)", e.count-1)
			case e.count > 1:
				n := e.count
				if e.layer == "host" {
					n = min(n, len(f.d.s.hosts)) // one may be short for growth and for a boot
				}
				if n > 1 {
					text += fmt.Sprintf(" at best, of %s", plural(n, e.layer))
				}
			}
			parts = append(parts, text)
		case e.layer == "host":
			parts = append(parts, plural(e.count, "host")+" "+closedText(e))
		}
	}
	if len(f.d.s.hosts) == 0 {
		parts = append(parts, "there are no hosts")
	}
	return fmt.Sprintf("nothing fits %s (%s): %s", f.c.ID, f.c.need, strings.Join(parts, "; "))
}

func closedText(e *missed) string {
	if text := e.what.appendText(nil); len(text) > 0 {
		return "excluded: " + string(text)
	}
	if e.rule == RuleDown {
		return "down or cordoned"
	}
	return "excluded by rule " + e.rule
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// remedy is the cheapest change that would make room, tried out rule by rule.
func (f *finder) remedy() string {
	s, c := f.d.s, f.c
	rules := s.bootRules
	if c.Isolation == Metal {
		rules = s.metalRules
	}
	ids := slices.Sorted(maps.Keys(s.hosts))
	works := func() string {
		for _, id := range ids {
			if rules(c, s.hosts[id]).ok() {
				return id
			}
		}
		return ""
	}
	for _, id := range ids {
		if h := s.hosts[id]; h.Cordoned && !h.Down {
			h.Cordoned = false
			ok := rules(c, h).ok()
			h.Cordoned = true
			if ok {
				return fmt.Sprintf("let %s take work again (tandem host restore %s)", id, id)
			}
		}
	}
	saved := c.demands
	defer func() { c.demands = saved }()
	// without is what c asks for, less what change takes away.
	without := func(change func(*demands)) {
		less := *saved
		change(&less)
		c.demands = &less
	}
	if without(func(x *demands) { x.Ports = nil }); len(saved.Ports) > 0 {
		if id := works(); id != "" {
			x := portRule(&container{ID: c.ID, Project: c.Project, Service: c.Service, demands: saved}, s.hosts[id])
			return fmt.Sprintf("publish another port: on %s %s", id, x.detail)
		}
	}
	if without(func(x *demands) { x.Hosts = nil }); len(saved.Hosts) > 0 {
		if id := works(); id != "" {
			return fmt.Sprintf("allow %s too: it has room, and is not one of the hosts asked for", id)
		}
	}
	if without(func(x *demands) { x.Zones = nil }); len(saved.Zones) > 0 {
		if id := works(); id != "" {
			return fmt.Sprintf("add a host in zone %s, or allow %s too: it has room, and is in zone %q", strings.Join(saved.Zones, " or "), id, s.hosts[id].Zone)
		}
	}
	if without(func(x *demands) { x.Anti = nil }); len(saved.Anti) > 0 {
		if id := works(); id != "" {
			return fmt.Sprintf("relax the rules on company: without them it fits on %s", id)
		}
	}
	if without(func(x *demands) { x.Volumes = nil }); len(saved.Volumes) > 0 {
		if id := works(); id != "" {
			return fmt.Sprintf("make room where its volumes are (%s), or do without them on %s", f.pinRule().detail, id)
		}
	}
	c.demands = saved
	if c.Isolation == Metal && !slices.ContainsFunc(ids, func(id string) bool { return s.hosts[id].Capabilities.Metal }) {
		return "choose another isolation: no host runs containers outside of machines"
	}
	return f.capacityRemedy(ids)
}

// mendable says whether room for this near miss could be made: a ceiling that its
// host could not exceed anyway is no advice.
func (f *finder) mendable(e *missed) bool {
	m := f.d.s.machines[e.who]
	if e.layer != "machine" || e.rule != RuleCeiling || m == nil {
		return true
	}
	return !m.fresh && m.used().add(f.c.need).fits(m.host.top) && e.what.short.fits(m.host.free())
}

// capacityRemedy names the smallest amount to free, or the host to add.
func (f *finder) capacityRemedy(ids []string) string {
	s, need := f.d.s, f.c.need
	whole := need
	best := -1
	for i, e := range f.misses {
		if e.who != "" && !e.what.short.zero() && f.mendable(&e) && (best < 0 || e.shortness < f.misses[best].shortness) {
			best = i
		}
	}
	possible := false
	for _, id := range ids {
		h := s.hosts[id]
		w := need
		if f.c.Isolation != Metal {
			w = bootSize(h, need).add(h.MachineExtra)
		}
		whole = whole.max(w)
		possible = possible || w.fits(h.Capacity) && (f.c.Isolation == Metal || bootSize(h, need).fits(h.top))
	}
	switch {
	case !possible && len(ids) > 0:
		return fmt.Sprintf("ask for less, or add a larger host: no host could hold it even when empty; one with %s would", whole)
	case best >= 0:
		e := f.misses[best]
		if e.rule == RuleCeiling && e.layer == "machine" {
			return fmt.Sprintf("raise the ceiling of %s by %s, or add a host with %s free", e.who, e.what.short, whole)
		}
		return fmt.Sprintf("free %s on %s, or add a host with %s free", e.what.short, e.who, whole)
	}
	return fmt.Sprintf("add a host with %s free", whole)
}
