package planner_test

import (
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"tandem/internal/planner"
)

// fill makes a state of n hosts, ten machines on each, ten containers in each of
// those, in n/10 projects, with every tenth host half empty and one spare.
func fill(b testing.TB, n, losses int) *planner.State {
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
	for i := range 2 * losses { // room for the guarantee
		must(b, s.SetHost(testHost(fmt.Sprintf("spare-%d", i), 96000, 256*gib)))
	}
	must(b, s.SetPolicy(planner.Policy{HostLosses: losses}))
	return s
}

// processCPU is what this process has used of the processors: a wall clock lies on a
// busy machine.
func processCPU() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		panic(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

var benchHosts = []int{100, 1000, 10000}

// benchPlace measures one container placed, committed and, a hundred later, gone again.
func benchPlace(b *testing.B, hosts, losses int, shape func(i int, c *planner.Container)) {
	s := fill(b, hosts, losses)
	var took []time.Duration
	var alive []string
	i, boots := 0, 0
	cpu := processCPU()
	b.ReportAllocs()
	for b.Loop() {
		i++
		id := fmt.Sprintf("new-%d", i)
		c := planner.Container{ID: id, Project: fmt.Sprintf("p-%d", i%max(1, hosts/10)),
			Request: planner.Size{CPU: int64(100 * (i % 30)), Memory: int64(1+i%40) * 128 * mib}}
		if shape != nil {
			shape(i, &c)
		}
		must(b, s.SetContainer(c))
		start := time.Now()
		p, err := s.Decide(planner.Question{Place: []string{id}})
		took = append(took, time.Since(start))
		must(b, err)
		if len(p.Unplaced) > 0 {
			b.Fatal(p.Unplaced)
		}
		names := map[string]string{}
		for _, a := range p.Actions {
			if a.Kind == planner.Boot {
				boots++
				names[a.Machine] = fmt.Sprintf("booted-%d", boots)
			}
		}
		must(b, s.Commit(p, names))
		if alive = append(alive, id); len(alive) > 100 {
			s.RemoveContainer(alive[0])
			alive = alive[1:]
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64((processCPU()-cpu).Microseconds())/float64(len(took)), "cpu-µs/op")
	b.ReportMetric(float64(len(took))/b.Elapsed().Seconds(), "placements/s")
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1000, "median-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkPlace is placements a second (event, decision, commit), from 10,000 to
// 1,000,000 containers.
func BenchmarkPlace(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) { benchPlace(b, hosts, 0, nil) })
	}
}

// BenchmarkPlaceGuaranteed is the same with every host loss survivable.
func BenchmarkPlaceGuaranteed(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) { benchPlace(b, hosts, 1, nil) })
	}
}

// BenchmarkPlaceSpread is replicas of services with hundreds of them, spread over hosts.
func BenchmarkPlaceSpread(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) {
			benchPlace(b, hosts, 0, func(i int, c *planner.Container) { c.Service, c.Spread = fmt.Sprintf("s-%d", i%4), "host" })
		})
	}
}

// alone is replicas of which a host bears one only.
func alone(_ int, c *planner.Container) {
	c.Service = "alone"
	c.Anti = []planner.AntiRule{{Service: "alone", Layer: "host"}}
}

// BenchmarkPlaceAnti is such a replica, the first of its project.
func BenchmarkPlaceAnti(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) { benchPlace(b, hosts, 0, alone) })
	}
}

// BenchmarkPlaceAntiAmong is one where there are ten of them already.
func BenchmarkPlaceAntiAmong(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) {
			benchPlace(b, hosts, 0, func(i int, c *planner.Container) {
				c.Project = fmt.Sprintf("p-%d", i%10)
				alone(i, c)
			})
		})
	}
}

// BenchmarkPlaceAntiGuaranteed is the first of a project with every host loss survivable.
func BenchmarkPlaceAntiGuaranteed(b *testing.B) {
	for _, hosts := range benchHosts {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) { benchPlace(b, hosts, 1, alone) })
	}
}

// BenchmarkHostLost plans the loss of a host with 200 machines in the largest state:
// with room on the other hosts, and with none but what two spare hosts keep back for
// everybody.
func BenchmarkHostLost(b *testing.B) {
	for _, full := range []bool{false, true} {
		for _, inside := range []int{1, 10} {
			b.Run(fmt.Sprintf("full=%v/containers=%d", full, 200*inside), func(b *testing.B) { benchLost(b, full, inside) })
		}
	}
}

func benchLost(b *testing.B, full bool, inside int) {
	s := fill(b, 10000, 1)
	if full {
		for h := range 10000 {
			must(b, s.SetHost(testHost(fmt.Sprintf("h-%05d", h), 81000, 10*(16*gib+80*mib))))
		}
	}
	h := testHost("lost", 96000*2, 256*gib*2)
	h.MachineExtra, h.GuestExtra = planner.Size{}, planner.Size{}
	must(b, s.SetHost(h))
	for i := range 2 {
		must(b, s.SetHost(testHost(fmt.Sprintf("spare-%d", i), 192000, 256*gib)))
	}
	for m := range 200 {
		id := fmt.Sprintf("lost-%d", m)
		project := fmt.Sprintf("p-%d", m)
		must(b, s.SetMachine(planner.Machine{ID: id, Host: "lost", Project: project, Size: planner.Size{CPU: 900, Memory: gib}, Ceiling: planner.Size{CPU: 900, Memory: gib}}))
		for c := range inside {
			must(b, s.SetContainer(planner.Container{ID: fmt.Sprintf("%s-%d", id, c), Project: project, Machine: id,
				Request: planner.Size{CPU: int64(300 / inside), Memory: int64(512 / inside * mib)}}))
		}
	}
	if ok, who := s.Survives(); !ok {
		b.Fatal(len(who), "containers have nowhere to go")
	}
	b.ReportAllocs()
	for b.Loop() {
		p, err := s.Decide(planner.Question{HostLost: []string{"lost"}})
		must(b, err)
		if len(p.Unplaced) > 0 || len(p.Actions) < 200 {
			b.Fatal(len(p.Actions), p.Unplaced)
		}
	}
}

// BenchmarkClone copies the state, as a question that may take long does: whoever
// decides waits meanwhile.
func BenchmarkClone(b *testing.B) {
	for _, hosts := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("hosts=%d/containers=%d", hosts, hosts*100), func(b *testing.B) {
			s := fill(b, hosts, 1)
			b.ReportAllocs()
			for b.Loop() {
				s.Clone()
			}
		})
	}
}

// BenchmarkState is the memory of 10,000 hosts, 100,000 machines and 1,000,000 containers.
func BenchmarkState(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := fill(b, 10000, 1)
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/(1<<20), "MiB")
		runtime.KeepAlive(s)
	}
}
