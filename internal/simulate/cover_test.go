package simulate

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// state makes hosts of 4 CPU and 8 GiB from sizes: a list of machines for each
// host, each with the CPU and GiB of its containers, its size being their sum.
func state(overhead Size, hosts ...[]boxOf) []*Host {
	var list []*Host
	n := 0
	for i, machines := range hosts {
		h := &Host{ID: fmt.Sprintf("h-%d", i+1), Size: Size{4000, 8 * gib}, Up: true, pos: i}
		for _, b := range machines {
			n++
			m := &Machine{ID: fmt.Sprintf("m-%d", n), Host: h, Project: b.group, Used: overhead, Up: true, seq: n}
			for j, s := range b.needs {
				c := &Container{Request: &Request{ID: fmt.Sprintf("c-%d-%d", n, j), Need: s, Project: b.group}, Machine: m, Running: true}
				m.Containers = append(m.Containers, c)
				m.Used = m.Used.add(s)
			}
			m.Size = m.Used.add(b.slack)
			m.Live = m.Size
			h.Machines = append(h.Machines, m)
			h.Used = h.Used.add(m.Size)
		}
		list = append(list, h)
	}
	return list
}

type boxOf struct {
	group string
	needs []Size
	slack Size
}

func TestCoverByHand(t *testing.T) {
	over := Size{100, gib / 4}
	one := Size{1000, gib}
	for _, x := range []struct {
		name  string
		hosts [][]boxOf
		want  bool
	}{
		{"nothing runs", [][]boxOf{{}}, true},
		{"one host alone", [][]boxOf{{{"", []Size{one}, Size{}}}}, false},
		{"an empty host beside", [][]boxOf{{{"", []Size{one, one, one}, Size{}}}, {}}, true},
		{"free slots of the same project", [][]boxOf{{{"p", []Size{one}, Size{2900, 6 * gib}}}, {{"p", []Size{one}, Size{2900, 6 * gib}}}}, true},
		{"free slots of another project only", [][]boxOf{{{"p", []Size{one}, Size{2900, 6 * gib}}}, {{"q", []Size{one}, Size{2900, 6 * gib}}}}, false},
		{"a machine that must be split", [][]boxOf{{{"", []Size{one, one}, Size{}}}, {{"", []Size{{1200, gib}, {1200, gib}}, Size{}}}, {{"", []Size{{1200, gib}, {1200, gib}}, Size{}}}}, true},
		{"its parts fit, not with another's overhead", [][]boxOf{{{"p", []Size{one, one}, Size{}}}, {{"q", []Size{{2850, gib}}, Size{}}}, {{"q", []Size{{2850, gib}}, Size{}}}}, false},
	} {
		k := cover{resizable: true}
		for range 2 { // what it remembers does not change the answer
			if got := k.survives(state(over, x.hosts...), over); got != x.want {
				t.Errorf("%s: %v", x.name, got)
			}
		}
	}
}

// What the cover calls survivable, an exhaustive search that shares no code with it
// finds survivable as well; and nothing is changed by looking.
func TestCoverIsAProof(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		over := Size{100, gib / 4}
		var hosts [][]boxOf
		for range rapid.IntRange(1, 4).Draw(t, "hosts") {
			var ms []boxOf
			room := Size{4000, 8 * gib}
			for range rapid.IntRange(0, 3).Draw(t, "machines") {
				b := boxOf{group: rapid.SampledFrom([]string{"p", "q"}).Draw(t, "group"), slack: Size{int64(rapid.IntRange(0, 8).Draw(t, "slack")) * 100, gib / 2}}
				size := over.add(b.slack)
				for range rapid.IntRange(0, 3).Draw(t, "containers") {
					s := Size{int64(rapid.IntRange(1, 20).Draw(t, "cpu")) * 100, int64(rapid.IntRange(1, 8).Draw(t, "memory")) * gib / 4}
					if size.add(s).fits(room) {
						b.needs = append(b.needs, s)
						size = size.add(s)
					}
				}
				if size.fits(room) {
					room = room.sub(size)
					ms = append(ms, b)
				}
			}
			hosts = append(hosts, ms)
		}
		list := state(over, hosts...)
		before := fmt.Sprint(describe(list))
		k := cover{resizable: rapid.Bool().Draw(t, "resizable")}
		ok := k.survives(list, over)
		if after := fmt.Sprint(describe(list)); after != before {
			t.Fatalf("looking changed\n%s to\n%s", before, after)
		}
		if !ok {
			return
		}
		for _, lost := range list {
			if !exhaustive(list, lost, over) {
				t.Fatalf("the loss of %s can't be survived: %s", lost.ID, before)
			}
		}
	})
}

