package planner

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestTops compares the tournament with a look at all of the list.
func TestTops(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var x tops
		list := make([]Size, 40)
		brute := func(not int) top {
			var cpu, memory []int64
			for i, v := range list {
				if i != not {
					cpu, memory = append(cpu, v.CPU), append(memory, v.Memory)
				}
			}
			slices.Sort(cpu)
			slices.Sort(memory)
			n := len(cpu)
			return top{one: Size{cpu[n-1], memory[n-1]}, two: Size{cpu[n-2], memory[n-2]}}
		}
		for range rapid.IntRange(1, 60).Draw(t, "changes") {
			i := rapid.IntRange(0, len(list)-1).Draw(t, "which")
			list[i] = Size{rapid.Int64Range(0, 9).Draw(t, "cpu"), rapid.Int64Range(0, 9).Draw(t, "memory")}
			x.set(i, list[i])
			if got, want := x.root(), brute(-1); got != want {
				t.Fatalf("the largest are %v, want %v", got, want)
			}
			if got, want := x.without(i), brute(i); got != want {
				t.Fatalf("without %d the largest are %v, want %v", i, got, want)
			}
			limit := Size{rapid.Int64Range(0, 9).Draw(t, "limit"), rapid.Int64Range(0, 9).Draw(t, "limit")}
			var got, want []int
			x.above(limit, func(i int) { got = append(got, i) })
			for i, v := range list {
				if !v.fits(limit) {
					want = append(want, i)
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("above %v are %v, want %v", limit, got, want)
			}
		}
	})
}
