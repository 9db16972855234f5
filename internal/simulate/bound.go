package simulate

import (
	"cmp"
	"slices"
)

// lowerBound is the host time that no policy can go below: at each instant the
// larger of total CPU / (host CPU - one machine's overhead) and the same for
// memory, rounded up, as if every container ran from its arrival on. With unlike
// hosts, the largest count first. Containers that no host could hold are left out.
func lowerBound(t *Trace, pools []Pool, overhead Size, warmup, end Time) Time {
	cpu := newLadder(pools, func(p Pool) int64 { return p.Size.CPU - overhead.CPU })
	mem := newLadder(pools, func(p Pool) int64 { return p.Size.Memory - overhead.Memory })
	var sum, last Time
	var total Size
	for _, c := range changes(t, pools, overhead, end) {
		if from, to := max(last, warmup), min(c.at, end); from < to {
			sum += Time(max(cpu.hosts(total.CPU), mem.hosts(total.Memory))) * (to - from)
		}
		last, total = c.at, total.add(c.size)
	}
	return sum
}

// lowerBoundMachines is the machine time that no policy can go below: at each
// instant, for each of those who share no machine with others, as many machines of
// the largest host's size as hold what it runs, summed over them.
func lowerBoundMachines(t *Trace, pools []Pool, overhead Size, isolation string, warmup, end Time) Time {
	var net Size
	for _, p := range pools {
		net = net.max(p.Size.sub(overhead))
	}
	need := func(s Size) int64 {
		return max((s.CPU+net.CPU-1)/net.CPU, (s.Memory+net.Memory-1)/net.Memory)
	}
	var sum, last Time
	var machines int64
	totals := map[string]Size{}
	for _, c := range changes(t, pools, overhead, end) {
		if from, to := max(last, warmup), min(c.at, end); from < to {
			sum += Time(machines) * (to - from)
		}
		last = c.at
		if c.request == nil {
			continue
		}
		group := c.request.Project
		switch isolation {
		case IsolationShared:
			group = ""
		case IsolationOwn:
			group = c.request.ID
		}
		was := totals[group]
		totals[group] = was.add(c.size)
		machines += need(totals[group]) - need(was)
	}
	return sum
}

// change is what a container adds to what runs, or takes from it.
type change struct {
	at      Time
	size    Size
	request *Request // nil: the end
}

// changes lists arrivals and departures by time, and the end, as if every
// container ran from its arrival on. Those that no host could hold are left out.
func changes(t *Trace, pools []Pool, overhead Size, end Time) []change {
	list := make([]change, 0, 2*len(t.Requests)+1)
	for i := range t.Requests {
		q := &t.Requests[i]
		if !slices.ContainsFunc(pools, func(p Pool) bool { return q.Need.add(overhead).fits(p.Size) }) {
			continue
		}
		list = append(list, change{q.Arrive, q.Need, q})
		if !q.stays() {
			list = append(list, change{q.Arrive + q.Life, Size{-q.Need.CPU, -q.Need.Memory}, q})
		}
	}
	slices.SortStableFunc(list, func(a, b change) int { return cmp.Compare(a.at, b.at) })
	return append(list, change{at: max(end, 0)})
}

// ladder says how many hosts an amount needs, the largest first.
type ladder []struct {
	each int64
	n    int64 // 0: no end
}

func newLadder(pools []Pool, net func(Pool) int64) ladder {
	var l ladder
	for _, p := range pools {
		if net(p) > 0 {
			l = append(l, struct{ each, n int64 }{net(p), int64(p.Count)})
		}
	}
	slices.SortStableFunc(l, func(a, b struct{ each, n int64 }) int { return cmp.Compare(b.each, a.each) })
	return l
}

func (l ladder) hosts(amount int64) int64 {
	var n int64
	for _, s := range l {
		if amount <= 0 {
			break
		}
		need := (amount + s.each - 1) / s.each
		if s.n > 0 {
			need = min(need, s.n)
		}
		n += need
		amount -= need * s.each
	}
	return n
}
