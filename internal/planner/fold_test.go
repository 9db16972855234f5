package planner_test

import (
	"fmt"
	"testing"

	"tandem/internal/planner"
)

// foldable is two machines of 2 GiB on a host, with containers of 256 MiB in them.
func foldable(t *testing.T, each ...int) *planner.State {
	t.Helper()
	s := planner.New()
	must(t, s.SetHost(testHost("h-1", 16000, 32*gib)))
	for i, n := range each {
		m := fmt.Sprintf("m-%d", i+1)
		must(t, s.SetMachine(planner.Machine{ID: m, Host: "h-1", Project: "p", Size: planner.Size{CPU: 2000, Memory: 2 * gib}, Ceiling: planner.Size{CPU: 4000, Memory: 3 * gib}}))
		for j := range n {
			must(t, s.SetContainer(planner.Container{ID: fmt.Sprintf("%s-c%d", m, j), Project: "p", Service: fmt.Sprintf("s%d", j), Machine: m, Host: "h-1",
				Request: planner.Size{CPU: 100, Memory: 256 * mib}}))
		}
	}
	return s
}

func ask(t *testing.T, s *planner.State, q planner.Fold) *planner.Plan {
	t.Helper()
	if q.Budget == (planner.Budget{}) {
		q.Budget = planner.Budget{Containers: 10, Bytes: -1}
	}
	p, err := s.Decide(planner.Question{Fold: &q})
	must(t, err)
	return p
}

func kinds(p *planner.Plan) (out string) {
	for _, a := range p.Actions {
		out += string(a.Kind) + " " + a.Container + a.Machine + ";"
	}
	return out
}

func TestFoldEmptiesTheCheapest(t *testing.T) {
	s := foldable(t, 3, 2)
	p := ask(t, s, planner.Fold{Leave: 0.2, Gain: gib})
	if got, want := kinds(p), "move m-2-c0m-1;move m-2-c1m-1;stop m-2;"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	for _, a := range p.Actions {
		t.Log(a.Reason.Summary)
	}
	must(t, s.Commit(p, nil))
}

func TestFoldRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		q    planner.Fold
		do   func(*planner.State) error
	}{
		{"little room is left for load that grows", planner.Fold{Leave: 0.6}, nil},
		{"it gains too little", planner.Fold{Gain: 3 * gib}, nil},
		{"it is more than the budget", planner.Fold{Budget: planner.Budget{Containers: 1, Bytes: -1}}, nil},
		{"one of the two is not to be touched", planner.Fold{Among: []string{"m-2"}}, nil},
		{"who can't run twice stays", planner.Fold{}, func(s *planner.State) error {
			for _, m := range []string{"m-1", "m-2"} {
				if err := s.SetContainer(planner.Container{ID: m + "-c0", Project: "p", Machine: m, Host: "h-1", Stateful: true}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"replicas that want machines of their own", planner.Fold{}, func(s *planner.State) error {
			for _, m := range []string{"m-1", "m-2"} {
				if err := s.SetContainer(planner.Container{ID: m + "-c0", Project: "p", Service: "s", Spread: "machine", Machine: m, Host: "h-1"}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"a volume", planner.Fold{}, func(s *planner.State) error {
			for i, m := range []string{"m-1", "m-2"} {
				v := fmt.Sprint("v", i)
				s.SetVolume(v, "h-1")
				if err := s.SetContainer(planner.Container{ID: m + "-v", Project: "p", Volumes: []string{v}, Machine: m, Host: "h-1"}); err != nil {
					return err
				}
			}
			return nil
		}},
		{"machines of users", planner.Fold{}, func(s *planner.State) error {
			for _, m := range []string{"m-1", "m-2"} {
				if err := s.SetMachine(planner.Machine{ID: m, Host: "h-1", Project: "p", Pinned: true, Size: planner.Size{CPU: 2000, Memory: 2 * gib}, Ceiling: planner.Size{CPU: 4000, Memory: 3 * gib}}); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := foldable(t, 3, 2)
			if c.do != nil {
				must(t, c.do(s))
			}
			if p := ask(t, s, c.q); len(p.Actions) > 0 {
				t.Error(kinds(p))
			}
		})
	}
	if _, err := foldable(t, 1).Decide(planner.Question{Fold: &planner.Fold{Leave: 1}}); err == nil {
		t.Error("leave 1 is taken")
	}
}

// Nothing is left to fold after a fold, whatever the sizes.
func TestFoldSettles(t *testing.T) {
	for a := 1; a < 6; a++ {
		for b := 1; b < 6; b++ {
			s := foldable(t, a, b, 1)
			for range 3 {
				p := ask(t, s, planner.Fold{Leave: 0.2, Gain: 128 * mib})
				must(t, s.Commit(p, nil))
				for _, x := range p.Actions {
					if x.Kind == planner.Stop {
						s.RemoveMachine(x.Machine)
					}
				}
			}
			if p := ask(t, s, planner.Fold{Leave: 0.2, Gain: 128 * mib}); len(p.Actions) > 0 {
				t.Errorf("%d and %d: still %s", a, b, kinds(p))
			}
		}
	}
}
