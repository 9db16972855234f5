package simulate

import (
	"cmp"
	"fmt"
	"math"
	"strings"
)

// Class says who gives way first; see the planner.
const (
	ClassLatency = "latency"
	ClassBatch   = "batch"
)

// Request is a container that a trace asks for.
type Request struct {
	ID      string
	Arrive  Time
	Life    Time // negative: stays
	Need    Size
	Project string
	Service string
	Class   string // ClassLatency or ClassBatch

	customer string // whose it is, where a trace knows no projects; see Zipf
}

func (r *Request) stays() bool { return r.Life < 0 }

// Trace is a list of requests in the order of their arrival.
type Trace struct {
	Name     string
	Requests []Request
	// Until is when the observation ended, if that is known: what would happen
	// later does not count. 0: see End.
	Until Time
}

// End is when the last of the trace's events would happen if nobody waited: the
// last arrival or departure. A trace in which nothing ever leaves is held for an
// hour after the last arrival, so that host-hours are hosts.
func (t *Trace) End() Time {
	if t.Until > 0 {
		return t.Until
	}
	var end, last Time
	leaves := false
	for i := range t.Requests {
		r := &t.Requests[i]
		last = max(last, r.Arrive)
		if !r.stays() {
			leaves = true
			end = max(end, r.Arrive+r.Life)
		}
	}
	if !leaves {
		return last + 3600*1000
	}
	return max(end, last)
}

// Zipf gives the trace's customers (a trace without any: its services) to n
// projects: each goes to one of them by a hash of its name, the k-th with a
// probability proportional to 1/k. The same names always go to the same projects.
func (t *Trace) Zipf(n int) error {
	if n < 1 || n > 1e6 {
		return fmt.Errorf("%d projects: give a number from 1 to 1000000", n)
	}
	cumulated := make([]float64, n)
	sum := 0.0
	for k := range n {
		sum += 1 / float64(k+1)
		cumulated[k] = sum
	}
	names := make([]string, n)
	for k := range n {
		names[k] = fmt.Sprintf("p-%d", k+1)
	}
	for i := range t.Requests {
		r := &t.Requests[i]
		who := cmp.Or(r.customer, r.Service, r.ID)
		u := float64(hash(r.Project, who)>>11) / (1 << 53) * sum
		lo, hi := 0, n-1
		for lo < hi {
			if mid := (lo + hi) / 2; cumulated[mid] > u {
				hi = mid
			} else {
				lo = mid + 1
			}
		}
		r.Project = names[lo]
	}
	return nil
}

// hash is FNV-1a with a finisher (short names differ in few bits only).
func hash(parts ...string) uint64 {
	h := uint64(14695981039346656037)
	for _, p := range parts {
		for i := range len(p) {
			h = (h ^ uint64(p[i])) * 1099511628211
		}
		h = (h ^ 0xff) * 1099511628211
	}
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

// sizeOf turns a trace's numbers into a Size. A container that reserves no memory
// counts as the planner counts it.
func sizeOf(cpuMilli, memMiB float64) Size {
	s := Size{CPU: int64(math.Ceil(cpuMilli - 1e-6)), Memory: int64(math.Ceil(memMiB*(1<<20) - 1e-3))}
	if s.Memory == 0 {
		s.Memory = defaultMemory
	}
	return s
}

func className(s string) (string, error) {
	switch strings.ToLower(s) {
	case "", ClassLatency:
		return ClassLatency, nil
	case ClassBatch:
		return ClassBatch, nil
	}
	return "", fmt.Errorf("class %q is neither latency nor batch", clip(s))
}
