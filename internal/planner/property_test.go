package planner_test

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"tandem/internal/planner"
)

// TestPlansKeepAllRules runs random sequences of events and questions. After each
// plan an independent checker looks at every rule; what could not be placed must
// not fit anywhere; asking twice, or a copy, gives the same plan; and every index
// equals one built anew.
func TestPlansKeepAllRules(t *testing.T) { rapid.Check(t, plansKeepAllRules) }

// FuzzEvents is the same with sequences that a fuzzer makes.
func FuzzEvents(f *testing.F) { f.Fuzz(rapid.MakeFuzz(plansKeepAllRules)) }

func plansKeepAllRules(t *rapid.T) {
	x := &run{t: t, s: planner.New(), w: newWorld()}
	x.losses = rapid.IntRange(0, 2).Draw(t, "losses")
	x.ok(x.s.SetPolicy(planner.Policy{HostLosses: x.losses, Evict: true}))
	x.w.most = rapid.IntRange(0, 4).Draw(t, "quota of q")
	x.ok(x.s.SetQuota("q", planner.Quota{Containers: x.w.most}))
	x.w.limit = planner.Size{CPU: rapid.SampledFrom([]int64{0, 1000, 3000}).Draw(t, "limit of /a")}
	x.ok(x.s.SetPool(planner.Pool{Path: "/a", Limit: x.w.limit}))
	for range rapid.IntRange(1, 4).Draw(t, "hosts") {
		x.addHost()
	}
	t.Repeat(map[string]func(*rapid.T){
		"host":             func(t *rapid.T) { x.t = t; x.addHost() },
		"toggle host":      x.toggleHost,
		"remove host":      x.removeHost,
		"container":        x.addContainer,
		"containers":       x.addContainers,
		"remove container": x.removeContainer,
		"remove machine":   x.removeMachine,
		"volume":           x.setVolume,
		"place one":        x.placeOne,
		"place all":        x.placeAll,
		"trim":             x.trim,
		"stale":            x.stale,
		"lose host":        x.loseHost,
		"empty host":       x.emptyHost,
		"rebalance":        x.rebalance,
		"consolidate":      x.consolidate,
		"fold":             x.fold,
		"room":             x.room,
		"what if":          x.whatIf,
		"cover":            x.cover,
		"":                 x.invariants,
	})
}

// cover finds standby hosts anew: never fewer containers have theirs afterwards.
func (x *run) cover(t *rapid.T) {
	x.t = t
	_, before := x.s.Survives()
	n := x.s.Cover(rapid.IntRange(1, 3).Draw(t, "hosts"))
	if _, after := x.s.Survives(); n != len(after) || n > len(before) {
		t.Fatalf("%d exposed, says Cover; before %v, after %v", n, before, after)
	}
}

type run struct {
	t *rapid.T
	s *planner.State
	w *world
	n int
	// losses is the policy.
	losses int
}

func (x *run) ok(err error) {
	if err != nil {
		x.t.Fatal(err)
	}
}

func (x *run) next(prefix string) string {
	x.n++
	return fmt.Sprintf("%s-%03d", prefix, x.n)
}

func (x *run) addHost() {
	t := x.t
	if len(x.w.hosts) >= 5 {
		return
	}
	h := planner.Host{
		ID:           x.next("h"),
		Zone:         rapid.SampledFrom([]string{"a", "b"}).Draw(t, "zone"),
		Capacity:     planner.Size{CPU: rapid.Int64Range(0, 16).Draw(t, "cpu") * 500, Memory: rapid.Int64Range(0, 8192).Draw(t, "mem") * mib},
		MachineExtra: planner.Size{CPU: rapid.SampledFrom([]int64{0, 100}).Draw(t, "extra cpu"), Memory: 80 * mib},
		GuestExtra:   planner.Size{CPU: rapid.SampledFrom([]int64{0, 50}).Draw(t, "guest cpu"), Memory: 60 * mib},
		Base:         planner.Size{CPU: 1000, Memory: 256 * mib},
		Capabilities: planner.Capabilities{
			Grow: rapid.Bool().Draw(t, "grow"), Shrink: rapid.Bool().Draw(t, "shrink"), Metal: rapid.Bool().Draw(t, "metal"),
			MoveSecondsGiB: rapid.SampledFrom([]float64{0, 1}).Draw(t, "migrates"),
			MemoryStep:     rapid.SampledFrom([]int64{0, 2 * mib, 128 * mib}).Draw(t, "step"), BootSeconds: 1, GrowSeconds: 0.1,
		},
	}
	h.Off = rapid.IntRange(0, 2).Draw(t, "off") == 0
	if rapid.Bool().Draw(t, "bounded") {
		h.Capabilities.MaxMachine = planner.Size{CPU: 4000, Memory: 2048 * mib}
	}
	x.w.hosts[h.ID] = h
	x.ok(x.s.SetHost(h))
}

