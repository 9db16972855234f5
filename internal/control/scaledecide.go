package control

import (
	"fmt"
	"math"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"
)

// What scaling goes by, as users of Kubernetes' autoscaler know it.
const (
	scaleTolerance  = 0.1             // of the target: nothing happens within it
	scaleDownWindow = 5 * time.Minute // fewer only if no more were wanted for so long
	scaleUpWindow   = 30 * time.Second
	scaleUpStep     = 4 // at most so many more at once, or twice as many
)

// scaleSample is what one container of a service does. Shares are of what it
// reserves; pressure is a percentage.
type scaleSample struct {
	ready         bool // runs, is healthy, and has been for long enough to be measured
	known         bool // it was measured
	cpu, memory   float64
	pressure      float64
	pressureKnown bool
}

// wanted is a number of replicas that was wanted some time ago.
type wanted struct {
	age      time.Duration
	replicas int
}

// scaleAnswer is how many replicas there shall be, and why.
type scaleAnswer struct {
	replicas int    // after all windows and bounds
	wanted   int    // by what is measured now: goes into the history
	reason   string // one sentence
	blocked  string // a target that can't be judged, and why; empty: all can
}

// decideScale says how many replicas a service shall have, from what its containers
// do now, how many it has and what was wanted lately (oldest first, the present not
// included). It keeps no state and knows no clock.
func decideScale(p *v1.ScalePolicy, current int, samples []scaleSample, history []wanted) scaleAnswer {
	lo, hi := int(p.GetMin()), int(p.GetMax())
	clamp := func(n int) int { return min(max(n, lo), hi) }
	if n := clamp(current); n != current {
		return scaleAnswer{replicas: n, wanted: n, reason: fmt.Sprintf("between %d and %d are allowed", lo, hi)}
	}
	targets := metrics(p)
	if len(targets) == 0 {
		return scaleAnswer{replicas: current, wanted: current, reason: "no target is named"}
	}
	a := scaleAnswer{wanted: -1}
	var words, unknown []string
	for _, m := range targets {
		n, text, ok := m.judge(current, samples)
		if !ok {
			unknown = append(unknown, text)
			continue
		}
		words = append(words, text)
		a.wanted = max(a.wanted, n)
	}
	if len(unknown) > 0 {
		a.blocked = strings.Join(unknown, "; ")
		if a.wanted < current {
			a.wanted = current // what is not known may be the reason for those that there are
		}
		words = append(words, unknown...)
	}
	said := strings.Join(words, ", ")
	a.wanted = clamp(a.wanted)
	a.replicas = stabilise(a.wanted, current, history)
	if most := max(2*current, current+scaleUpStep); a.replicas > most {
		a.replicas = most
	}
	switch {
	case a.replicas > current:
		a.reason = fmt.Sprintf("%s: %d instead of %d", said, a.replicas, current)
	case a.replicas < current:
		a.reason = fmt.Sprintf("%s: for %s no more than %d were wanted", said, minutes(scaleDownWindow), a.replicas)
	case a.wanted > current:
		a.reason = fmt.Sprintf("%s: %d are wanted if it lasts for %s", said, a.wanted, minutes(scaleUpWindow))
	case a.wanted < current:
		a.reason = fmt.Sprintf("%s: %d would do; fewer come if that lasts for %s", said, a.wanted, minutes(scaleDownWindow))
	case current == hi && len(words) > 0:
		a.reason = fmt.Sprintf("%s: no more than %d are allowed", said, hi)
	default:
		a.reason = said
	}
	return a
}

func minutes(d time.Duration) string {
	if d >= time.Minute {
		return fmt.Sprintf("%g min", d.Minutes())
	}
	return fmt.Sprintf("%g s", d.Seconds())
}

// stabilise is the most that was wanted within the window for fewer, and the least
// within the window for more: peaks are not followed down, nor short ones up.
func stabilise(now, current int, history []wanted) int {
	up, down := now, now
	for _, w := range history {
		if w.age < scaleUpWindow {
			up = min(up, w.replicas)
		}
		if w.age < scaleDownWindow {
			down = max(down, w.replicas)
		}
	}
	switch {
	case up > current:
		return up
	case down < current:
		return down
	}
	return current
}

// metric is one target of a policy.
type metric struct {
	name   string
	target float64
	value  func(scaleSample) (float64, bool)
	text   func(float64) string
}

func metrics(p *v1.ScalePolicy) []metric {
	var out []metric
	percent := func(f float64) string { return fmt.Sprintf("%.0f %%", 100*f) }
	if t := p.GetCpuTarget(); t > 0 {
		out = append(out, metric{"cpu", t, func(s scaleSample) (float64, bool) { return s.cpu, s.known }, percent})
	}
	if t := p.GetMemoryTarget(); t > 0 {
		out = append(out, metric{"memory", t, func(s scaleSample) (float64, bool) { return s.memory, s.known }, percent})
	}
	if t := p.GetPressureTarget(); t > 0 {
		out = append(out, metric{"pressure", t, func(s scaleSample) (float64, bool) { return s.pressure, s.known && s.pressureKnown },
			func(f float64) string { return fmt.Sprintf("%.3g %%", f) }})
	}
	return out
}

// judge says how many replicas would bring the average to the target. Containers that
// are not ready don't count, but as idle ones when more are wanted: they are about to
// help. Those that should have been measured and were not count as idle when more are
// wanted, as at the target when fewer are; and if that turns the answer round, nothing
// is wanted.
func (m metric) judge(current int, samples []scaleSample) (n int, text string, ok bool) {
	sum, measured, missing, unready, silent := 0.0, 0, 0, 0, 0
	for _, s := range samples {
		v, known := m.value(s)
		switch {
		case !s.ready:
			unready++
		case !known || math.IsNaN(v) || math.IsInf(v, 0) || v < 0:
			missing++
			if s.known {
				silent++
			}
		default:
			sum += v
			measured++
		}
	}
	if measured == 0 {
		switch {
		case silent > 0:
			return 0, m.name + " is not told by the kernel that its containers run on: use another target, or machines instead of metal", false
		case missing > 0:
			return 0, m.name + " was not measured", false
		}
		return current, m.name + " is not measured yet: no container is ready", true
	}
	average := sum / float64(measured)
	text = fmt.Sprintf("%s %s, target %s", m.name, m.text(average), m.text(m.target))
	ratio := average / m.target
	if ratio == 1 || math.Abs(ratio-1) <= scaleTolerance {
		return current, text, true
	}
	total := float64(measured)
	if ratio > 1 {
		total += float64(missing + unready)
	} else {
		sum += m.target * float64(missing)
		total += float64(missing)
	}
	if missing+unready > 0 {
		again := sum / total / m.target
		if math.Abs(again-1) <= scaleTolerance || (again > 1) != (ratio > 1) {
			return current, text, true
		}
		ratio = again
	}
	n = int(math.Ceil(math.Min(ratio*total-1e-9, 1e6)))
	if ratio > 1 {
		n = max(n, current)
	} else {
		n = min(n, current)
	}
	return n, text, true
}
