package planner_test

import (
	"fmt"
	"testing"

	"tandem/internal/planner"
)

// fill makes a state of n hosts, ten machines on each, ten containers in each of
// those, in n/10 projects.
func fill(b *testing.B, n int) *planner.State {
	b.Helper()
	s := planner.New()
	for h := range n {
		host := fmt.Sprintf("h-%05d", h)
		must(b, s.SetHost(testHost(host, 96000, 256*gib)))
		for m := range 10 {
			id := fmt.Sprintf("m-%05d-%d", h, m)
			project := fmt.Sprintf("p-%d", (h*10+m)%max(1, n/10))
			must(b, s.SetMachine(planner.Machine{ID: id, Host: host, Project: project,
				Size: planner.Size{CPU: 8000, Memory: 16 * gib}, Ceiling: planner.Size{CPU: 32000, Memory: 64 * gib}}))
			for c := range 10 {
				must(b, s.SetContainer(planner.Container{ID: fmt.Sprintf("c-%05d-%d-%d", h, m, c), Project: project,
					Service: fmt.Sprintf("s-%d", c%4), Machine: id, Request: planner.Size{CPU: int64(500 + 50*(c%5)), Memory: gib}}))
			}
		}
	}
	return s
}

// BenchmarkPlace is one container placed, committed and removed again.
func BenchmarkPlace(b *testing.B) {
	for _, hosts := range []int{10, 100, 1000} {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) {
			s := fill(b, hosts)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				must(b, s.SetContainer(planner.Container{ID: "new", Project: fmt.Sprintf("p-%d", i%max(1, hosts/10)), Service: "s-1",
					Request: planner.Size{CPU: int64(100 * (i % 30)), Memory: int64(i%40) * 128 * mib}}))
				p, err := s.Decide(planner.Question{Place: []string{"new"}})
				must(b, err)
				if len(p.Unplaced) > 0 {
					b.Fatal(p.Unplaced)
				}
				s.RemoveContainer("new")
			}
		})
	}
}
