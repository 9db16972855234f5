package planner_test

import (
	"errors"
	"math"
	"strings"
	"testing"

	"tandem/internal/planner"
)

func TestBadFactsAreRefusedByName(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 4000, 4*gib)))
	must(t, s.SetMachine(planner.Machine{ID: "m-1", Host: "h-1", Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
	rev := s.Revision()
	for name, err := range map[string]error{
		"host without":         s.SetHost(planner.Host{}),
		"host h-2: size":       s.SetHost(planner.Host{ID: "h-2", Capacity: planner.Size{CPU: -1}}),
		"host h-3: size":       s.SetHost(planner.Host{ID: "h-3", Capacity: planner.Size{Memory: math.MaxInt64}}),
		"host h-4: boot":       s.SetHost(planner.Host{ID: "h-4", Capabilities: planner.Capabilities{BootSeconds: math.NaN()}}),
		"machine without":      s.SetMachine(planner.Machine{Host: "h-1"}),
		"machine m-2: host":    s.SetMachine(planner.Machine{ID: "m-2", Host: "h-9"}),
		"machine m-3: isol":    s.SetMachine(planner.Machine{ID: "m-3", Host: "h-1", Isolation: planner.Metal}),
		"machine m-4: size":    s.SetMachine(planner.Machine{ID: "m-4", Host: "h-1", Size: planner.Size{CPU: -1}}),
		"container without":    s.SetContainer(planner.Container{}),
		"container c: request": s.SetContainer(planner.Container{ID: "c", Request: planner.Size{Memory: -1}}),
		"container c: isol":    s.SetContainer(planner.Container{ID: "c", Isolation: 9}),
		"container c: spread":  s.SetContainer(planner.Container{ID: "c", Spread: "rack"}),
		"container c: rule":    s.SetContainer(planner.Container{ID: "c", Anti: []planner.AntiRule{{Service: "x", Layer: "rack"}}}),
		"container c: machine": s.SetContainer(planner.Container{ID: "c", Machine: "m-9"}),
		"container c: host":    s.SetContainer(planner.Container{ID: "c", Host: "h-9"}),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("got %v, want %s...", err, name)
		}
	}
	if err := s.SetContainer(planner.Container{ID: "c", Machine: "m-1", Host: "h-2"}); err == nil {
		t.Error("a container in a machine on another host was taken")
	}
	if s.Revision() != rev {
		t.Error("refused facts moved the revision")
	}
	must(t, s.Consistent())
}

func TestBadQuestions(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 4000, 4*gib)))
	must(t, s.SetContainer(planner.Container{ID: "there", Host: "h-1", Isolation: planner.Metal}))
	for _, q := range []planner.Question{
		{},
		{Place: []string{"unknown"}},
		{Place: []string{"there"}},
		{Place: []string{"there"}, Trim: &planner.Trim{}},
	} {
		if p, err := s.Decide(q); err == nil {
			t.Errorf("%+v was answered: %+v", q, p)
		}
	}
	p, err := s.Decide(planner.Question{Place: []string{}})
	if err != nil || len(p.Actions)+len(p.Unplaced) != 0 {
		t.Errorf("an empty list: %+v, %v", p, err)
	}
}

// Seen facts are taken even when they break rules; nothing is added to the breach.
func TestOverfullIsSeenNotWorsened(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 4000, 2*gib)))
	must(t, s.SetMachine(planner.Machine{ID: "m-1", Host: "h-1", Project: "p", Size: planner.Size{CPU: 1000, Memory: 512 * mib}, Ceiling: planner.Size{CPU: 4000, Memory: gib}}))
	must(t, s.SetContainer(planner.Container{ID: "fat", Project: "p", Machine: "m-1", Request: planner.Size{CPU: 8000, Memory: 8 * gib}}))
	must(t, s.SetContainer(planner.Container{ID: "new", Project: "p", Request: planner.Size{Memory: 128 * mib}}))
	p, err := s.Decide(planner.Question{Place: []string{"new"}})
	must(t, err)
	if len(p.Actions) != 2 || p.Actions[0].Kind != planner.Boot {
		t.Fatalf("want a boot beside the overfull machine, got %+v", p)
	}
	// The host loses memory: nothing fits any more, and trimming does not cut into what is used.
	must(t, s.SetHost(testHost("h-1", 4000, 256*mib)))
	p, err = s.Decide(planner.Question{Place: []string{"new"}})
	must(t, err)
	if len(p.Unplaced) != 1 {
		t.Fatalf("placed on a host without room: %+v", p)
	}
	p, err = s.Decide(planner.Question{Trim: &planner.Trim{Shrink: true, Idle: []string{"m-1", "gone"}}})
	must(t, err)
	if len(p.Actions) != 0 {
		t.Fatalf("trimmed what is used: %+v", p)
	}
	must(t, s.Consistent())
}

