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
	type change struct {
		at   Time
		size Size
	}
	var list []change
	for i := range t.Requests {
		q := &t.Requests[i]
		if !slices.ContainsFunc(pools, func(p Pool) bool { return q.Need.add(overhead).fits(p.Size) }) {
			continue
		}
		list = append(list, change{q.Arrive, q.Need})
		if !q.stays() {
			list = append(list, change{q.Arrive + q.Life, Size{-q.Need.CPU, -q.Need.Memory}})
		}
	}
	slices.SortFunc(list, func(a, b change) int { return cmp.Compare(a.at, b.at) })
	cpu := newLadder(pools, func(p Pool) int64 { return p.Size.CPU - overhead.CPU })
	mem := newLadder(pools, func(p Pool) int64 { return p.Size.Memory - overhead.Memory })
	var sum, last Time
	var total Size
	for i := 0; i <= len(list); i++ {
		at := end
		if i < len(list) {
			at = list[i].at
		}
		if from, to := max(last, warmup), min(at, end); from < to {
			sum += Time(max(cpu.hosts(total.CPU), mem.hosts(total.Memory))) * (to - from)
		}
		if i < len(list) {
			last, total = at, total.add(list[i].size)
		}
	}
	return sum
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
