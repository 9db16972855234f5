package planner

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Search bounds: how many candidates of a kind are weighed, how many machines or
// hosts are looked at to find them or to explain why not, and how far the
// guarantee looks. A feasible place is found whatever they are.
const (
	maxWeighed    = 36
	maxExamined   = 512
	maxExplained  = 256
	maxNearMisses = 4
	maxStanding   = 512
	maxClaims     = 4096
	maxSecured    = 16 // options tried against the guarantee
	maxShifted    = 64 // claims shifted in a plan that is in a hurry
)

// decision is a plan in the making. It works on the state itself and takes
// everything back at the end.
type decision struct {
	s       *State
	undo    journal
	left    map[groupKey]Size // requests of the question not placed yet
	from    map[*machine]Size // sizes before the first growth
	fresh   int               // machines booted, for their names
	actions []Action
	at      map[*machine]int // where a machine is booted or grown in actions
	out     []Unplaced
	loose   bool // second try: ignore spread, largest first
	asked   int  // containers in the question
	noPower bool // hosts stay as they are
	noBoot  bool // machines that are there must do
	relaxed bool // after a loss: the guarantee is kept where it can be
	hurry   bool // after a loss: who keeps what back is seen to later
	shifted int  // claims that others were asked to keep back, in a hurry
	evict   bool // batch work may give way
	// replicas is where the service of the container being decided runs.
	replicas map[*host]int
	only     *host          // nothing but this host
	not      *host          // anything but this host
	nor      *host          // nor this
	powered  bool           // a host was switched on for the container being decided
	reached  map[*host]bool // machines were to migrate there
	// tooLarge is what machines of a lost host needed that found none.
	tooLarge []Size
	into     func(*container, *machine) bool // when not nil: only machines that it allows
}

// Decide answers a question; the state is as before afterwards. Errors are about
// the question itself (unknown or placed containers); what fits nowhere is in
// Plan.Unplaced.
func (s *State) Decide(q Question) (*Plan, error) {
	n := 0
	for _, set := range []bool{q.Place != nil, q.Trim != nil, q.HostLost != nil, q.EmptyHost != nil, q.Rebalance != nil, q.Consolidate != nil, q.Fold != nil, q.Room != nil, q.WhatIf != nil} {
		if set {
			n++
		}
	}
	switch {
	case n == 0:
		return nil, errors.New("empty question: set one of its fields")
	case n > 1:
		return nil, errors.New("question with several fields set: ask one at a time")
	case q.Trim != nil:
		return s.trim(q.Trim)
	case q.HostLost != nil:
		return s.hostLost(q.HostLost)
	case q.EmptyHost != nil:
		return s.emptyHosts(q.EmptyHost)
	case q.Rebalance != nil:
		return s.rebalance(*q.Rebalance)
	case q.Consolidate != nil:
		return s.consolidate(*q.Consolidate)
	case q.Fold != nil:
		return s.fold(*q.Fold)
	case q.Room != nil:
		return s.roomAhead(q.Room)
	case q.WhatIf != nil:
		return s.whatIf(q.WhatIf)
	}
	return s.placeAll(q.Place)
}

func (s *State) placeAll(ids []string) (*Plan, error) {
	list := make([]*container, 0, len(ids))
	for _, id := range ids {
		c := s.containers[id]
		if c == nil {
			return nil, fmt.Errorf("place container %q: not known; SetContainer it first", id)
		}
		if c.host != nil {
			return nil, fmt.Errorf("place container %s: it is already on %s", id, c.hostID())
		}
		list = append(list, c)
	}
	if len(list) > 1 {
		slices.SortFunc(list, func(a, b *container) int { return strings.Compare(a.ID, b.ID) })
		list = slices.Compact(list)
	}
	plan := s.try(list, false)
	if len(plan.Unplaced) > 0 && len(list) > 1 {
		// Packing in another order may serve more of them.
		if other := s.try(list, true); len(other.Unplaced) < len(plan.Unplaced) ||
			len(s.pools) > 0 && len(other.Unplaced) == len(plan.Unplaced) {
			plan = other
		}
	}
	return plan, nil
}

func (s *State) decision() *decision {
	d := &decision{s: s, undo: s.spare}
	s.spare = nil
	return d
}

// back takes everything back.
func (d *decision) back() { d.s.rollback(&d.undo, 0) }