func describe(list []*Host) (lines []string) {
	for _, h := range list {
		lines = append(lines, fmt.Sprintf("%s: %v used", h.ID, h.Used))
		for _, m := range h.Machines {
			lines = append(lines, fmt.Sprintf("  %s of %q: %v, %v used by %d", m.ID, m.Project, m.Size, m.Used, len(m.Containers)))
		}
	}
	return lines
}

// exhaustive tries every host for every container of lost: on a host a group has a
// machine already or pays for a new one, and what its machines have unused is its own.
func exhaustive(list []*Host, lost *Host, over Size) bool {
	type place struct{ slack map[string]Size }
	var free []Size
	var places []place
	for _, h := range list {
		p := place{map[string]Size{}}
		if h == lost {
			free, places = append(free, Size{-1, -1}), append(places, p)
			continue
		}
		for _, m := range h.Machines {
			s := m.Size.sub(m.Used)
			if have, ok := p.slack[m.Project]; ok {
				s = s.add(have) // generous: slots of one group on a host count as one
			}
			p.slack[m.Project] = s
		}
		free, places = append(free, h.Size.sub(h.Used)), append(places, p)
	}
	var todo []*Container
	for _, m := range lost.Machines {
		todo = append(todo, m.Containers...)
	}
	var try func(i int) bool
	try = func(i int) bool {
		if i == len(todo) {
			return true
		}
		c := todo[i]
		for h := range list {
			slack, has := places[h].slack[c.Machine.Project]
			wasFree := free[h]
			if free[h].CPU < 0 {
				continue
			}
			need := c.Need
			if !has {
				need = need.add(over)
			}
			// From the slots first, the rest from the host.
			used := Size{min(slack.CPU, need.CPU), min(slack.Memory, need.Memory)}
			if rest := need.sub(used); rest.fits(free[h]) {
				free[h] = free[h].sub(rest)
				places[h].slack[c.Machine.Project] = slack.sub(used)
				if try(i + 1) {
					return true
				}
				free[h] = wasFree
				if has {
					places[h].slack[c.Machine.Project] = slack
				} else {
					delete(places[h].slack, c.Machine.Project)
				}
			}
		}
		return false
	}
	return try(0)
}

func TestFitFindsTheFirst(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(0, 20).Draw(t, "n")
		var f fit
		f.reset(n)
		list := make([]Size, n)
		for i := range list {
			list[i] = Size{rapid.Int64Range(-1, 9).Draw(t, "cpu"), rapid.Int64Range(-1, 9).Draw(t, "memory")}
			f.init(i, list[i])
		}
		f.build()
		for range 10 {
			if n > 0 && rapid.Bool().Draw(t, "change") {
				i := rapid.IntRange(0, n-1).Draw(t, "at")
				list[i] = Size{rapid.Int64Range(-1, 9).Draw(t, "cpu"), rapid.Int64Range(-1, 9).Draw(t, "memory")}
				f.set(i, list[i])
			}
			need := Size{rapid.Int64Range(0, 9).Draw(t, "cpu"), rapid.Int64Range(0, 9).Draw(t, "memory")}
			want := -1
			for i, s := range list {
				if need.fits(s) {
					want = i
					break
				}
			}
			if got := f.first(need); got != want {
				t.Fatalf("first of %v in %v is %d, want %d", need, list, got, want)
			}
		}
	})
}
