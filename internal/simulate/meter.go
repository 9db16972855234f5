package simulate

import (
	"math"
	"slices"
	"time"
)

// meter accounts for the measured time: from the end of the warm-up to the end of
// the trace. What is counted per container counts those that arrived in it.
type meter struct {
	warmup, end Time
	every       Time // between two looks at the failover cover; 0: always
	last        Time

	hosts, machines         int
	hostTime, machineTime   Time
	peakHosts, peakMachines int
	moves, migrations       int
	migrated                int64 // bytes
	arrived                 int
	away                    int // lost with a host, and not running again
	waits                   []Time
	looks, covered          int64
	cover                   cover

	decisions int
	took      time.Duration
	durations []time.Duration

	bound         Time // lower bound of hostTime
	boundMachines Time // lower bound of machineTime
}

func (m *meter) measured(t Time) bool { return t >= m.warmup && t < m.end }

// advance accounts for the state that has held since the last call, until to.
func (m *meter) advance(w *World, to Time) {
	from := max(m.last, m.warmup)
	until := min(to, m.end)
	m.last = to
	if from >= until {
		return
	}
	d := until - from
	m.hostTime += Time(m.hosts) * d
	m.machineTime += Time(m.machines) * d
	m.peakHosts = max(m.peakHosts, m.hosts)
	m.peakMachines = max(m.peakMachines, m.machines)
	if n := m.looksIn(from, until); n > 0 {
		m.looks += n
		if m.cover.survives(w.hosts, w.Overhead) {
			m.covered += n
		}
	}
}

// looksIn is the weight of a state that holds in [from, until): its duration, or
// how many looks fall into it.
func (m *meter) looksIn(from, until Time) int64 {
	if m.every <= 0 {
		return int64(until - from)
	}
	return int64((until-m.warmup+m.every-1)/m.every - (from-m.warmup+m.every-1)/m.every)
}

func (m *meter) arrive(q *Request) {
	if q.Arrive >= m.warmup {
		m.arrived++
	}
}

func (m *meter) started(c *Container, now Time) {
	if c.Arrive >= m.warmup {
		m.waits = append(m.waits, now-c.Arrive)
	}
}

func (m *meter) down(c *Container, n int) {
	if c.Arrive >= m.warmup {
		m.away += n
	}
}

func (m *meter) move(now Time) {
	if m.measured(now) {
		m.moves++
	}
}

func (m *meter) migration(now Time, bytes int64) {
	if m.measured(now) {
		m.migrations++
		m.migrated += bytes
	}
}

// decided counts a call of the policy, and says whether it counts. All its time
// counts, also that of calls in which it was not asked for a place.
func (m *meter) decided(n int, took time.Duration) bool {
	if m.last < m.warmup || m.last >= m.end {
		return false
	}
	m.took += took
	if n > 0 {
		m.decisions += n
		m.durations = append(m.durations, took)
	}
	return n > 0 || took > 0
}

func (m *meter) report() Report {
	r := Report{
		HostHours:          tidy(m.hostTime.hours()),
		MachineHours:       tidy(m.machineTime.hours()),
		LowerBound:         tidy(m.bound.hours()),
		LowerBoundMachines: tidy(m.boundMachines.hours()),
		PeakHosts:          m.peakHosts,
		PeakMachines:       m.peakMachines,
		ContainerMoves:     m.moves,
		MachineMoves:       m.migrations,
		MachineMoveGiB:     tidy(float64(m.migrated) / (1 << 30)),
		Rejected:           m.arrived - len(m.waits) + m.away,
		HACoveredShare:     1,
		Decisions:          m.decisions,
		arrivals:           m.arrived,
		moves1000:          1000 * part(int64(m.moves), int64(m.arrived)),
		measuredSeconds:    (m.end - m.warmup).Seconds(),
	}
	if m.bound > 0 {
		r.HostHoursRatio = tidy(float64(m.hostTime) / float64(m.bound))
	}
	if m.looks > 0 {
		r.HACoveredShare = tidy(float64(m.covered) / float64(m.looks))
	}
	if m.took > 0 {
		r.DecisionsPerS = math.Round(float64(m.decisions)/m.took.Seconds()*10) / 10
	}
	waits(&r, m.waits)
	r.DecisionP99 = p99(m.durations)
	return r
}

// waits fills in what r says of waiting times; it sorts the list.
func waits(r *Report, list []Time) {
	slices.Sort(list)
	var sum Time
	for _, t := range list {
		sum += t
	}
	if n := len(list); n > 0 {
		r.WaitMean = tidy(sum.Seconds() / float64(n))
	}
	r.WaitP50, r.WaitP99 = rank(list, 0.5).Seconds(), rank(list, 0.99).Seconds()
}

// p99 is in microseconds; it sorts the list.
func p99(list []time.Duration) float64 {
	slices.Sort(list)
	return tidy(float64(rank(list, 0.99).Nanoseconds()) / 1000)
}

// rank is the nearest-rank quantile of a sorted list; 0 of an empty one.
func rank[T any](sorted []T, q float64) T {
	if len(sorted) == 0 {
		var zero T
		return zero
	}
	return sorted[min(len(sorted)-1, max(0, int(math.Ceil(q*float64(len(sorted))))-1))]
}

// tidy rounds to what is meant: six digits after the point.
func tidy(f float64) float64 { return math.Round(f*1e6) / 1e6 }
