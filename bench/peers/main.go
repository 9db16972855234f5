package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"
)

// What both sides are given.
const (
	hostCPU    = 96000 // thousandths
	hostMemory = 256 << 30
	machines   = 10  // on each host
	staying    = 100 // containers that are placed and not gone again
)

// request is a container to place, or that is there.
type request struct {
	id, project, service string
	cpu, memory          int64
}

func hostName(h int) string { return fmt.Sprintf("h-%05d", h) }

func project(h, m, hosts int) string {
	return fmt.Sprintf("p-%d", (h*machines+m)%max(1, hosts/10))
}

// resident is container c in machine m of host h, there from the start.
func resident(h, m, c, hosts int) request {
	return request{id: fmt.Sprintf("c-%05d-%d-%d", h, m, c), project: project(h, m, hosts), service: fmt.Sprintf("s-%d", c%4),
		cpu: int64(500 + 50*(c%5)), memory: 1 << 30}
}

// newcomer is the container number i to place.
func newcomer(i, hosts int) request {
	return request{id: fmt.Sprintf("new-%d", i), project: fmt.Sprintf("p-%d", i%max(1, hosts/10)), service: fmt.Sprintf("s-%d", i%4),
		cpu: int64(100 * (i % 30)), memory: int64(1+i%40) * 128 << 20}
}

// peer is a scheduler under measurement.
type peer interface {
	// place decides about a container and notes where it is; it returns what the
	// decision took, and all of it.
	place(r request, shape string) (decision, whole time.Duration, err error)
	remove(id string) error
}

// runner feeds a peer.
type runner struct {
	peer
	hosts, n int
	alive    []string
}

// sample is what some decisions took.
type sample struct {
	took  []time.Duration
	whole time.Duration
}

// run makes n decisions, fewer if they take longer than patience.
func (r *runner) run(n int, shape string, into *sample) error {
	start := time.Now()
	for range n {
		if time.Since(start) > patience {
			return nil
		}
		r.n++
		c := newcomer(r.n, r.hosts)
		took, whole, err := r.place(c, shape)
		if err != nil {
			return err
		}
		into.took, into.whole = append(into.took, took), into.whole+whole
		if r.alive = append(r.alive, c.id); len(r.alive) > staying {
			if err := r.remove(r.alive[0]); err != nil {
				return err
			}
			r.alive = r.alive[1:]
		}
	}
	return nil
}

// clear takes away what was placed.
func (r *runner) clear() error {
	for _, id := range r.alive {
		if err := r.remove(id); err != nil {
			return err
		}
	}
	r.alive = nil
	return nil
}

func (s *sample) at(part float64) time.Duration {
	slices.Sort(s.took)
	return s.took[int(float64(len(s.took)-1)*part)]
}

func (s *sample) perSecond() float64 { return float64(len(s.took)) / s.whole.Seconds() }

func main() {
	hosts := flag.Int("hosts", 10000, "hosts")
	perHost := flag.Int("containers", 100, "containers on each host, a multiple of 10")
	decisions := flag.Int("decisions", 1500, "decisions of kube-scheduler for each row, unless they take more than 20 s; the planner makes ten times as many")
	flag.Parse()
	if err := compare(*hosts, *perHost, *decisions); err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

const (
	rounds   = 5 // the two take turns
	patience = 4 * time.Second
)

func compare(hosts, perHost, decisions int) error {
	environment(hosts, perHost)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	k, err := newKube(ctx, hosts, perHost)
	if err != nil {
		return err
	}
	t, err := newTandem(hosts, perHost)
	if err != nil {
		return err
	}
	left, right := &runner{peer: k, hosts: hosts}, &runner{peer: t, hosts: hosts}
	fmt.Printf("%-7s %-6s | %-36s | %-36s | %s\n", "", "", "kube-scheduler", "tandem", "ratio of")
	fmt.Printf("%-7s %-6s | %10s %10s %14s | %10s %10s %14s | %8s %8s\n", "rule", "cores",
		"median", "p99", "decisions/s", "median", "p99", "decisions/s", "medians", "rates")
	cores := []int{1}
	if n := runtime.NumCPU(); n > 1 {
		cores = append(cores, n)
	}
	for _, n := range cores {
		was := runtime.GOMAXPROCS(n)
		for _, shape := range []string{"plain", "spread", "anti"} {
			var a, b sample
			runtime.GC()
			for range rounds {
				if err := left.run(max(1, decisions/rounds), shape, &a); err != nil {
					return fmt.Errorf("kube-scheduler: %w", err)
				}
				if err := right.run(max(1, 10*decisions/rounds), shape, &b); err != nil {
					return fmt.Errorf("tandem: %w", err)
				}
			}
			fmt.Printf("%-7s %-6d | %10s %10s %14.0f | %10s %10s %14.0f | %8.1f %8.1f\n", shape, n,
				round(a.at(0.5)), round(a.at(0.99)), a.perSecond(), round(b.at(0.5)), round(b.at(0.99)), b.perSecond(),
				float64(a.at(0.5))/float64(b.at(0.5)), b.perSecond()/a.perSecond())
			for _, r := range []*runner{left, right} {
				if err := r.clear(); err != nil {
					return err
				}
			}
		}
		runtime.GOMAXPROCS(was)
	}
	fmt.Printf("load at the end: %s\n", firstLine("/proc/loadavg"))
	return nil
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Nanosecond) }

// environment prints what the figures depend on.
func environment(hosts, perHost int) {
	model := "unknown"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if d.Path == "k8s.io/kubernetes" {
				version = d.Version
			}
		}
	}
	fmt.Printf("%d hosts of %d CPU and %d GiB, %d machines, %d containers; placed ones go after %d more\n",
		hosts, hostCPU/1000, hostMemory>>30, hosts*machines, hosts*perHost, staying)
	fmt.Printf("%s, %d cores (%s), %s/%s, Kubernetes %s, load %s\n", runtime.Version(), runtime.NumCPU(), model,
		runtime.GOOS, runtime.GOARCH, version, firstLine("/proc/loadavg"))
}

func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}
