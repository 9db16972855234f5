package simulate

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Failure is a host that fails at a time.
type Failure struct {
	Host string
	At   Time
}

// Options are how to replay a trace. Zero values are the defaults named.
type Options struct {
	Hosts     []Pool
	Overhead  Size   // of each machine: guest kernel, agent and VMM together
	Isolation string // IsolationProject (default), IsolationShared, IsolationOwn
	HA        int    // host losses that the main policy guarantees to survive: 0, 1 or 2
	// Boot and Grow are what a machine needs until a container can start in it;
	// BaselineBoot is Boot for the baselines. HostBoot is a host's.
	Boot, Grow, BaselineBoot, HostBoot time.Duration
	// MigrateRate is memory copied in a live migration, in bytes a second;
	// default 1 GiB.
	MigrateRate int64
	// Budget is how many containers the main policy may move for each 1000
	// arrivals; negative: no limit.
	Budget float64
	// Warmup is excluded from all figures.
	Warmup time.Duration
	// HAEvery is the time between two looks at the failover cover. Default: every
	// instant counts, each state for as long as it holds.
	HAEvery time.Duration
	Fail    []Failure

	// Policy is the main one, Baselines those to compare with; see Policies.
	// Empty: tandem; all baselines.
	Policy    string
	Baselines []string

	// Transcript gets the main policy's lines.
	Transcript io.Writer
	// Stopwatch measures decisions: time since some beginning. Nil: none is taken.
	Stopwatch func() time.Duration
	// Progress is called now and then.
	Progress func(policy string, at, end Time, hosts, machines int)
}

// maker makes a policy for a run.
type maker struct {
	name, what string
	make       func(o *Options, t *Trace) Policy
}

// Policies lists the names of all policies with a line about each; the first is
// Tandem's own, the others are the baselines.
func Policies() [][2]string {
	var list [][2]string
	for _, m := range makers {
		list = append(list, [2]string{m.name, m.what})
	}
	return list
}

func findMaker(name string) (maker, error) {
	var names []string
	for _, m := range makers {
		if m.name == name {
			return m, nil
		}
		names = append(names, m.name)
	}
	return maker{}, fmt.Errorf("no policy %q: there are %s: %w", clip(name), strings.Join(names, ", "), errdefs.ErrInvalidArgument)
}

func (o *Options) check(t *Trace) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf(format+": %w", append(a, errdefs.ErrInvalidArgument)...)
	}
	if len(o.Hosts) == 0 {
		return bad("no hosts are given")
	}
	largest := Size{}
	for _, p := range o.Hosts {
		if p.Size.CPU <= 0 || p.Size.Memory <= 0 || p.Size.CPU > maxCPU || p.Size.Memory > maxMemory {
			return bad("a host of %s is out of range", p.Size)
		}
		largest = largest.max(p.Size.sub(o.Overhead))
	}
	if o.Overhead.CPU < 0 || o.Overhead.Memory < 0 || largest.CPU <= 0 || largest.Memory <= 0 {
		return bad("hosts have no room for a machine's overhead of %s and a container: give larger hosts or a smaller overhead", o.Overhead)
	}
	switch o.Isolation {
	case "":
		o.Isolation = IsolationProject
	case IsolationProject, IsolationShared, IsolationOwn:
	default:
		return bad("isolation %q is not one of project, shared, own", clip(o.Isolation))
	}
	for _, d := range []time.Duration{o.Boot, o.Grow, o.BaselineBoot, o.HostBoot, o.Warmup, o.HAEvery} {
		if d < 0 || d > 1000*time.Hour {
			return bad("a time of %s is out of range", d)
		}
	}
	if o.HA < 0 || o.HA > 2 {
		return bad("ha %d: 0, 1 or 2 host losses can be guaranteed", o.HA)
	}
	if o.MigrateRate <= 0 {
		o.MigrateRate = 1 << 30
	}
	if end := t.End(); At(o.Warmup) >= end {
		return bad("the trace ends after %.0f s, within the warm-up of %.0f s", end.Seconds(), o.Warmup.Seconds())
	}
	for _, f := range o.Fail {
		if f.Host == "" || f.At < 0 || f.At > maxTime {
			return bad("failure of host %q at %g s is out of range", clip(f.Host), f.At.Seconds())
		}
	}
	return nil
}

// Run replays the trace with the main policy and the baselines.
func Run(ctx context.Context, t *Trace, o Options) (*Report, error) {
	if err := o.check(t); err != nil {
		return nil, err
	}
	if o.Policy == "" {
		o.Policy = makers[0].name
	}
	if o.Baselines == nil {
		for _, m := range makers[1:] {
			o.Baselines = append(o.Baselines, m.name)
		}
	}
	main, err := findMaker(o.Policy)
	if err != nil {
		return nil, err
	}
	var others []maker
	for _, n := range o.Baselines {
		m, err := findMaker(n)
		if err != nil {
			return nil, err
		}
		if n != main.name && !slices.ContainsFunc(others, func(o maker) bool { return o.name == n }) {
			others = append(others, m)
		}
	}
	r, err := replay(ctx, t, &o, main.make(&o, t), newTranscript(o.Transcript))
	if err != nil {
		return nil, err
	}
	r.name = main.name
	for _, m := range others {
		b, err := replay(ctx, t, &o, m.make(&o, t), nil)
		if err != nil {
			return nil, err
		}
		if r.Baselines == nil {
			r.Baselines = map[string]*Report{}
		}
		b.name = m.name
		r.Baselines[m.name] = &b
	}
	return &r, nil
}

// timed is a policy with times of its own.
type timed interface {
	// Times are how long machines take to boot, and whether they can grow.
	Times(o *Options) (boot time.Duration, resizable bool)
}

// isolating is a policy that can't share machines as the options say.
type isolating interface{ Isolates(o *Options) string }

func newWorld(o *Options, t *Trace, p Policy, log *transcript) *World {
	boot, resizable := o.Boot, true
	if x, ok := p.(timed); ok {
		boot, resizable = x.Times(o)
	}
	end := t.End()
	w := &World{Overhead: o.Overhead, Isolation: o.Isolation, Resizable: resizable, boot: At(boot), grow: At(o.Grow), hostBoot: At(o.HostBoot),
		migrateRate: o.MigrateRate, log: log, wake: -1}
	if x, ok := p.(isolating); ok {
		w.Isolation = x.Isolates(o)
	}
	run := &RunLine{Trace: t.Name, Policy: p.Name(), Isolation: w.Isolation, Resizable: resizable, OverheadCPU: o.Overhead.CPU, OverheadBytes: o.Overhead.Memory,
		BootS: w.boot.Seconds(), GrowS: w.grow.Seconds(), HostBootS: w.hostBoot.Seconds(), WarmupS: o.Warmup.Seconds(), EndS: end.Seconds(), HAEveryS: o.HAEvery.Seconds()}
	for _, h := range o.Hosts {
		w.pools = append(w.pools, poolState{Pool: h, next: 1})
		run.Hosts = append(run.Hosts, HostLine{ID: h.ID, CPU: h.Size.CPU, Memory: h.Size.Memory, Count: h.Count})
	}
	w.meter = &meter{warmup: At(o.Warmup), end: end, every: At(o.HAEvery), cover: cover{resizable: resizable}}
	w.meter.bound = lowerBound(t, o.Hosts, o.Overhead, w.meter.warmup, end)
	w.meter.boundMachines = lowerBoundMachines(t, o.Hosts, o.Overhead, w.Isolation, w.meter.warmup, end)
	if log != nil {
		log.now = w.Now
		log.line(Line{What: "run", Run: run})
	}
	return w
}