// A machine that moved to another host takes its containers and ports with it.
func TestMachineMoves(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 4000, 4*gib)))
	must(t, s.SetHost(testHost("h-2", 4000, 4*gib)))
	m := planner.Machine{ID: "m-1", Host: "h-1", Project: "p", Size: planner.Size{CPU: 1000, Memory: 512 * mib}}
	must(t, s.SetMachine(m))
	must(t, s.SetContainer(planner.Container{ID: "a", Project: "p", Service: "a", Machine: "m-1", Ports: []planner.Port{{Port: 80}}}))
	m.Host = "h-2"
	must(t, s.SetMachine(m))
	must(t, s.Consistent())
	must(t, s.SetContainer(planner.Container{ID: "b", Project: "q", Service: "b", Ports: []planner.Port{{Port: 80}}}))
	p, err := s.Decide(planner.Question{Place: []string{"b"}})
	must(t, err)
	if len(p.Actions) != 2 || p.Actions[0].Host != "h-1" {
		t.Fatalf("port 80 should be free on h-1 only: %+v", p)
	}
	s.RemoveHost("h-2")
	must(t, s.Consistent())
	if _, err := s.Decide(planner.Question{Place: []string{"a"}}); err != nil {
		t.Errorf("what ran on a removed host can't be placed again: %v", err)
	}
}

func TestCommitRefusesStalePlansWhole(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 4000, 2*gib)))
	for _, id := range []string{"a", "b"} {
		must(t, s.SetContainer(planner.Container{ID: id, Project: "p", Request: planner.Size{Memory: 256 * mib}}))
	}
	p, err := s.Decide(planner.Question{Place: []string{"a", "b"}})
	must(t, err)
	s.RemoveContainer("b")
	rev := s.Revision()
	if err := s.Commit(p, nil); !errors.Is(err, planner.ErrStale) {
		t.Fatalf("got %v, want ErrStale", err)
	}
	if s.Revision() != rev {
		t.Error("a refused plan moved the revision")
	}
	must(t, s.Consistent())
	p, err = s.Decide(planner.Question{Place: []string{"a"}})
	must(t, err)
	must(t, s.SetHost(testHost("h-2", 4000, 2*gib))) // does not matter to the plan
	must(t, s.Commit(p, map[string]string{"new-1": "m-7"}))
	if err := s.Commit(p, map[string]string{"new-1": "m-7"}); err == nil {
		t.Error("a plan was applied twice")
	}
	must(t, s.Consistent())
}

// A question with more than fits places what it can, and the order does not matter.
func TestAsManyAsFit(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 8000, 2*gib)))
	ids := []string{"e", "c", "a", "d", "b", "a"}
	for _, id := range ids {
		must(t, s.SetContainer(planner.Container{ID: id, Project: "p", Request: planner.Size{Memory: 500 * mib}}))
	}
	p, err := s.Decide(planner.Question{Place: ids})
	must(t, err)
	if len(p.Unplaced) != 2 || len(p.Actions) != 4 {
		t.Fatalf("want one boot, three placements, two unplaced: %+v", p)
	}
	if !strings.Contains(p.Unplaced[0].Remedy, "free ") {
		t.Errorf("remedy %q", p.Unplaced[0].Remedy)
	}
}

func TestRename(t *testing.T) {
	p := &planner.Plan{
		Actions: []planner.Action{{Kind: planner.Place, Machine: "new-1", Reason: planner.Reason{
			Summary:    "new-1 was 1 CPU short; new-10 too (new-1)",
			Options:    []planner.Option{{Machine: "new-1"}, {Machine: "m-2"}},
			Exclusions: []planner.Exclusion{{Detail: "1 CPU short at best (new-1)"}},
		}}},
	}
	p.Rename(map[string]string{"new-1": "m-1"})
	a := p.Actions[0]
	if a.Machine != "m-1" || a.Reason.Summary != "m-1 was 1 CPU short; new-10 too (m-1)" || a.Reason.Options[0].Machine != "m-1" ||
		a.Reason.Options[1].Machine != "m-2" || a.Reason.Exclusions[0].Detail != "1 CPU short at best (m-1)" {
		t.Errorf("%+v", a)
	}
}