// impossible ends a step that can't be taken in this state: rapid draws another.
func impossible(t *rapid.T) { t.SkipNow() }

func pick[V any](t *rapid.T, m map[string]V) string {
	if len(m) == 0 {
		impossible(t)
	}
	keys := []string{}
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return rapid.SampledFrom(keys).Draw(t, "which")
}

func (x *run) toggleHost(t *rapid.T) {
	h := x.w.hosts[pick(t, x.w.hosts)]
	h.Cordoned = rapid.Bool().Draw(t, "cordoned")
	h.Down = rapid.Bool().Draw(t, "down")
	x.w.hosts[h.ID] = h
	x.t = t
	x.ok(x.s.SetHost(h))
}

func (x *run) removeHost(t *rapid.T) {
	id := pick(t, x.w.hosts)
	for k, c := range x.w.containers {
		if c.Host == id {
			c.Host, c.Machine = "", ""
			x.w.containers[k] = c
		}
	}
	for k, m := range x.w.machines {
		if m.Host == id {
			delete(x.w.machines, k)
		}
	}
	delete(x.w.hosts, id)
	for v, at := range x.w.volumes {
		if at == id { // its disk went with the host
			delete(x.w.volumes, v)
			x.s.SetVolume(v, "")
		}
	}
	x.s.RemoveHost(id)
}

func (x *run) addContainer(t *rapid.T) {
	x.t = t
	c := planner.Container{
		ID:        x.next("c"),
		Project:   rapid.SampledFrom([]string{"p", "q"}).Draw(t, "project"),
		Service:   rapid.SampledFrom([]string{"", "web", "db"}).Draw(t, "service"),
		Isolation: rapid.SampledFrom([]planner.Isolation{planner.Project, planner.Project, planner.Shared, planner.Own, planner.Metal}).Draw(t, "isolation"),
		Request: planner.Size{
			CPU:    rapid.SampledFrom([]int64{0, 100, 500, 1000, 3000}).Draw(t, "cpu"),
			Memory: rapid.SampledFrom([]int64{0, 32, 200, 1000, 3000}).Draw(t, "mem") * mib,
		},
		Pool:      rapid.SampledFrom([]string{"", "", "", "/a", "/a/b"}).Draw(t, "pool"),
		Class:     rapid.SampledFrom([]planner.Class{planner.Latency, planner.Latency, planner.Batch}).Draw(t, "class"),
		Stateful:  rapid.IntRange(0, 3).Draw(t, "stateful") == 0,
		Uncovered: rapid.IntRange(0, 5).Draw(t, "uncovered") == 0,
		Spread:    rapid.SampledFrom([]string{"", "", "host", "machine", "zone"}).Draw(t, "spread"),
	}
	if rapid.IntRange(0, 3).Draw(t, "ports?") == 0 {
		c.Ports = []planner.Port{{Protocol: "tcp", Port: rapid.SampledFrom([]uint16{0, 80, 443}).Draw(t, "port"),
			IP: rapid.SampledFrom([]string{"", "10.0.0.1", "10.0.0.2"}).Draw(t, "ip")}}
	}
	if rapid.IntRange(0, 3).Draw(t, "volumes?") == 0 {
		c.Volumes = rapid.SampledFrom([][]string{{"v1"}, {"v2"}, {"v1", "v2"}}).Draw(t, "volumes")
	}
	if rapid.IntRange(0, 4).Draw(t, "pin?") == 0 && len(x.w.hosts) > 0 {
		c.Hosts = []string{pick(t, x.w.hosts)}
	}
	if rapid.IntRange(0, 3).Draw(t, "anti?") == 0 {
		c.Anti = []planner.AntiRule{{Service: rapid.SampledFrom([]string{"web", "db"}).Draw(t, "against"),
			Layer: rapid.SampledFrom([]string{"machine", "host", "zone"}).Draw(t, "layer"), Max: rapid.IntRange(0, 2).Draw(t, "max")}}
	}
	x.w.containers[c.ID] = c
	x.ok(x.s.SetContainer(c))
}

func (x *run) addContainers(t *rapid.T) {
	for range rapid.IntRange(2, 6).Draw(t, "n") {
		x.addContainer(t)
	}
}

func (x *run) removeContainer(t *rapid.T) {
	id := pick(t, x.w.containers)
	delete(x.w.containers, id)
	x.s.RemoveContainer(id)
}

