package planner_test

import (
	"fmt"
	"testing"

	"tandem/internal/planner"
)

// Facts come one by one, and each takes the first standby host that has room: 4 and 4
// beside each other leave no room for 6 and 6 on two hosts of 10. Cover packs them anew.
func TestCover(t *testing.T) {
	s := planner.New()
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(s.SetPolicy(planner.Policy{HostLosses: 1}))
	for id, cpu := range map[string]int64{"f": 20, "g": 10, "h": 10} {
		ok(s.SetHost(planner.Host{ID: id, Capacity: planner.Size{CPU: 1000 * cpu, Memory: 64 << 30}, Capabilities: planner.Capabilities{Metal: true}}))
	}
	for i, cpu := range []int64{4, 4, 6, 6} {
		ok(s.SetContainer(planner.Container{ID: fmt.Sprint("c", i), Project: "p", Isolation: planner.Metal, Host: "f", Request: planner.Size{CPU: 1000 * cpu, Memory: 1 << 20}}))
	}
	if _, exposed := s.Survives(); len(exposed) != 1 {
		t.Fatal("the example is none: exposed are", exposed)
	}
	rev := s.Revision()
	if n := s.Cover(1); n != 0 {
		t.Error("still exposed:", n)
	}
	if s.Revision() == rev {
		t.Error("plans of before would still count as new")
	}
	// With a little more, nothing helps, and nothing changes.
	ok(s.SetContainer(planner.Container{ID: "c9", Project: "p", Isolation: planner.Metal, Host: "f", Request: planner.Size{CPU: 1, Memory: 1 << 20}}))
	was := fmt.Sprint(s.Standby("c0"), s.Standby("c1"), s.Standby("c2"), s.Standby("c3"))
	rev = s.Revision()
	if n := s.Cover(8); n != 1 || s.Revision() != rev {
		t.Error("exposed:", n)
	}
	if now := fmt.Sprint(s.Standby("c0"), s.Standby("c1"), s.Standby("c2"), s.Standby("c3")); now != was {
		t.Errorf("standby hosts were %s, are %s", was, now)
	}
}
