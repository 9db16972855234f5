package control

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// A percentile is the exact one of the samples, or at most 5 % more.
func TestPercentiles(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.Float64Range(0, 1e8), 1, 200).Draw(t, "values")
		p := rapid.Float64Range(0.01, 1).Draw(t, "p")
		d := newDecaying(1, now)
		for _, v := range values {
			d.add(now, v)
		}
		slices.Sort(values)
		exact := max(1, values[max(0, int(math.Ceil(p*float64(len(values))-1e-9))-1)])
		if got := d.percentile(p); got < exact*0.999999 || got > exact*histRatio*1.000001 {
			t.Fatalf("%g of %v: %g, not %g", p, values, got, exact)
		}
	})
}

func TestOldSamplesFade(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	d := newDecaying(1, begin)
	for range 100 {
		d.add(begin, 1000)
	}
	if p := d.percentile(0.95); p < 1000 {
		t.Fatal(p)
	}
	later := begin.Add(10 * histHalfLife) // 100 old ones weigh a tenth of one new
	for range 100 {
		d.add(later, 10)
	}
	if p := d.percentile(0.95); p > 11 {
		t.Error("the old load still counts:", p)
	}
	// Years go by, and the clock goes back: nothing overflows, nothing grows.
	for i := range 400 {
		at := begin.Add(time.Duration(i) * 90 * day)
		if i%7 == 6 {
			at = begin.Add(-1000 * day)
		}
		d.add(at, float64(1+i))
		for _, w := range d.Weights {
			if math.IsNaN(w) || math.IsInf(w, 0) {
				t.Fatal(i, d.Weights)
			}
		}
	}
	if len(d.Weights) > histBuckets {
		t.Error(len(d.Weights))
	}
}

func TestRecommend(t *testing.T) {
	begin := time.Unix(1_000_000, 0)
	h := newUsageHistory("p", "web", begin)
	for i := range 100 { // 5 % bursts of CPU do not count, the one peak of memory does
		cpu, memory := 200.0, int64(100<<20)
		if i%25 == 24 {
			cpu = 2000
		}
		if i == 50 {
			memory = 180 << 20
		}
		h.add(begin.Add(time.Duration(i)*time.Minute), cpu, memory)
	}
	meta := &v1.Meta{Project: "p", Name: "web"}
	r := recommend(meta, &v1.Resources{CpuMilliReservation: 1000, MemoryBytesLimit: 512 << 20}, h)
	if !r.Enough || r.Samples != 100 || r.Span.AsDuration() != 99*time.Minute || r.Reserved.CpuMilli != 1000 || r.Reserved.MemoryBytes != 512<<20 {
		t.Error(r)
	}
	if c := r.Recommended.CpuMilli; c < 230 || c > 250 || c%10 != 0 || r.Recommended.MemoryBytes != 207<<20 || r.MemoryMaxBytes != 180<<20 || r.MemoryP99Bytes > 180<<20 {
		t.Error(r)
	}
	if !strings.Contains(r.Text, "in 100 samples over 1h39m0s") || !strings.Contains(r.Text, "never more than 180MiB") {
		t.Error(r.Text)
	}
	r = recommend(meta, &v1.Resources{CpuMilliLimit: 100, MemoryBytesLimit: 190 << 20}, h)
	if r.Recommended.CpuMilli != 100 || r.Recommended.MemoryBytes != 190<<20 || !strings.Contains(r.Text, "may be too low") {
		t.Error(r)
	}
	if r = recommend(meta, nil, nil); r.Enough || r.Samples != 0 || r.Recommended.CpuMilli != 0 || r.Text == "" {
		t.Error(r)
	}
	short := newUsageHistory("p", "web", begin)
	short.add(begin, 0, 0)
	if r = recommend(meta, nil, short); r.Enough || r.Recommended.CpuMilli != leastCPU || r.Recommended.MemoryBytes != leastMemory || !strings.Contains(r.Text, "too little") {
		t.Error(r)
	}
	// Peaks of more than eight days ago are forgotten.
	h.add(begin.Add(9*day), 200, 1<<20)
	if h.top() != 1<<20 || len(h.Peaks) > peakDays {
		t.Error(h.Peaks)
	}
}

// The controllers see what containers use, write it down, and a new server goes on
// with it; what is damaged begins anew and harms nothing.
func TestUsageIsObservedAndKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "usage.json")
	x := &script{world: newWorld(t)}
	x.ctl.opts.UsageFile = file
	play := func(lines ...string) {
		for _, l := range lines {
			x.do(l)
		}
		x.settle()
	}
	service := func() *v1.Service {
		s, err := store.Get[*v1.Service](x.st, store.Key{Kind: store.Services, Project: "p", Name: "web"})
		must(t, err)
		return s
	}
	play("host alpha cpu=8 memory=4GiB", "project p", "load web cpu=400 memory=100MiB", "service p web image=web cpu=500 memory=64MiB replicas=2", "pass 65m")
	r := x.ctl.Recommend(service())
	if !r.Enough || r.Samples < 120 || r.Recommended.CpuMilli < 230 || r.Recommended.CpuMilli > 250 || r.Recommended.MemoryBytes != 115<<20 {
		t.Fatal(r)
	}
	restart := func() {
		x.do("restart")
		x.ctl.opts.UsageFile = file
		x.do("connect alpha")
		x.settle()
	}
	before := r.Samples
	restart() // as after kill -9: nothing said goodbye
	if r = x.ctl.Recommend(service()); r.Samples < before-2*int64(saveEvery/observeEvery) || r.Samples > before {
		t.Errorf("%d samples of %d", r.Samples, before)
	}
	play("pass 5m")
	before = x.ctl.Recommend(service()).Samples
	x.ctl.closeUsage()
	restart()
	if r = x.ctl.Recommend(service()); r.Samples != before {
		t.Errorf("%d samples of %d", r.Samples, before)
	}
	for _, bad := range []string{"", "{", `{"format":2}`, `{"format":1,"services":{"s-p-web":null}}`, `{"format":1,"services":{"s-p-web":{"samples":1,"cpu":{"first":1,"weights":{"5":-1}}}}}`,
		`{"format":1,"services":{"s-p-web":{"samples":1,"cpu":{"first":1,"weights":{"99999":1}},"memory":{"first":1048576}}}}`} {
		must(t, os.WriteFile(file, []byte(bad), 0o600))
		restart()
		if r = x.ctl.Recommend(service()); r.Samples != 0 {
			t.Error(bad, r)
		}
	}
	play("pass 3m", "down p", "pass 2m")
	if len(x.ctl.usages.services) != 0 {
		t.Error("a service that is gone is remembered:", x.ctl.usages.services)
	}
}