func (x *run) removeMachine(t *rapid.T) {
	id := pick(t, x.w.machines)
	for k, c := range x.w.containers {
		if c.Machine == id {
			c.Host, c.Machine = "", ""
			x.w.containers[k] = c
		}
	}
	delete(x.w.machines, id)
	x.s.RemoveMachine(id)
}

func (x *run) setVolume(t *rapid.T) {
	v := rapid.SampledFrom([]string{"v1", "v2"}).Draw(t, "volume")
	for _, c := range x.w.containers {
		if c.Host != "" && slices.Contains(c.Volumes, v) {
			impossible(t)
		}
	}
	at := pick(t, x.w.hosts)
	x.w.volumes[v] = at
	x.s.SetVolume(v, at)
}

func (x *run) unplaced() []string {
	var ids []string
	for id, c := range x.w.containers {
		if c.Host == "" {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func (x *run) placeOne(t *rapid.T) {
	x.t = t
	ids := x.unplaced()
	if len(ids) == 0 {
		impossible(t)
	}
	id := rapid.SampledFrom(ids).Draw(t, "container")
	p := x.decide(planner.Question{Place: []string{id}})
	if len(p.Unplaced) > 0 {
		if where := x.w.possible(id); where != "" && x.losses == 0 {
			t.Fatalf("%s was not placed (%s), but could: %s", id, p.Unplaced[0].Reason.Summary, where)
		}
		if p.Unplaced[0].Remedy == "" || p.Unplaced[0].Reason.Summary == "" {
			t.Fatalf("no reason or remedy: %+v", p.Unplaced[0])
		}
	}
	x.commit(p)
}

func (x *run) placeAll(t *rapid.T) {
	x.t = t
	ids := x.unplaced()
	if len(ids) == 0 {
		impossible(t)
	}
	p := x.decide(planner.Question{Place: ids})
	n := len(p.Unplaced)
	booted := map[string]int{}
	for _, a := range p.Actions {
		switch a.Kind {
		case planner.Place, planner.PlaceM:
			n++
			if a.Reason.Summary == "" || len(a.Reason.Options) == 0 {
				t.Fatalf("placement without a reason: %+v", a)
			}
		case planner.Boot, planner.Grow:
			if booted[a.Machine]++; booted[a.Machine] > 1 && !evicts(p) {
				t.Fatalf("%s is booted or grown twice in one plan", a.Machine)
			}
		}
	}
	if n != len(ids) {
		t.Fatalf("%d containers asked for, %d answered", len(ids), n)
	}
	x.commit(p)
}

func (x *run) trim(t *rapid.T) {
	x.t = t
	var idle []string
	for id := range x.w.machines {
		idle = append(idle, id)
	}
	slices.Sort(idle)
	p := x.decide(planner.Question{Trim: &planner.Trim{Idle: idle, Shrink: rapid.Bool().Draw(t, "shrink")}})
	x.commit(p)
	for _, a := range p.Actions {
		if a.Kind == planner.Stop {
			delete(x.w.machines, a.Machine)
			x.s.RemoveMachine(a.Machine)
		}
	}
}

// stale commits a plan to a state that has moved on: it applies whole or not at all.
func (x *run) stale(t *rapid.T) {
	x.t = t
	ids := x.unplaced()
	if len(ids) == 0 {
		impossible(t)
	}
	p := x.decide(planner.Question{Place: ids})
	switch rapid.IntRange(0, 2).Draw(t, "change") {
	case 0:
		x.toggleHost(t)
	case 1:
		x.removeContainer(t)
	case 2:
		x.addContainer(t)
		x.placeOne(t)
	}
	before := x.s.Revision()
	switch err := x.s.Commit(p, nil); {
	case err == nil:
		for _, a := range p.Actions {
			x.ok(x.w.apply(a))
		}
	case errors.Is(err, planner.ErrStale) || booted(p):
		if x.s.Revision() != before {
			t.Fatal("a refused plan changed the state")
		}
	default:
		t.Fatal(err)
	}
}

func evicts(p *planner.Plan) bool {
	return slices.ContainsFunc(p.Actions, func(a planner.Action) bool { return a.Kind == planner.Evict })
}

// loseHost takes a host down: what was covered, and had its standby hosts, starts
// again without anything else giving way.
func (x *run) loseHost(t *rapid.T) {
	x.t = t
	id := pick(t, x.w.hosts)
	h := x.w.hosts[id]
	if h.Down || h.Cordoned || h.Off {
		impossible(t)
	}
	whole, exposed := x.s.Survives()
	h.Down = true
	x.w.hosts[id] = h
	x.ok(x.s.SetHost(h))
	p := x.decide(planner.Question{HostLost: []string{id}})
	if whole && x.losses > 0 {
		for _, u := range p.Unplaced {
			if c, ok := x.w.containers[u.Container]; ok && x.w.covered(c) {
				t.Fatalf("%s was covered and starts nowhere: %s (exposed before: %v)", u.Container, u.Reason.Summary, exposed)
			}
		}
	}
	x.commit(p)
	for k, c := range x.w.containers {
		if c.Host == id {
			c.Host, c.Machine = "", ""
			x.w.containers[k] = c
		}
	}
	x.dropHost(id)
}

func (x *run) dropHost(id string) {
	for k, m := range x.w.machines {
		if m.Host == id {
			delete(x.w.machines, k)
		}
	}
	delete(x.w.hosts, id)
	x.s.RemoveHost(id)
	for v, at := range x.w.volumes {
		if at == id {
			delete(x.w.volumes, v)
			x.s.SetVolume(v, "")
		}
	}
}

func (x *run) emptyHost(t *rapid.T) {
	x.t = t
	id := pick(t, x.w.hosts)
	if x.w.hosts[id].Down {
		impossible(t)
	}
	p := x.decide(planner.Question{EmptyHost: []string{id}})
	for _, a := range p.Actions {
		if a.Host == id && a.Kind != planner.Stop && a.Kind != planner.PowerOff {
			t.Fatalf("%s on the host that was to be emptied", a.Kind)
		}
	}
	x.commit(p)
}

func (x *run) rebalance(t *rapid.T) {
	x.t = t
	b := x.budget(t)
	p := x.decide(planner.Question{Rebalance: &b})
	x.within(p, b)
	x.commit(p)
}

func (x *run) consolidate(t *rapid.T) {
	x.t = t
	q := &planner.Consolidate{Budget: x.budget(t), PowerOff: rapid.Bool().Draw(t, "power off"), KeepOn: rapid.IntRange(0, 1).Draw(t, "keep on"),
		Leave: rapid.SampledFrom([]float64{0, 0.1}).Draw(t, "leave")}
	before, _ := x.s.Survives()
	p := x.decide(planner.Question{Consolidate: q})
	x.within(p, q.Budget)
	x.commit(p)
	if after, who := x.s.Survives(); before && !after {
		t.Fatalf("consolidation gave the guarantee up for %v", who)
	}
}

func (x *run) whatIf(t *rapid.T) {
	x.t = t
	q := &planner.WhatIf{AddHosts: []planner.Host{{ID: "more", Capacity: planner.Size{CPU: 8000, Memory: 8192 * mib}}}}
	if rapid.Bool().Draw(t, "remove") {
		q.RemoveHosts = []string{pick(t, x.w.hosts)}
	}
	x.decide(planner.Question{WhatIf: q})
}

func booted(p *planner.Plan) bool {
	return slices.ContainsFunc(p.Actions, func(a planner.Action) bool { return a.Kind == planner.Boot })
}

func (x *run) decide(q planner.Question) *planner.Plan {
	rev := x.s.Revision()
	p, err := x.s.Decide(q)
	x.ok(err)
	if x.s.Revision() != rev || p.Revision != rev {
		x.t.Fatalf("revision moved from %d to %d, the plan says %d", rev, x.s.Revision(), p.Revision)
	}
	again, err := x.s.Decide(q)
	x.ok(err)
	copied, err := x.s.Clone().Decide(q)
	x.ok(err)
	if !reflect.DeepEqual(p, again) || !reflect.DeepEqual(p, copied) {
		x.t.Fatalf("same question, different plans (asked again, on a copy):\n%s\n%s", cmp.Diff(p, again), cmp.Diff(p, copied))
	}
	return p
}

func (x *run) commit(p *planner.Plan) {
	names := map[string]string{}
	for _, a := range p.Actions {
		if a.Kind == planner.Boot {
			names[a.Machine] = x.next("m")
		}
	}
	x.ok(x.s.Commit(p, names))
	p.Rename(names)
	for _, a := range p.Actions {
		x.ok(x.w.apply(a))
	}
	for _, a := range p.Actions {
		if a.Kind == planner.Stop {
			delete(x.w.machines, a.Machine)
			x.s.RemoveMachine(a.Machine)
		}
	}
}

func (x *run) invariants(t *rapid.T) {
	if err := x.w.check(); err != nil {
		t.Fatal(err)
	}
	if err := x.s.Consistent(); err != nil {
		t.Fatal(err)
	}
	if ok, _ := x.s.Survives(); ok {
		if err := x.w.survives(x.losses, x.s.Standby); err != nil {
			t.Fatal(err)
		}
	}
}
