package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// anyTrace draws a small trace that fits small hosts more or less.
func anyTrace(t *rapid.T) *Trace {
	tr := &Trace{Name: "drawn"}
	at := Time(0)
	for i := range rapid.IntRange(1, 40).Draw(t, "requests") {
		at += Time(rapid.SampledFrom([]int{0, 0, 1, 900, 5000, 30000, 700000}).Draw(t, "gap"))
		q := Request{ID: fmt.Sprintf("c-%d", i), Arrive: at, Life: -1, Class: rapid.SampledFrom([]string{ClassLatency, ClassBatch}).Draw(t, "class"),
			Project: rapid.SampledFrom([]string{"", "p", "q"}).Draw(t, "project"), Service: rapid.SampledFrom([]string{"", "s", "t"}).Draw(t, "service"),
			Need: Size{CPU: int64(rapid.IntRange(0, 45).Draw(t, "cpu")) * 100, Memory: int64(rapid.IntRange(1, 70).Draw(t, "memory")) << 27}}
		if rapid.IntRange(0, 4).Draw(t, "stays") > 0 {
			q.Life = Time(rapid.SampledFrom([]int{0, 1, 2000, 60000, 600000, 3600000}).Draw(t, "life"))
		}
		tr.Requests = append(tr.Requests, q)
	}
	return tr
}

// After any trace, with any policy: no rule is broken, and every figure is what a
// stranger computes from the transcript.
func TestAccountingEqualsTheTranscript(t *testing.T) {
	for _, m := range makers {
		t.Run(m.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				tr := anyTrace(t)
				o := Options{Hosts: []Pool{{Size: Size{4000, 8 * gib}, Count: rapid.SampledFrom([]int{0, 2, 6}).Draw(t, "hosts")}}, Overhead: Size{100, gib / 4},
					Isolation: rapid.SampledFrom([]string{IsolationProject, IsolationShared, IsolationOwn}).Draw(t, "isolation"),
					Boot:      time.Duration(rapid.SampledFrom([]int{0, 5}).Draw(t, "boot")) * time.Second, Grow: time.Duration(rapid.IntRange(0, 2).Draw(t, "grow")) * time.Second,
					BaselineBoot: time.Minute, HostBoot: time.Duration(rapid.SampledFrom([]int{0, 0, 30}).Draw(t, "host boot")) * time.Second,
					HA: rapid.IntRange(0, 2).Draw(t, "ha"), Budget: rapid.SampledFrom([]float64{-1, 0, 100}).Draw(t, "budget"),
					HAEvery: time.Duration(rapid.SampledFrom([]int{0, 7, 60}).Draw(t, "ha every")) * time.Second, Policy: m.name, Baselines: []string{}}
				if end := tr.End(); end > 2 && rapid.Bool().Draw(t, "warm-up") {
					o.Warmup = time.Duration(rapid.Int64Range(0, int64(end)-1).Draw(t, "warm-up ms")) * time.Millisecond
				} else if end == 0 {
					tr.Until = 1000
				}
				if until := rapid.Int64Range(0, int64(tr.End())).Draw(t, "until"); Time(until) > At(o.Warmup) && rapid.Bool().Draw(t, "cut") {
					tr.Until = Time(until)
				}
				ticks := time.Duration(0)
				o.Stopwatch = func() time.Duration { ticks += 700; return ticks }
				var out bytes.Buffer
				o.Transcript = &out
				r, err := Run(context.Background(), tr, o)
				if err != nil {
					t.Fatalf("%v\n%s", err, tail(out.String()))
				}
				found, err := Check(context.Background(), bytes.NewReader(out.Bytes()), "drawn")
				if err != nil {
					t.Fatalf("%v\n%s", err, tail(out.String()))
				}
				if r.Rejected < 0 || r.HostHoursRatio < 0 || r.HACoveredShare < 0 || r.HACoveredShare > 1 || found.Decisions != r.Decisions {
					t.Fatalf("%+v", r)
				}
			})
		})
	}
}