// try places the containers one after the other and rolls back.
func (s *State) try(list []*container, loose bool) *Plan {
	d := s.idle
	if d == nil {
		d = &decision{}
	}
	clear(d.at)
	clear(d.from)
	*d = decision{s: s, undo: s.spare, at: d.at, from: d.from, loose: loose, asked: len(list), evict: s.policy.Evict}
	s.spare, s.idle = nil, nil // in use
	defer func() {
		d.back()
		d.undo, d.actions, d.out = nil, nil, nil // they are the plan's
		s.idle = d
	}()
	d.placeList(list)
	return d.plan()
}

func (d *decision) placeList(list []*container) {
	if len(list) > 1 {
		d.left = map[groupKey]Size{}
		for _, c := range list {
			k := groupOf(c.Isolation, c.Project)
			d.left[k] = d.left[k].add(c.need)
		}
		list = d.order(list)
	}
	for _, c := range list {
		d.decide(c)
		if d.left != nil {
			k := groupOf(c.Isolation, c.Project)
			d.left[k] = d.left[k].sub(c.need)
		}
	}
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
	due := map[*container]float64{}
	if d.loose && len(d.s.pools) > 0 { // not all fits: shares decide
		ahead := map[string]float64{}
		for _, c := range list {
			part := max(share(c.need.CPU, d.s.total.CPU), share(c.need.Memory, d.s.total.Memory))
			due[c] = d.s.due(c, ahead[c.Pool])
			ahead[c.Pool] += part
		}
	}
	slices.SortFunc(list, func(a, b *container) int {
		if a.Class != b.Class {
			return int(a.Class) - int(b.Class) // who gives way comes last
		}
		if x := cmp.Compare(due[a], due[b]); x != 0 {
			return x
		}
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

// decide places one container on the tentative state, or says why it can't.
func (d *decision) decide(c *container) bool {
	s := d.s
	if x := s.admission(c); !x.ok() {
		d.refuse(c, x)
		return false
	}
	f := s.finder
	if f == nil {
		f = &finder{}
	}
	*f = finder{d: d, c: c, found: f.found[:0], misses: f.misses[:0]}
	s.finder = nil // in use: a decision inside this one takes its own
	defer func() { s.finder = f }()
	d.replicas, d.powered = nil, false
	if c.Service != "" {
		d.replicas = s.services[c.service()]
	}
	if c.Isolation == Metal {
		f.hosts(PlaceM)
	} else {
		f.machines()
		f.hosts(Boot)
	}
	if d.tooCrowded(f) && d.power(f) {
		return true
	}
	if d.settle(f) {
		return true
	}
	if s.policy.HostLosses > 0 || len(s.standing) > 0 {
		n := len(f.found)
		f.reserved()
		if len(f.found) > n && d.settle(f) {
			return true
		}
	}
	if !d.noPower && d.power(f) {
		return true
	}
	if d.evict && c.Class == Latency && d.giveWay(f) {
		return true
	}
	u := Unplaced{Container: c.ID, Reason: Reason{Summary: f.nothing()}, Remedy: f.remedy()}
	u.Reason.Exclusions, _ = f.list(nil)
	d.out = append(d.out, u)
	return false
}

// refuse is for what no place can mend.
func (d *decision) refuse(c *container, x miss) {
	remedy := "raise the quota of project " + c.Project + ", or remove something of it"
	if x.rule == RulePool {
		remedy = "raise the limit of the pool, or lower what others have reserved"
	}
	d.out = append(d.out, Unplaced{Container: c.ID, Remedy: remedy, Reason: Reason{
		Summary:    fmt.Sprintf("%s (%s) is not admitted: %s", c.ID, c.need, x.detail),
		Exclusions: []Exclusion{{Rule: x.rule, Layer: "cluster", Count: 1, Detail: x.detail}},
	}})
}

// settle takes the cheapest option that keeps the guarantee.
func (d *decision) settle(f *finder) bool {
	if len(f.found) == 0 {
		return false
	}
	if d.s.policy.HostLosses == 0 && len(d.s.standing) == 0 {
		d.choose(f, f.best())
		return true
	}
	start := len(d.undo)
	if d.choose(f, f.best()) {
		return true
	}
	d.s.rollback(&d.undo, start)
	var numbers [maxSecured]int
	for _, i := range f.ranked(numbers[:0], maxSecured)[1:] {
		if d.choose(f, i) {
			return true
		}
		d.s.rollback(&d.undo, start)
	}
	f.turnedAway("host", "", miss{rule: RuleFailover, detail: "no other host would have room for it after a loss"}, len(f.found))
	return false
}

// choose carries out option i and keeps it with its reason, if the guarantee allows.
func (d *decision) choose(f *finder, i int) bool {
	a := f.found[i]
	if !d.roomFor(&a, f.c) {
		return false
	}
	m := d.apply(f.c, &a)
	if !d.s.secure(f.c, &d.undo) && !d.relaxed {
		return false
	}
	d.record(f, i, m)
	return true
}

// roomFor frees on the option's host what it keeps back, if need be.
func (d *decision) roomFor(a *candidate, c *container) bool {
	var want Size
	switch a.kind {
	case Grow:
		want = a.grown
	case Boot:
		want = a.to.add(a.host.MachineExtra)
	case PlaceM:
		want = c.need
	}
	return want.fits(a.host.avail()) || d.takeReserve(a.host, want)
}

// takeReserve makes room on h out of what is kept back there: others keep it back or,
// where the guarantee may be given up, nobody does.
func (d *decision) takeReserve(h *host, need Size) bool {
	limit := h.free().sub(need)
	if !(Size{}).fits(limit) {
		return false
	}
	if d.hurry {
		// Shifting the claims of a whole cluster takes its time, which whoever waits
		// for a new place after a loss hasn't got.
		if d.shifted += len(h.above(limit)); d.shifted > maxShifted {
			return d.s.shed(h, need, &d.undo)
		}
	}
	return d.s.makeRoom(h, need, &d.undo) || d.relaxed && d.s.shed(h, need, &d.undo)
}

// apply carries an option out on the tentative state.
func (d *decision) apply(c *container, a *candidate) *machine {
	s, m := d.s, a.machine
	switch a.kind {
	case Boot:
		m = &machine{fresh: true, Machine: Machine{
			ID: d.name(), Host: a.host.ID, Isolation: c.Isolation, Project: c.Project,
			Size: a.to, Ceiling: a.host.top.max(a.to),
		}}
		if c.Isolation == Shared {
			m.Project = ""
		}
		s.addMachine(m)
		d.undo.note(func() { s.addMachine(m) }, func() { s.dropMachine(m) })
	case Grow:
		before := m.Size
		if d.from == nil {
			d.from = map[*machine]Size{}
		}
		if _, ok := d.from[m]; !ok {
			d.from[m] = before
			d.undo.note(func() {}, func() { delete(d.from, m) })
		}
		s.resize(m, a.to)
		d.undo.step(step{op: opResize, m: m, from: before, to: a.to})
	}
	s.place(c, a.host, m)
	h := a.host
	d.undo.step(step{op: opPlace, c: c, h: h, m: m})
	for _, v := range c.Volumes {
		if s.volumes[v] == "" {
			s.setVolume(v, a.host.ID)
			d.undo.note(func() { s.setVolume(v, h.ID) }, func() { s.setVolume(v, "") })
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

// record puts a placement into actions: a machine is booted or grown once, to its
// final size, before the first container that needs it.
func (d *decision) record(f *finder, i int, m *machine) {
	a, c := &f.found[i], f.c
	reason := f.reason(i)
	if m == nil {
		d.actions = append(d.actions, Action{Kind: PlaceM, Container: c.ID, Host: a.host.ID, Seconds: a.seconds, Cost: a.cost, Reason: reason})
		return
	}
	if d.actions == nil && a.kind != Place {
		d.actions = make([]Action, 0, 2)
	}
	d.sized(m, a)
	d.actions = append(d.actions, Action{Kind: Place, Container: c.ID, Machine: m.ID, Host: m.Host, Seconds: a.seconds, Cost: a.cost, Reason: reason})
}

// sized notes that option a boots or grows m, in the action that is there or a new one.
func (d *decision) sized(m *machine, a *candidate) {
	if i, ok := d.at[m]; ok {
		d.actions[i].To = m.Size
		if d.actions[i].Kind == Boot && !m.host.Capabilities.Grow {
			d.actions[i].Ceiling = m.Size
		}
		return
	}
	caps := m.host.Capabilities
	x := Action{Machine: m.ID, Host: m.Host, To: m.Size}
	switch from, grown := d.from[m]; {
	case a.kind == Boot:
		x.Kind, x.Project, x.Isolation, x.Ceiling, x.Seconds = Boot, m.Project, m.Isolation, m.Ceiling, caps.BootSeconds
		if !caps.Grow {
			x.Ceiling = m.Size
		}
	case grown && a.kind == Grow:
		x.Kind, x.From, x.Seconds = Grow, from, caps.GrowSeconds
	default:
		return
	}
	if d.at == nil {
		d.at = map[*machine]int{}
	}
	d.at[m] = len(d.actions)
	d.actions = append(d.actions, x)
}

func (d *decision) plan() *Plan {
	p := &Plan{Revision: d.s.rev, Actions: d.actions, Unplaced: d.out, Relaxed: d.relaxed}
	d.remember(p)
	return p
}
