package planner_test

import (
	"strings"
	"testing"

	"pgregory.net/rapid"

	"tandem/internal/planner"
)

func (x *run) budget(t *rapid.T) planner.Budget {
	return planner.Budget{Containers: rapid.IntRange(-1, 5).Draw(t, "moves"), Machines: rapid.IntRange(-1, 2).Draw(t, "migrations"),
		Bytes: rapid.SampledFrom([]int64{-1, 600 * mib}).Draw(t, "bytes")}
}

func (x *run) within(p *planner.Plan, b planner.Budget) {
	var spent planner.Budget
	for _, a := range p.Actions {
		switch a.Kind {
		case planner.Move:
			spent.Containers++
		case planner.Migrate:
			spent.Machines++
			spent.Bytes += a.Bytes
		}
	}
	if b.Containers >= 0 && spent.Containers > b.Containers || b.Machines >= 0 && spent.Machines > b.Machines || b.Bytes >= 0 && spent.Bytes > b.Bytes {
		x.t.Fatalf("%+v was spent of a budget of %+v", spent, b)
	}
}

func (x *run) fold(t *rapid.T) {
	x.t = t
	q := &planner.Fold{Budget: x.budget(t), Leave: rapid.SampledFrom([]float64{0, 0.2}).Draw(t, "leave")}
	if rapid.Bool().Draw(t, "from one") && len(x.w.machines) > 0 {
		q.From = []string{pick(t, x.w.machines)}
	}
	before, _ := x.s.Survives()
	p := x.decide(planner.Question{Fold: q})
	x.within(p, q.Budget)
	for _, a := range p.Actions {
		if a.Kind == planner.Stop && q.From != nil && a.Machine != q.From[0] {
			t.Fatalf("%s is emptied, and was not named", a.Machine)
		}
	}
	x.commit(p)
	if after, who := x.s.Survives(); before && !after {
		t.Fatalf("a fold gave the guarantee up for %v", who)
	}
}

func (x *run) room(t *rapid.T) {
	x.t = t
	q := &planner.Room{Project: rapid.SampledFrom([]string{"p", "q"}).Draw(t, "project"), Budget: x.budget(t),
		Size: planner.Size{CPU: rapid.Int64Range(0, 4000).Draw(t, "cpu"), Memory: rapid.Int64Range(0, 4096).Draw(t, "mib") * mib}}
	before, _ := x.s.Survives()
	p := x.decide(planner.Question{Room: q})
	x.within(p, q.Budget)
	x.commit(p)
	if len(p.Actions) > 0 {
		again := x.decide(planner.Question{Room: q})
		if len(again.Actions)+len(again.Unplaced) > 0 {
			t.Fatalf("a neighbour left, and there is no room yet: %+v", again)
		}
	}
	if after, who := x.s.Survives(); before && !after {
		t.Fatalf("making room gave the guarantee up for %v", who)
	}
}

// crowdedHost is two hosts, on the first of which a full machine of p and one of q
// leave next to nothing, and a third machine of q on the second if wanted.
func crowdedHost(t *testing.T, migrate float64) *planner.State {
	t.Helper()
	s := planner.New()
	for _, id := range []string{"h-1", "h-2"} {
		h := testHost(id, 8000, 16*gib)
		h.Capabilities.MoveSecondsGiB = migrate
		must(t, s.SetHost(h))
	}
	for i, project := range []string{"p", "q"} {
		m := []string{"m-1", "m-2"}[i]
		size := planner.Size{CPU: 4000, Memory: 7 * gib}
		must(t, s.SetMachine(planner.Machine{ID: m, Host: "h-1", Project: project, Size: size, Ceiling: planner.Size{CPU: 8000, Memory: 15 * gib}}))
		must(t, s.SetContainer(planner.Container{ID: "c-" + project, Project: project, Machine: m, Host: "h-1",
			Request: planner.Size{CPU: 3500, Memory: 6 * gib}}))
	}
	return s
}

func TestRoomAsksTheNeighbourToLeave(t *testing.T) {
	room := func(s *planner.State, project string, b planner.Budget) *planner.Plan {
		p, err := s.Decide(planner.Question{Room: &planner.Room{Project: project, Size: planner.Size{CPU: 2000, Memory: 4 * gib}, Budget: b}})
		must(t, err)
		return p
	}
	any := planner.Budget{Machines: -1, Bytes: -1}
	s := crowdedHost(t, 1)
	if p := room(s, "nobody", any); len(p.Actions)+len(p.Unplaced) > 0 {
		t.Fatalf("a group without machines has nothing to grow: %+v", p)
	}
	for what, b := range map[string]planner.Budget{"no migration": {Bytes: -1}, "less than its memory": {Machines: 1, Bytes: gib}} {
		if p := room(s, "p", b); len(p.Actions) > 0 || len(p.Unplaced) != 1 {
			t.Fatalf("%s is allowed: %+v", what, p)
		}
	}
	p := room(s, "p", any)
	if got, want := kinds(p), "migrate m-2;"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	if got := p.Actions[0].Reason.Summary; !strings.Contains(got, "to make room beside it") {
		t.Errorf("the reason is %q", got)
	}
	must(t, s.Commit(p, nil))
	if p := room(s, "p", any); len(p.Actions)+len(p.Unplaced) > 0 {
		t.Fatalf("there is room, and yet: %+v", p)
	}
	if p := room(crowdedHost(t, 0), "p", any); len(p.Actions) > 0 || len(p.Unplaced) != 1 {
		t.Fatalf("hosts that can't migrate: %+v", p)
	}
	if _, err := s.Decide(planner.Question{Room: &planner.Room{Size: planner.Size{CPU: -1}}}); err == nil {
		t.Error("a negative size is taken")
	}
}

// A second machine boots on the roomiest host, a third one where a host can be
// switched on instead.
func TestFewLargeMachines(t *testing.T) {
	s := planner.New()
	for _, id := range []string{"h-1", "h-2", "h-3"} {
		h := testHost(id, 8000, 16*gib)
		h.Off = id == "h-3"
		must(t, s.SetHost(h))
	}
	boot := func(project string, want string) {
		t.Helper()
		c := "c-" + project
		must(t, s.SetContainer(planner.Container{ID: c, Project: project, Request: planner.Size{CPU: 1000, Memory: gib}}))
		p, err := s.Decide(planner.Question{Place: []string{c}})
		must(t, err)
		must(t, s.Commit(p, map[string]string{"new-1": "m-" + project}))
		if got := p.Actions[len(p.Actions)-1].Host; got != want {
			t.Fatalf("%s is on %s, want %s", c, got, want)
		}
	}
	boot("a", "h-1")
	boot("b", "h-2") // nobody is there yet
	boot("c", "h-1")
	boot("d", "h-2")
	boot("e", "h-3") // rather than a third one
}
