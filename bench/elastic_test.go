package bench

import (
	"fmt"
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
	run("keep")
	var grown, slot, booted []time.Duration
	for i := range 7 {
		name := fmt.Sprint("more-", i)
		grown = append(grown, run(name, "-m", "192m"))
		h.Tandem("rm", "-f", name)
		slot = append(slot, run(name, "-m", "192m"))
		own := fmt.Sprint("own-", i)
		booted = append(booted, run(own, "--isolation", "own"))
		h.Tandem("rm", "-f", own)
	}
	g, s, o := median(grown), median(slot), median(booted)
	note("one more container in a free slot, until it runs", ms(s))
	report("one more, for which its machine grows", ms(g), fmt.Sprintf("1.2 x %s (free slot)", ms(s)), float64(g) <= 1.2*float64(s))
	report("one more, for which a machine is booted", ms(o), "2 s", o <= 2*time.Second)
}
