package simulate

import (
	"context"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// doubter asks, after each answer of a policy, for the cover as the figures do,
// with the proofs that hosts have kept, and doubts each yes.
type doubter struct {
	Policy
	t     *rapid.T
	cover cover
	kept  int // proofs that held without a search
}

func (d *doubter) Handle(w *World, e Event) int {
	n := d.Policy.Handle(w, e)
	for _, h := range w.hosts {
		if h.proof.holds(h) {
			d.kept++
		}
	}
	d.cover.resizable = w.Resizable
	if d.cover.survives(w.hosts, w.Overhead) {
		for _, lost := range w.hosts {
			if !exhaustive(w.hosts, lost, w.Overhead) {
				d.t.Fatalf("at %g s the loss of %s can't be survived:\n%v", w.now.Seconds(), lost.ID, describe(w.hosts))
			}
		}
	}
	return n
}

// Times keeps the policy's own.
func (d *doubter) Times(o *Options) (time.Duration, bool) {
	if x, ok := d.Policy.(timed); ok {
		return x.Times(o)
	}
	return o.Boot, true
}

// Isolates keeps the policy's own.
func (d *doubter) Isolates(o *Options) string {
	if x, ok := d.Policy.(isolating); ok {
		return x.Isolates(o)
	}
	return o.Isolation
}

// A kept proof is as good as a new one: whatever happened since it was made, an
// exhaustive search agrees with it, at every event.
func TestKeptProofsAreProofs(t *testing.T) {
	kept := 0
	for _, name := range []string{"tandem", "best-fit", "vm-per-container"} {
		m, err := findMaker(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(name, func(t *testing.T) {
			rapid.Check(t, func(t *rapid.T) {
				tr := anyTrace(t)
				tr.Until = max(tr.End(), 1000)
				o := smallHosts()
				o.Isolation = rapid.SampledFrom([]string{IsolationProject, IsolationShared}).Draw(t, "isolation")
				o.Budget = rapid.SampledFrom([]float64{-1, 0, 500}).Draw(t, "budget")
				if err := o.check(tr); err != nil {
					t.Fatal(err)
				}
				d := &doubter{Policy: m.make(&o, tr), t: t}
				if _, err := replay(context.Background(), tr, &o, d, nil); err != nil {
					t.Fatal(err)
				}
				kept += d.kept
			})
		})
	}
	if kept == 0 {
		t.Error("no proof was ever kept")
	}
}

// Three projects of 2.0, 0.5 and 5.0 CPU on hosts of 4: 1 + 1 + 2 machines.
func TestLeastMachinesByHand(t *testing.T) {
	a, b, c := request("a", 0, 100, 2000, 1), request("b", 0, 50, 500, 1), request("c", 0, 100, 2500, 1)
	a.Project, b.Project, c.Project = "p", "q", "r"
	d := c
	d.ID = "d"
	tr := traceOf(a, b, c, d)
	pools := []Pool{{Size: Size{4000, 8 * gib}}}
	for isolation, want := range map[string]float64{IsolationProject: 4*50 + 3*50, IsolationShared: 2 * 100, IsolationOwn: 4*50 + 3*50} {
		near(t, isolation, lowerBoundMachines(tr, pools, Size{100, gib / 4}, isolation, 0, seconds(100)).Seconds(), want)
	}
}
