package planner

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Search bounds: how many candidates of a kind are weighed, and how many
// machines or hosts are looked at to find them or to explain why not.
const (
	maxWeighed   = 64
	maxExamined  = 4096
	maxExplained = 256
)

// decision is a plan in the making. It works on the state itself and takes
// everything back at the end.
type decision struct {
	s     *State
	undo  []func()
	left  map[groupKey]Size // requests of the question not placed yet
	from  map[*machine]Size // sizes before the first growth
	fresh int               // machines booted, for their names
	done  []placed
	out   []Unplaced
	loose bool // second try: ignore spread, largest first
}

type placed struct {
	c       *container
	chosen  *candidate
	machine *machine
	weighed []*candidate
	misses  []Exclusion
	near    string // "m-5 was 1.2 CPU short"
}

// Decide answers a question; the state is as before afterwards. Errors are about
// the question itself (unknown or placed containers); what fits nowhere is in
// Plan.Unplaced.
func (s *State) Decide(q Question) (*Plan, error) {
	switch {
	case q.Trim != nil && q.Place != nil:
		return nil, errors.New("question with both Place and Trim: ask one at a time")
	case q.Trim != nil:
		return s.trim(q.Trim)
	case q.Place == nil:
		return nil, errors.New("empty question: set Place or Trim")
	}
	list := make([]*container, 0, len(q.Place))
	for _, id := range q.Place {
		c := s.containers[id]
		if c == nil {
			return nil, fmt.Errorf("place container %q: not known; SetContainer it first", id)
		}
		if c.host != nil {
			return nil, fmt.Errorf("place container %s: it is already on %s", id, c.Host)
		}
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *container) int { return strings.Compare(a.ID, b.ID) })
	list = slices.Compact(list)
	plan := s.try(list, false)
	if len(plan.Unplaced) > 0 && len(list) > 1 {
		// Packing in another order may serve more of them.
		if other := s.try(list, true); len(other.Unplaced) < len(plan.Unplaced) {
			plan = other
		}
	}
	return plan, nil
}

// try places the containers one after the other and rolls back.
func (s *State) try(list []*container, loose bool) *Plan {
	d := &decision{s: s, left: map[groupKey]Size{}, from: map[*machine]Size{}, loose: loose}
	defer func() {
		for i := len(d.undo) - 1; i >= 0; i-- {
			d.undo[i]()
		}
	}()
	for _, c := range list {
		k := groupOf(c.Isolation, c.Project)
		d.left[k] = d.left[k].add(c.need)
	}
	for _, c := range d.order(list) {
		d.decide(c)
		k := groupOf(c.Isolation, c.Project)
		d.left[k] = d.left[k].sub(c.need)
	}
	return d.plan()
}

// order: the constrained before the free, the large before the small, so that
// the rest finds the gaps.
func (d *decision) order(list []*container) []*container {
	var whole Size
	for _, c := range list {
		whole = whole.add(c.need)
	}
	weight := func(c *container) float64 {
		return max(share(c.need.CPU, whole.CPU), share(c.need.Memory, whole.Memory))
	}
	pinned := func(c *container) int {
		switch {
		case d.loose:
			return 0
		case len(c.Hosts) > 0, slices.ContainsFunc(c.Volumes, func(v string) bool { return d.s.volumes[v] != "" }):
			return 0
		case len(c.Ports) > 0, len(c.Anti) > 0:
			return 1
		}
		return 2
	}
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b *container) int {
		if x, y := pinned(a), pinned(b); x != y {
			return x - y
		}
		if x, y := weight(a), weight(b); x != y {
			if x > y {
				return -1
			}
			return 1
		}
		return strings.Compare(a.ID, b.ID)
	})
	return list
}

// decide places one container on the tentative state.
func (d *decision) decide(c *container) {
	f := &finder{d: d, c: c}
	if c.Isolation == Metal {
		f.hosts(PlaceM)
	} else {
		f.machines()
		f.hosts(Boot)
	}
	if len(f.found) == 0 {
		d.out = append(d.out, Unplaced{
			Container: c.ID,
			Reason:    Reason{Summary: f.nothing(), Exclusions: f.list()},
			Remedy:    f.remedy(),
		})
		return
	}
	best := f.found[0]
	for _, a := range f.found[1:] {
		if a.less(best) {
			best = a
		}
	}
	p := placed{c: c, chosen: best, weighed: notable(f.found, best), misses: f.list(), near: f.nearest()}
	p.machine = d.apply(c, best)
	d.done = append(d.done, p)
}

// apply carries an option out on the tentative state.
func (d *decision) apply(c *container, a *candidate) *machine {
	s, m := d.s, a.machine
	switch a.kind {
	case Boot:
		m = &machine{fresh: true, Machine: Machine{
			ID: d.name(), Host: a.host.ID, Isolation: c.Isolation, Project: c.Project,
			Size: a.to, Ceiling: a.host.ceiling().max(a.to),
		}}
		if c.Isolation == Shared {
			m.Project = ""
		}
		s.addMachine(m)
		d.undo = append(d.undo, func() { s.dropMachine(m) })
	case Grow:
		before := m.Size
		if _, ok := d.from[m]; !ok {
			d.from[m] = before
		}
		s.resize(m, a.to)
		d.undo = append(d.undo, func() { s.resize(m, before) })
	}
	s.place(c, a.host, m)
	d.undo = append(d.undo, func() { s.unplace(c) })
	for _, v := range c.Volumes {
		if s.volumes[v] == "" {
			s.setVolume(v, a.host.ID)
			d.undo = append(d.undo, func() { s.setVolume(v, "") })
		}
	}
	return m
}

// name makes the next temporary machine name.
func (d *decision) name() string {
	for {
		d.fresh++
		id := "new-" + strconv.Itoa(d.fresh)
		if d.s.machines[id] == nil {
			return id
		}
	}
}

// plan puts the placements into actions: a machine is booted or grown once, to
// its final size, before the first container that needs it.
func (d *decision) plan() *Plan {
	p := &Plan{Revision: d.s.rev, Unplaced: d.out}
	seen := map[*machine]bool{}
	for _, x := range d.done {
		m := x.machine
		if m == nil {
			p.Actions = append(p.Actions, Action{Kind: PlaceM, Container: x.c.ID, Host: x.chosen.host.ID, Reason: x.reason()})
			continue
		}
		if !seen[m] {
			seen[m] = true
			if from, grown := d.from[m]; m.fresh {
				ceiling := m.Ceiling
				if !m.host.Capabilities.Grow {
					ceiling = m.Size
				}
				p.Actions = append(p.Actions, Action{Kind: Boot, Machine: m.ID, Host: m.Host, To: m.Size,
					Project: m.Project, Isolation: m.Isolation, Ceiling: ceiling})
			} else if grown {
				p.Actions = append(p.Actions, Action{Kind: Grow, Machine: m.ID, Host: m.Host, From: from, To: m.Size})
			}
		}
		p.Actions = append(p.Actions, Action{Kind: Place, Container: x.c.ID, Machine: m.ID, Host: m.Host, Reason: x.reason()})
	}
	return p
}