// A host that fails takes nothing along that the figures don't know of.
func TestAccountingSurvivesFailures(t *testing.T) {
	for _, m := range makers {
		t.Run(m.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				tr := &Trace{Name: "drawn", Requests: []Request{request("first", 0, -1, 1000, 1)}}
				tr.Requests = append(tr.Requests, anyTrace(t).Requests...)
				tr.Until = max(tr.End(), 1000)
				o := smallHosts()
				o.Policy, o.Baselines, o.Isolation = m.name, []string{}, rapid.SampledFrom([]string{IsolationProject, IsolationShared}).Draw(t, "isolation")
				first := "h-0001"
				at := rapid.Int64Range(1000, int64(max(2000, tr.End()))).Draw(t, "at")
				o.Fail = []Failure{{Host: first, At: Time(at)}}
				var out bytes.Buffer
				o.Transcript = &out
				if _, err := Run(context.Background(), tr, o); err != nil {
					if strings.Contains(err.Error(), "is not switched on") {
						t.Skip("its load is elsewhere by then")
					}
					t.Fatalf("%v\n%s", err, tail(out.String()))
				}
				if _, err := Check(context.Background(), bytes.NewReader(out.Bytes()), "drawn"); err != nil {
					t.Fatalf("%v\n%s", err, tail(out.String()))
				}
			})
		})
	}
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

// The checker finds what is wrong: any line of a transcript that matters can't be
// taken away or changed unnoticed.
func TestTheCheckerFindsForgeries(t *testing.T) {
	for _, name := range []string{"best-fit", "vm-per-container"} {
		tr := traceOf(request("a", 0, 300, 1500, 1), request("b", 10, 500, 2000, 2), request("c", 100, 900, 3000, 1), request("d", 200, -1, 500, 1))
		o := smallHosts()
		var out bytes.Buffer
		o.Policy, o.Baselines, o.Transcript = name, []string{}, &out
		if _, err := Run(context.Background(), tr, o); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		bad := func(what string, forged []string) {
			if _, err := Check(context.Background(), strings.NewReader(strings.Join(forged, "\n")), "t"); err == nil {
				t.Errorf("%s: %s went unnoticed", name, what)
			}
		}
		for i, l := range lines {
			if strings.Contains(l, `"action":"refuse"`) {
				continue // it changes no figure: who never started is rejected
			}
			bad("without "+l, append(append([]string{}, lines[:i]...), lines[i+1:]...))
			bad("twice "+l, append(append(append([]string{}, lines[:i+1]...), l), lines[i+1:]...))
			var v Line
			if err := json.Unmarshal([]byte(l), &v); err != nil {
				t.Fatal(err)
			}
			if v.What == "boot" {
				v.CPU *= 3
				forged, _ := json.Marshal(&v)
				bad("larger "+l, append(append(append([]string{}, lines[:i]...), string(forged)), lines[i+1:]...))
			}
		}
	}
}

func FuzzCheck(f *testing.F) {
	var out bytes.Buffer
	o := smallHosts()
	o.Policy, o.Baselines, o.Transcript = "vm-per-container", []string{}, &out
	if _, err := Run(context.Background(), traceOf(request("a", 0, 300, 1500, 1), request("b", 10, -1, 2000, 2)), o); err != nil {
		f.Fatal(err)
	}
	f.Add(out.Bytes())
	f.Fuzz(func(t *testing.T, in []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		Check(ctx, bytes.NewReader(in), "fuzz")
	})
}

// The same trace and options give the same transcript, byte for byte.
func TestTheSameTwice(t *testing.T) {
	for _, m := range makers {
		t.Run(m.name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				tr := anyTrace(t)
				tr.Until = max(tr.End(), 1000)
				var runs [2]string
				for i := range runs {
					var out bytes.Buffer
					o := smallHosts()
					o.Policy, o.Baselines, o.Transcript = m.name, []string{}, &out
					if _, err := Run(context.Background(), tr, o); err != nil {
						t.Fatal(err)
					}
					runs[i] = out.String()
				}
				if runs[0] != runs[1] {
					t.Fatal(firstDifference(runs[0], runs[1]))
				}
			})
		})
	}
}
