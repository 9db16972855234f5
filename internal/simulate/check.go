package simulate

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/containerd/errdefs"
)

// maxTranscriptLine bounds a line of a transcript: the first one lists the hosts.
const maxTranscriptLine = 64 << 20

// Check reads a transcript, plain or gzip, with none of the simulator's state:
// every rule is checked again, every figure computed anew, and compared with the
// ones the transcript ends with. The error names the line.
func Check(ctx context.Context, r io.Reader, name string) (*Report, error) {
	k := &checker{hosts: map[string]*Host{}, machines: map[string]*Machine{}, containers: map[string]*Container{}}
	in := bufio.NewReaderSize(r, 1<<20)
	if magic, _ := in.Peek(2); len(magic) == 2 && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(in)
		if err != nil {
			return nil, fmt.Errorf("%s: gzip: %v: %w", name, err, errdefs.ErrInvalidArgument)
		}
		in = bufio.NewReaderSize(z, 1<<20)
	}
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 1<<20), maxTranscriptLine)
	for n := 1; lines.Scan(); n++ {
		if n&4095 == 0 && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var l Line
		err := json.Unmarshal(lines.Bytes(), &l)
		if err == nil {
			err = k.line(&l)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: line %d: %v: %w", name, n, err, errdefs.ErrInvalidArgument)
		}
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, fmt.Errorf("%s: a line is longer than %d bytes: %w", name, maxTranscriptLine, errdefs.ErrInvalidArgument)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case k.run == nil:
		return nil, fmt.Errorf("%s: no transcript: it does not begin with a line \"run\": %w", name, errdefs.ErrInvalidArgument)
	case k.result == nil:
		return nil, fmt.Errorf("%s: the transcript is cut off: it has no line \"end\": %w", name, errdefs.ErrInvalidArgument)
	}
	return k.result, nil
}

// checker rebuilds the world from lines.
type checker struct {
	run         *RunLine
	overhead    Size
	warmup, end Time
	now         Time
	pools       []Pool

	hosts      map[string]*Host
	order      []*Host // as they were switched on
	machines   map[string]*Machine
	containers map[string]*Container
	seq        int
	trace      Trace

	sums   sums
	cover  cover
	result *Report
}

// sums is what the figures are made of.
type sums struct {
	hostMS, machineMS       float64
	peakHosts, peakMachines int
	looks, covered          float64
	moves, migrations       int
	bytes                   int64
	arrivals                int
	waits                   []Time
	decisions               int
	micros                  float64
	calls                   []float64
}

func (k *checker) line(l *Line) error {
	at := Time(math.Round(l.T * 1000))
	switch {
	case k.result != nil:
		return errors.New("something follows the line \"end\"")
	case k.run == nil:
		return k.begin(l)
	case math.IsNaN(l.T) || at < k.now || at > maxTime:
		return fmt.Errorf("time %g s comes after %g s", l.T, k.now.Seconds())
	}
	if at > k.now {
		k.pass(at)
	}
	switch l.What {
	case "arrive", "place", "start", "depart", "refuse", "move", "moved", "move-failed", "lost", "evict":
		return k.containerLine(l)
	case "host-on", "host-up", "host-off", "host-fail":
		return k.hostLine(l)
	case "boot", "booted", "grow", "grown", "shrink", "stop", "migrate", "migrated", "migration-failed":
		return k.machineLine(l)
	case "decided":
		if l.Containers < 0 || !(l.Micros >= 0) || !(l.Other >= 0) {
			return errors.New("a negative decision")
		}
		k.sums.decisions += l.Containers
		k.sums.micros += l.Micros + l.Other
		if l.Containers > 0 {
			k.sums.calls = append(k.sums.calls, l.Micros)
		}
	case "end":
		return k.finish(l)
	default:
		return fmt.Errorf("%q is not known", clip(l.What))
	}
	return nil
}

func (k *checker) begin(l *Line) error {
	r := l.Run
	if l.What != "run" || r == nil {
		return errors.New("the first line is not \"run\"")
	}
	for _, s := range []float64{r.BootS, r.GrowS, r.HostBootS, r.WarmupS, r.EndS, r.HAEveryS} {
		if !(s >= 0 && s <= maxTime.Seconds()) {
			return fmt.Errorf("a time of %g s is out of range", s)
		}
	}
	if r.OverheadCPU < 0 || r.OverheadBytes < 0 || r.OverheadCPU > maxCPU || r.OverheadBytes > maxMemory || len(r.Hosts) == 0 {
		return errors.New("overhead or hosts are out of range")
	}
	for _, h := range r.Hosts {
		p := Pool{Size: Size{h.CPU, h.Memory}, Count: h.Count, ID: h.ID}
		if p.Size.CPU <= 0 || p.Size.Memory <= 0 || p.Size.CPU > maxCPU || p.Size.Memory > maxMemory || p.Count < 0 {
			return fmt.Errorf("a host of %s is out of range", p.Size)
		}
		k.pools = append(k.pools, p)
	}
	k.run, k.overhead = r, Size{r.OverheadCPU, r.OverheadBytes}
	k.warmup, k.end = seconds(r.WarmupS), seconds(r.EndS)
	k.cover.resizable = r.Resizable
	return nil
}

