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
