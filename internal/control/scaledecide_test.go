package control

import (
	"math"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	v1 "tandem/api/tandem/v1"
)

// each is samples of ready containers that use so much of their CPU.
func each(shares ...float64) []scaleSample {
	var out []scaleSample
	for _, s := range shares {
		out = append(out, scaleSample{ready: true, known: true, cpu: s, memory: 0.1, pressure: 100 * s, pressureKnown: true})
	}
	return out
}

func TestDecideScale(t *testing.T) {
	cpu := &v1.ScalePolicy{Min: 1, Max: 10, CpuTarget: 0.5}
	unready, missing := scaleSample{known: true, cpu: 1}, scaleSample{ready: true}
	dumb := scaleSample{ready: true, known: true, cpu: 0.5}
	ago := func(s float64, n int) wanted { return wanted{time.Duration(s * float64(time.Second)), n} }
	old := []wanted{ago(301, 9), ago(31, 1)}
	for _, x := range []struct {
		name    string
		p       *v1.ScalePolicy
		current int
		samples []scaleSample
		history []wanted
		want    int
		wanted  int
		say     string
	}{
		{"at the target", cpu, 2, each(0.5, 0.5), old, 2, 2, "cpu 50 %, target 50 %"},
		{"within tolerance", cpu, 2, each(0.54, 0.54), old, 2, 2, ""},
		{"above", cpu, 2, each(0.9, 0.7), old, 4, 4, "4 instead of 2"},
		{"above, but not for long", cpu, 2, each(0.9, 0.7), []wanted{ago(15, 2)}, 2, 4, "if it lasts for 30 s"},
		{"above, and less so before", cpu, 2, each(0.9, 0.7), []wanted{ago(15, 3)}, 3, 4, ""},
		{"below", cpu, 4, each(0.1, 0.1, 0.1, 0.1), old, 1, 1, "for 5 min no more than 1 were wanted"},
		{"below, but not for long", cpu, 4, each(0.1, 0.1, 0.1, 0.1), []wanted{ago(299, 3), ago(200, 2)}, 3, 1, "no more than 3"},
		{"below, with a peak before", cpu, 4, each(0.1, 0.1, 0.1, 0.1), []wanted{ago(200, 6)}, 4, 1, "1 would do"},
		{"never above max", cpu, 8, each(1, 1, 1, 1, 1, 1, 1, 1), old, 10, 10, ""},
		{"at max", cpu, 10, each(1, 1, 1, 1, 1, 1, 1, 1, 1, 1), old, 10, 10, "no more than 10 are allowed"},
		{"never below min", &v1.ScalePolicy{Min: 3, Max: 10, CpuTarget: 0.5}, 4, each(0, 0, 0, 0), old, 3, 3, ""},
		{"below min", &v1.ScalePolicy{Min: 3, Max: 10, CpuTarget: 0.5}, 1, nil, nil, 3, 3, "between 3 and 10 are allowed"},
		{"above max", cpu, 20, each(1), nil, 10, 10, "between 1 and 10"},
		{"a burst grows by twice at most", &v1.ScalePolicy{Min: 1, Max: 1000, CpuTarget: 0.01}, 10, each(1, 1, 1, 1, 1, 1, 1, 1, 1, 1), old, 20, 1000, ""},
		{"a small one by four", &v1.ScalePolicy{Min: 1, Max: 1000, CpuTarget: 0.01}, 1, each(1), old, 5, 100, ""},
		{"those not ready are about to help", cpu, 4, append(each(0.9, 0.9), unready, unready), old, 4, 4, ""},
		{"those not ready don't count for fewer", cpu, 3, append(each(0.1, 0.1), unready), old, 1, 1, ""},
		{"missing ones count as idle when more are wanted", cpu, 3, append(each(0.9, 0.9), missing), old, 4, 4, ""},
		{"missing ones count as busy when fewer are", cpu, 4, append(each(0.1, 0.1), missing, missing), old, 3, 3, ""},
		{"missing ones turn it round", cpu, 3, append(each(0.6), missing, missing), old, 3, 3, ""},
		{"all missing", cpu, 3, []scaleSample{missing, missing, missing}, old, 3, 3, "cpu was not measured"},
		{"none there", cpu, 3, nil, old, 3, 3, "no container is ready"},
		{"none ready", cpu, 3, []scaleSample{unready}, old, 3, 3, "no container is ready"},
		{"nonsense is missing", cpu, 2, append(each(0.5), scaleSample{ready: true, known: true, cpu: math.NaN()}), old, 2, 2, ""},
		{"the largest target counts", &v1.ScalePolicy{Min: 1, Max: 10, CpuTarget: 0.5, MemoryTarget: 0.05}, 2, each(0.5, 0.5), old, 4, 4, "cpu 50 %, target 50 %, memory 10 %, target 5 %"},
		{"pressure", &v1.ScalePolicy{Min: 1, Max: 10, PressureTarget: 10}, 2, each(0.2, 0.2), old, 4, 4, "pressure 20 %, target 10 %"},
		{"no pressure here", &v1.ScalePolicy{Min: 1, Max: 10, PressureTarget: 10}, 2, []scaleSample{dumb, dumb}, old, 2, 2, "not told by the kernel"},
		{"no pressure here: not fewer", &v1.ScalePolicy{Min: 1, Max: 10, CpuTarget: 1, PressureTarget: 10}, 2, []scaleSample{dumb, dumb}, old, 2, 2, "not told by the kernel"},
		{"no pressure here: but more", &v1.ScalePolicy{Min: 1, Max: 10, CpuTarget: 0.25, PressureTarget: 10}, 2, []scaleSample{dumb, dumb}, old, 4, 4, "cpu 50 %"},
	} {
		a := decideScale(x.p, x.current, x.samples, x.history)
		if a.replicas != x.want || a.wanted != x.wanted || !strings.Contains(a.reason, x.say) {
			t.Errorf("%s: %+v", x.name, a)
		}
	}
}

