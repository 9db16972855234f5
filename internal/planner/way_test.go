package planner_test

import (
	"slices"
	"testing"

	"tandem/internal/planner"
)

// What was lost comes before what may be lost next, with rules as with room: who stood
// by on a host starts there although somebody else stands by there, too, whom it can't
// bear. That one finds another host, or is told to have none.
func TestLostComesBeforeStandby(t *testing.T) {
	for _, fourth := range []bool{false, true} {
		s := planner.New()
		must(t, s.SetPolicy(planner.Policy{HostLosses: 1}))
		hosts := []string{"h-1", "h-2", "h-3"}
		if fourth {
			hosts = append(hosts, "h-4")
		}
		for _, id := range hosts[:3] {
			must(t, s.SetHost(testHost(id, 4000, 4*gib)))
		}
		for _, x := range [][2]string{{"h-1", "m-1"}, {"h-3", "m-3"}} {
			must(t, s.SetMachine(planner.Machine{ID: x[1], Host: x[0], Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
		}
		size := planner.Size{CPU: 100, Memory: 64 * mib}
		must(t, s.SetContainer(planner.Container{ID: "a", Project: "p", Machine: "m-1", Request: size, Anti: []planner.AntiRule{{Service: "db", Layer: "host"}}}))
		must(t, s.SetContainer(planner.Container{ID: "db", Project: "p", Service: "db", Machine: "m-3", Request: size}))
		for _, id := range []string{"a", "db"} {
			if on := s.Standby(id); !slices.Equal(on, []string{"h-2"}) {
				t.Fatalf("%s stands by on %v", id, on)
			}
		}
		if fourth {
			must(t, s.SetHost(testHost("h-4", 4000, 4*gib)))
		}
		down := testHost("h-1", 4000, 4*gib)
		down.Down = true
		must(t, s.SetHost(down))
		p, err := s.Decide(planner.Question{HostLost: []string{"h-1"}})
		must(t, err)
		if len(p.Unplaced) > 0 {
			t.Fatalf("%s starts nowhere: %s", p.Unplaced[0].Container, p.Unplaced[0].Reason.Summary)
		}
		if on := s.Standby("db"); !slices.Equal(on, []string{"h-2"}) {
			t.Errorf("a question moved db's standby host to %v", on)
		}
		must(t, s.Commit(p, map[string]string{"new-1": "m-9"}))
		where := p.Actions[len(p.Actions)-1].Host
		switch whole, exposed := s.Survives(); {
		case fourth && !whole:
			t.Errorf("there is room for all, and %v have no standby host", exposed)
		case !fourth && !slices.Equal(exposed, []string{"a", "db"}):
			t.Errorf("without a host that may take them: %v", exposed)
		}
		if on := s.Standby("db"); slices.Contains(on, where) {
			t.Errorf("db stands by on %s, where a runs now", where)
		}
	}
}

// The same when it is a fact: what was promised and can't be any more is not claimed.
func TestFactBesideStandby(t *testing.T) {
	s := planner.New()
	must(t, s.SetPolicy(planner.Policy{HostLosses: 1}))
	for _, id := range []string{"h-1", "h-2"} {
		must(t, s.SetHost(testHost(id, 4000, 4*gib)))
		must(t, s.SetMachine(planner.Machine{ID: "m" + id[1:], Host: id, Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
	}
	size := planner.Size{CPU: 100, Memory: 64 * mib}
	must(t, s.SetContainer(planner.Container{ID: "db", Project: "p", Service: "db", Machine: "m-1", Request: size}))
	if whole, _ := s.Survives(); !whole {
		t.Fatal("db has a standby host")
	}
	must(t, s.SetContainer(planner.Container{ID: "a", Project: "p", Machine: "m-2", Request: size, Anti: []planner.AntiRule{{Service: "db", Layer: "host"}}}))
	if _, exposed := s.Survives(); !slices.Equal(exposed, []string{"a", "db"}) {
		t.Errorf("neither can start beside the other: %v", exposed)
	}
}

// Saying the same again moves no promise: two of a service stand by beside one that
// bears one of them, as only one of their hosts is lost.
func TestSameFactAgain(t *testing.T) {
	s := planner.New()
	must(t, s.SetPolicy(planner.Policy{HostLosses: 1}))
	for _, id := range []string{"h-1", "h-2", "h-3"} {
		must(t, s.SetHost(testHost(id, 4000, 4*gib)))
		must(t, s.SetMachine(planner.Machine{ID: "m" + id[1:], Host: id, Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
	}
	one := []planner.AntiRule{{Service: "db", Layer: "host", Max: 1}}
	at := func(id, service, m string, anti []planner.AntiRule) planner.Container {
		return planner.Container{ID: id, Project: "p", Service: service, Machine: m, Request: planner.Size{CPU: 100, Memory: 64 * mib}, Anti: anti}
	}
	a := at("a", "", "m-2", one)
	for _, c := range []planner.Container{a, at("x1", "", "m-1", one), at("db1", "db", "m-1", nil), at("x3", "", "m-3", one), at("db3", "db", "m-3", nil), a} {
		must(t, s.SetContainer(c))
	}
	if whole, exposed := s.Survives(); !whole || !slices.Equal(s.Standby("db1"), []string{"h-2"}) || !slices.Equal(s.Standby("db3"), []string{"h-2"}) {
		t.Errorf("exposed %v; db1 stands by on %v, db3 on %v", exposed, s.Standby("db1"), s.Standby("db3"))
	}
}
