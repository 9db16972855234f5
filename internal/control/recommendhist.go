package control

import (
	"fmt"
	"math"
	"slices"
	"time"
)

// How what was seen is kept: in buckets each 5 % wider than the one before, so that a
// percentile is at most 5 % too high; what is a day old counts half.
const (
	histRatio    = 1.05
	histBuckets  = 420 // from histFirst to 7 x 10^8 times as much
	histHalfLife = 24 * time.Hour
	histRescale  = 64 // half-lives until weights are brought back to one
	peakDays     = 8  // days whose largest memory is remembered
	day          = 24 * time.Hour
)

// decaying is a histogram whose samples lose weight as they grow old.
type decaying struct {
	First   float64         `json:"first"` // upper end of bucket 0
	Ref     time.Time       `json:"ref"`   // when a sample weighs one
	Weights map[int]float64 `json:"weights"`
}

func newDecaying(first float64, now time.Time) decaying {
	return decaying{First: first, Ref: now, Weights: map[int]float64{}}
}

// add counts a value once.
func (d *decaying) add(now time.Time, v float64) {
	age := now.Sub(d.Ref).Hours() / histHalfLife.Hours()
	if math.Abs(age) > histRescale {
		for b, w := range d.Weights {
			if w *= math.Exp2(-age); w < 1e-6 || math.IsInf(w, 0) {
				delete(d.Weights, b)
			} else {
				d.Weights[b] = w
			}
		}
		d.Ref, age = now, 0
	}
	b := 0
	if v > d.First {
		b = min(histBuckets-1, int(math.Ceil(math.Log(v/d.First)/math.Log(histRatio)-1e-9)))
	}
	d.Weights[b] += math.Exp2(age)
}

// percentile is the least bound below which that part (0 to 1) of the weight lies; 0
// without samples.
func (d *decaying) percentile(p float64) float64 {
	total := 0.0
	var at []int
	for b, w := range d.Weights {
		at = append(at, b)
		total += w
	}
	slices.Sort(at)
	sum := 0.0
	for _, b := range at {
		if sum += d.Weights[b]; sum >= p*total*(1-1e-12) {
			return d.First * math.Pow(histRatio, float64(b))
		}
	}
	return 0
}

// check says what is wrong with a histogram that was read.
func (d *decaying) check(first float64) error {
	if d.First != first || len(d.Weights) > histBuckets {
		return fmt.Errorf("a histogram from %g in %d buckets", d.First, len(d.Weights))
	}
	if d.Weights == nil {
		d.Weights = map[int]float64{}
	}
	for b, w := range d.Weights {
		if b < 0 || b >= histBuckets || !(w >= 0) || math.IsInf(w, 0) {
			return fmt.Errorf("bucket %d weighs %g", b, w)
		}
	}
	return nil
}

// Where the buckets begin: a thousandth of a core, a mebibyte.
const (
	cpuFirst    = 1.0
	memoryFirst = 1 << 20
)

// usageHistory is what the containers of a service were seen to use, all together.
type usageHistory struct {
	Project string    `json:"project"`
	Service string    `json:"service"`
	Samples int64     `json:"samples"`
	Begin   time.Time `json:"begin"`
	Last    time.Time `json:"last"`
	CPU     decaying  `json:"cpu"`    // thousandths of a core
	Memory  decaying  `json:"memory"` // bytes
	Peaks   []peak    `json:"peaks"`  // the largest memory of each day, oldest first
}

type peak struct {
	Day   int64 `json:"day"` // since 1970
	Bytes int64 `json:"bytes"`
}

func newUsageHistory(project, service string, now time.Time) *usageHistory {
	return &usageHistory{Project: project, Service: service, Begin: now, Last: now, CPU: newDecaying(cpuFirst, now), Memory: newDecaying(memoryFirst, now)}
}

// add takes in what one container used.
func (h *usageHistory) add(now time.Time, milli float64, memory int64) {
	h.Samples++
	h.Last = now
	h.CPU.add(now, milli)
	h.Memory.add(now, float64(memory))
	today := now.Unix() / int64(day/time.Second)
	h.Peaks = slices.DeleteFunc(h.Peaks, func(p peak) bool { return p.Day <= today-peakDays || p.Day > today })
	if n := len(h.Peaks); n > 0 && h.Peaks[n-1].Day == today {
		h.Peaks[n-1].Bytes = max(h.Peaks[n-1].Bytes, memory)
	} else {
		h.Peaks = append(h.Peaks, peak{today, memory})
	}
}

// top is the most memory that was seen in the days that are remembered.
func (h *usageHistory) top() int64 {
	n := int64(0)
	for _, p := range h.Peaks {
		n = max(n, p.Bytes)
	}
	return n
}

func (h *usageHistory) check() error {
	if h == nil || h.Samples < 1 || h.Last.Before(h.Begin) || len(h.Peaks) > peakDays {
		return fmt.Errorf("a history that can't be")
	}
	for i, p := range h.Peaks {
		if p.Bytes < 0 || p.Bytes > 1<<60 || i > 0 && p.Day <= h.Peaks[i-1].Day {
			return fmt.Errorf("a peak of %d bytes on day %d", p.Bytes, p.Day)
		}
	}
	if err := h.CPU.check(cpuFirst); err != nil {
		return err
	}
	return h.Memory.check(memoryFirst)
}
