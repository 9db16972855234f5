package planner_test

import (
	"fmt"
	"slices"
	"testing"

	"tandem/internal/planner"
)

// TestBrokenClaims loses a host whose machine fits only where the others stand by: that
// is said, and mended when there is room again.
func TestBrokenClaims(t *testing.T) {
	s := planner.New()
	must(t, s.SetPolicy(planner.Policy{HostLosses: 1}))
	for i := range 4 {
		must(t, s.SetHost(testHost(fmt.Sprintf("h-%d", i+1), 8000, 16*gib)))
	}
	must(t, s.SetHost(testHost("spare", 8000, 16*gib)))
	var all []string
	for i := range 4 {
		machine := fmt.Sprintf("m-%d", i+1)
		must(t, s.SetMachine(planner.Machine{ID: machine, Host: fmt.Sprintf("h-%d", i+1), Project: "p", Size: planner.Size{CPU: 7000, Memory: 15 * gib}}))
		for j := range 2 {
			id := fmt.Sprintf("c-%d-%d", i+1, j)
			all = append(all, id)
			must(t, s.SetContainer(planner.Container{ID: id, Project: "p", Machine: machine, Request: planner.Size{CPU: 3000, Memory: 7 * gib}}))
		}
	}
	if ok, who := s.Survives(); !ok {
		t.Fatal("before the loss no destination for", who)
	}
	lost := testHost("h-1", 8000, 16*gib)
	lost.Down = true
	must(t, s.SetHost(lost))
	p, err := s.Decide(planner.Question{HostLost: []string{"h-1"}})
	must(t, err)
	if len(p.Actions) != 1 || p.Actions[0].Kind != planner.Restart || p.Actions[0].Host != "spare" {
		t.Fatalf("want m-1 restarted on the spare host, got %+v", p.Actions)
	}
	if ok, who := s.Survives(); !ok {
		t.Fatal("asking has broken claims of", who)
	}
	must(t, s.Commit(p, nil))
	s.RemoveHost("h-1")
	if ok, who := s.Survives(); ok || !slices.Equal(who, all) {
		t.Fatalf("no destination for %v, want %v", who, all)
	}
	if err := s.Consistent(); err != nil {
		t.Fatal(err)
	}
	must(t, s.SetHost(testHost("spare-2", 8000, 16*gib)))
	p, err = s.Decide(planner.Question{Rebalance: &planner.Budget{}})
	must(t, err)
	must(t, s.Commit(p, nil))
	if ok, who := s.Survives(); !ok {
		t.Fatal("with another spare host no destination for", who)
	}
	for _, id := range all {
		if on := s.Standby(id); !slices.Equal(on, []string{"spare-2"}) {
			t.Errorf("%s stands by on %v, want spare-2", id, on)
		}
	}
	if err := s.Consistent(); err != nil {
		t.Fatal(err)
	}
}
