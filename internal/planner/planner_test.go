package planner_test

import (
	"strings"
	"testing"

	"tandem/internal/planner"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func testHost(id string, cpu, memory int64) planner.Host {
	return planner.Host{
		ID:           id,
		Capacity:     planner.Size{CPU: cpu, Memory: memory},
		MachineExtra: planner.Size{CPU: 100, Memory: 80 * mib},
		GuestExtra:   planner.Size{CPU: 50, Memory: 63 * mib},
		Base:         planner.Size{CPU: 1000, Memory: 256 * mib},
		Capabilities: planner.Capabilities{
			Grow: true, Shrink: true, Metal: true, MemoryStep: 2 * mib, CPUStep: 1000, BootSeconds: 0.6, GrowSeconds: 0.1,
		},
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestProjectIsBootedOnceInTheRightSize(t *testing.T) {
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 8000, 16*gib)))
	must(t, s.SetContainer(planner.Container{ID: "web", Project: "shop", Service: "web"}))
	must(t, s.SetContainer(planner.Container{ID: "api", Project: "shop", Service: "api", Request: planner.Size{CPU: 1500, Memory: 512 * mib}}))
	must(t, s.SetContainer(planner.Container{ID: "db", Project: "shop", Service: "db", Request: planner.Size{Memory: gib}}))
	p, err := s.Decide(planner.Question{Place: []string{"web", "api", "db"}})
	must(t, err)
	if len(p.Unplaced) != 0 || len(p.Actions) != 4 || p.Actions[0].Kind != planner.Boot {
		t.Fatalf("want one boot and three placements, got %+v", p)
	}
	want := planner.Size{CPU: 2000, Memory: (63 + 64 + 512 + 1024 + 1) * mib}
	if got := p.Actions[0].To; got != want {
		t.Errorf("booted in %v, want %v", got, want)
	}
	for _, a := range p.Actions {
		t.Log(a.Kind, a.Container, a.Machine, a.Reason.Summary)
	}
	must(t, s.Commit(p, map[string]string{"new-1": "m-1"}))
	must(t, s.SetContainer(planner.Container{ID: "web2", Project: "shop", Service: "web", Request: planner.Size{CPU: 1000}}))
	p, err = s.Decide(planner.Question{Place: []string{"web2"}})
	must(t, err)
	for _, a := range p.Actions {
		t.Log(a.Kind, a.Container, a.Machine, a.From, a.To, a.Reason.Summary, a.Reason.Options, a.Reason.Exclusions)
	}
	must(t, s.SetContainer(planner.Container{ID: "big", Project: "other", Request: planner.Size{CPU: 10000}}))
	p, err = s.Decide(planner.Question{Place: []string{"big"}})
	must(t, err)
	if len(p.Unplaced) != 1 || !strings.Contains(p.Unplaced[0].Remedy, "larger host") {
		t.Fatalf("%+v", p)
	}
	t.Log(p.Unplaced[0].Reason.Summary, "|", p.Unplaced[0].Remedy)
}
