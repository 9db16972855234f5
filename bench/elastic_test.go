package bench

import (
	"fmt"
	"strconv"
	"testing"
	"time"
)

// BenchmarkMemoryBack: a container that used most of a grown machine ends. The promise
// counts from its end; this counts from when its end was asked for.
func BenchmarkMemoryBack(b *testing.B) {
	h := cloned(b)
	h.Images()
	var d []time.Duration
	var given, share int64
	for i := range 3 { // a machine that shrinks for the second time waits longer: another each time
		project := fmt.Sprint("round", i)
		x := h.MemoryBack(b, project, time.Minute)
		h.Tandem("rm", "-f", "--project-name", project, project+"-keep")
		d = append(d, x.After)
		given, share = x.GivenUp, 100*x.Returned/x.GivenUp
	}
	took := median(d)
	note("a container of 512 MiB ends: its machine gives up", fmt.Sprintf("%d MiB", given>>20))
	report(fmt.Sprintf("80 %% of that back on the host (PSS; last round %d %%)", share), ms(took), "10 s", took <= 10*time.Second)
}

// BenchmarkOneMore: one more container, when there is a free slot, when its machine must
// grow for it, and when it needs a machine of its own.
func BenchmarkOneMore(b *testing.B) {
	h := cloned(b, "--shrink-delay", "1h") // what was grown stays, as a free slot
	h.Images()
	run := func(name string, args ...string) time.Duration {
		start := time.Now()
		h.Tandem(append(append([]string{"run", "-d", "--name", name, "--stop-timeout", "1"}, args...), "busybox", "sleep", "100000")...)
		return time.Since(start)
	}
	size := func() (n int64) { // of the machine that is shared
		id := h.Container("keep").Assignment.MachineID
		for _, m := range machines(b, h) {
			if m.Meta.ID == id {
				n, _ = strconv.ParseInt(m.Size.MemoryBytes, 10, 64)
			}
		}
		return n
	}
	run("keep")
	var grown, slot, booted []time.Duration
	for i := range 15 { // the ratio of two medians of 7 was off by a fifth
		name := fmt.Sprint("more-", i)
		before := size()
		grown = append(grown, run(name, "-m", "192m"))
		larger := size()
		h.Tandem("rm", "-f", name)
		slot = append(slot, run(name, "-m", "192m"))
		// What the guest itself needs is measured meanwhile, and may add a little.
		if now := size(); larger-before < 100<<20 || now-larger > 128<<20 {
			b.Fatalf("the machine was to grow and then to stay: it had %d, %d and %d bytes", before, larger, now)
		}
		own := fmt.Sprint("own-", i)
		booted = append(booted, run(own, "--isolation", "own"))
		h.Tandem("rm", "-f", own)
	}
	g, s, o := median(grown), median(slot), median(booted)
	note("one more container in a free slot, until it runs", ms(s))
	report("one more, for which its machine grows", ms(g), fmt.Sprintf("1.2 x %s (free slot)", ms(s)), float64(g) <= 1.2*float64(s))
	report("one more, for which a machine is booted", ms(o), "2 s", o <= 2*time.Second)
}