// pass accounts for the state that has held until at.
func (k *checker) pass(at Time) {
	s := &k.sums
	from, to := max(k.now, k.warmup), min(at, k.end)
	k.now = at
	if from >= to {
		return
	}
	s.hostMS += float64(len(k.order)) * float64(to-from)
	s.machineMS += float64(len(k.machines)) * float64(to-from)
	s.peakHosts = max(s.peakHosts, len(k.order))
	s.peakMachines = max(s.peakMachines, len(k.machines))
	every := seconds(k.run.HAEveryS)
	weight := 0.0
	if every == 0 {
		weight = float64(to - from)
	} else {
		weight = float64((to-k.warmup+every-1)/every - (from-k.warmup+every-1)/every)
	}
	if weight == 0 {
		return
	}
	s.looks += weight
	for i, h := range k.order {
		h.pos = i
	}
	if k.cover.survives(k.order, k.overhead) {
		s.covered += weight
	}
}

func (k *checker) measured() bool { return k.now >= k.warmup && k.now < k.end }

// finish computes the figures and compares them.
func (k *checker) finish(l *Line) error {
	k.pass(max(k.now, k.end) + 1)
	s := &k.sums
	s.micros += max(0, l.Other)
	r := &Report{
		HostHours: tidy(s.hostMS / 3.6e6), MachineHours: tidy(s.machineMS / 3.6e6), PeakHosts: s.peakHosts, PeakMachines: s.peakMachines,
		ContainerMoves: s.moves, MachineMoves: s.migrations, MachineMoveGiB: tidy(float64(s.bytes) / (1 << 30)), HACoveredShare: 1, Decisions: s.decisions,
		name: k.run.Policy, arrivals: s.arrivals, moves1000: 1000 * part(int64(s.moves), int64(s.arrivals)), measuredSeconds: (k.end - k.warmup).Seconds(),
	}
	if s.looks > 0 {
		r.HACoveredShare = tidy(s.covered / s.looks)
	}
	bound := lowerBound(&k.trace, k.pools, k.overhead, k.warmup, k.end)
	r.LowerBound = tidy(bound.hours())
	r.LowerBoundMachines = tidy(lowerBoundMachines(&k.trace, k.pools, k.overhead, k.run.Isolation, k.warmup, k.end).hours())
	if bound > 0 {
		r.HostHoursRatio = tidy(s.hostMS / float64(bound))
	}
	r.Rejected = s.arrivals - len(s.waits)
	for _, c := range k.containers {
		if c.down && c.Arrive >= k.warmup {
			r.Rejected++
		}
	}
	waits(r, s.waits)
	if s.micros > 0 {
		r.DecisionsPerS = math.Round(float64(s.decisions)/s.micros*1e7) / 10
	}
	var calls []time.Duration
	for _, us := range s.calls {
		calls = append(calls, time.Duration(math.Round(us*1000)))
	}
	r.DecisionP99 = p99(calls)
	k.result = r
	if l.Report == nil {
		return errors.New("the line \"end\" has no figures")
	}
	return compareReports(l.Report, r)
}

// compareReports finds the first figure that differs.
func compareReports(said, found *Report) error {
	a, err := json.Marshal(said)
	if err != nil {
		return err
	}
	b, err := json.Marshal(found)
	if err != nil {
		return err
	}
	var x, y map[string]any
	if err := errors.Join(json.Unmarshal(a, &x), json.Unmarshal(b, &y)); err != nil {
		return err
	}
	for name, v := range y {
		f, ok := v.(float64)
		if !ok {
			continue
		}
		if g, _ := x[name].(float64); math.Abs(f-g) > 1e-3*max(1, math.Abs(f))*tolerance(name) {
			return fmt.Errorf("%s is %v by the transcript's lines, but it says %v", name, f, g)
		}
	}
	return nil
}

// tolerance is for what is rounded on the way; all else is exact.
func tolerance(name string) float64 {
	if name == "decisions_per_s" || name == "decision_p99_us" {
		return 1
	}
	return 1e-2
}
