package planner_test

import (
	"testing"

	"tandem/internal/planner"
)

// Rules matter also where nobody runs yet who has some, but would start after a loss.
func TestCompanyComesAfterALoss(t *testing.T) {
	for _, against := range []string{"resident", "newcomer"} {
		s := planner.New()
		must(t, s.SetPolicy(planner.Policy{HostLosses: 1}))
		for _, id := range []string{"h-1", "h-2", "h-3"} {
			must(t, s.SetHost(testHost(id, 8000, 8*gib)))
		}
		must(t, s.SetMachine(planner.Machine{ID: "m-1", Host: "h-1", Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
		size := planner.Size{CPU: 100, Memory: 64 * mib}
		resident := planner.Container{ID: "lone", Project: "p", Service: "lone", Machine: "m-1", Request: size}
		newcomer := planner.Container{ID: "web", Project: "p", Service: "web", Request: size}
		if against == "resident" {
			resident.Anti = []planner.AntiRule{{Service: "web", Layer: "host"}}
		} else {
			newcomer.Anti = []planner.AntiRule{{Service: "lone", Layer: "host"}}
		}
		must(t, s.SetContainer(resident))
		stands := s.Standby("lone")
		if len(stands) != 1 {
			t.Fatalf("rule of %s: lone stands by on %v", against, stands)
		}
		// The cheapest place by far is a free slot on the host where lone would start.
		must(t, s.SetMachine(planner.Machine{ID: "m-2", Host: stands[0], Project: "p", Size: planner.Size{CPU: 1000, Memory: gib}}))
		must(t, s.SetContainer(newcomer))
		p, err := s.Decide(planner.Question{Place: []string{"web"}})
		must(t, err)
		if len(p.Unplaced) > 0 {
			t.Fatalf("rule of %s: %s", against, p.Unplaced[0].Reason.Summary)
		}
		if at := p.Actions[len(p.Actions)-1].Host; at == stands[0] || at == "h-1" {
			t.Errorf("rule of %s: web is placed on %s, where lone runs or would start", against, at)
		}
	}
}