// Whatever is measured: the bounds hold, no step is larger than allowed, more come only
// with reason, and nothing depends on the order of samples.
func TestDecideScaleProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := &v1.ScalePolicy{Min: rapid.Int32Range(1, 20).Draw(t, "min"), CpuTarget: rapid.Float64Range(0, 1).Draw(t, "cpu"), PressureTarget: rapid.Float64Range(0, 100).Draw(t, "pressure")}
		p.Max = p.Min + rapid.Int32Range(0, 30).Draw(t, "more")
		current := rapid.IntRange(1, 60).Draw(t, "current")
		samples := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) scaleSample {
			return scaleSample{ready: rapid.Bool().Draw(t, "ready"), known: rapid.Bool().Draw(t, "known"), cpu: rapid.Float64().Draw(t, "cpu"),
				pressure: rapid.Float64Range(0, 100).Draw(t, "pressure"), pressureKnown: rapid.Bool().Draw(t, "told")}
		}), 0, 12).Draw(t, "samples")
		history := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) wanted {
			return wanted{time.Duration(rapid.Int64Range(0, int64(10*time.Minute)).Draw(t, "age")), rapid.IntRange(int(p.Min), int(p.Max)).Draw(t, "n")}
		}), 0, 12).Draw(t, "history")
		a := decideScale(p, current, samples, history)
		if a.replicas < int(p.Min) || a.replicas > int(p.Max) || a.wanted < int(p.Min) || a.wanted > int(p.Max) {
			t.Fatalf("out of bounds: %+v", a)
		}
		if current < int(p.Min) || current > int(p.Max) {
			return
		}
		if a.replicas > max(2*current, current+scaleUpStep) || a.replicas > current && a.wanted < a.replicas || a.replicas < current && a.wanted > a.replicas {
			t.Fatalf("current %d: %+v", current, a)
		}
		for _, w := range history {
			if w.age < scaleUpWindow && a.replicas > max(current, w.replicas) || w.age < scaleDownWindow && a.replicas < min(current, w.replicas) {
				t.Fatalf("current %d, %+v against %+v", current, a, w)
			}
		}
		if len(samples) > 1 {
			samples[0], samples[len(samples)-1] = samples[len(samples)-1], samples[0]
			if b := decideScale(p, current, samples, history); b.replicas != a.replicas && math.Abs(float64(b.wanted-a.wanted)) > 1 {
				t.Fatalf("another order: %+v, %+v", a, b)
			}
		}
	})
}
