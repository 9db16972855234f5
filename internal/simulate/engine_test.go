package simulate

import (
	"bytes"
	"context"
	"math"
	"strings"
	"testing"
	"time"
)

const gib = 1 << 30

// script is a policy whose answers are written down: by the name of the event and
// of who it is about.
type script struct {
	answers map[string]func(w *World, e Event)
}

func (*script) Name() string { return "script" }

func (s *script) Handle(w *World, e Event) int {
	key := map[Kind]string{Arrived: "arrived", Left: "left", Booted: "booted", Grown: "grown", HostUp: "host-up", HostLost: "lost", Moved: "moved", Tick: "tick"}[e.Kind]
	if e.Container != nil {
		key += " " + e.Container.ID
	} else if e.Machine != nil {
		key += " " + e.Machine.ID
	}
	if f := s.answers[key]; f != nil {
		f(w, e)
	}
	if e.Kind == Arrived {
		return 1
	}
	return 0
}

// play runs a policy and has its transcript checked.
func play(t *testing.T, trace *Trace, o Options, p Policy) (Report, string, error) {
	t.Helper()
	var out bytes.Buffer
	if err := o.check(trace); err != nil {
		t.Fatal(err)
	}
	r, err := replay(context.Background(), trace, &o, p, newTranscript(&out))
	if err == nil {
		if _, err := Check(context.Background(), bytes.NewReader(out.Bytes()), "t"); err != nil {
			t.Errorf("the checker does not agree: %v\n%s", err, out.String())
		}
	}
	return r, out.String(), err
}

func request(id string, arrive, life float64, cpu int64, mem float64) Request {
	q := Request{ID: id, Arrive: seconds(arrive), Life: -1, Need: Size{cpu, int64(mem * gib)}, Class: ClassLatency}
	if life >= 0 {
		q.Life = seconds(life)
	}
	return q
}

func traceOf(q ...Request) *Trace { return &Trace{Name: "by hand", Requests: q} }

func smallHosts() Options {
	return Options{Hosts: []Pool{{Size: Size{4000, 8 * gib}}}, Overhead: Size{100, gib / 4}, Boot: 5 * time.Second, Grow: time.Second,
		BaselineBoot: time.Minute, HA: 1, Budget: 20}
}

func near(t *testing.T, what string, got, want float64) {
	t.Helper()
	if math.Abs(got-want) > 1e-6*max(1, math.Abs(want)) {
		t.Errorf("%s is %v, want %v", what, got, want)
	}
}

// Two VMs fit on a host of 4 CPU, the third needs another one; each boots for a
// minute, lives for an hour, and goes with its container.
func TestVMPerContainerByHand(t *testing.T) {
	trace := traceOf(request("a", 0, 3600, 1900, 1), request("b", 600, 3600, 1900, 1), request("c", 1200, 3600, 1900, 1), request("x", 1200, 60, 3950, 1))
	r, out, err := play(t, trace, smallHosts(), &single{})
	if err != nil {
		t.Fatal(err)
	}
	// The trace ends at 4800 s; a's VM stands 3660 s, b's until 4260 s, c's until
	// the end (its container would leave at 4860 s). x fits on no host beside its VM's overhead.
	near(t, "machine-hours", r.MachineHours, (3660+3660+3600)/3600.0)
	near(t, "host-hours", r.HostHours, (4260+3600)/3600.0)
	// 1.9, 3.8 of 3.9 CPU: one host; 5.7: two from 1200 to 3600 s, one to the end.
	near(t, "lower bound", r.LowerBound, (4800+2400)/3600.0)
	near(t, "ratio", r.HostHoursRatio, 7860/7200.0)
	near(t, "mean wait", r.WaitMean, 60)
	if r.PeakHosts != 2 || r.PeakMachines != 3 || r.Rejected != 1 || r.Decisions != 4 {
		t.Errorf("got %+v\n%s", r, out)
	}
	// Covered from 3660 s, when there is one VM on each of two hosts, to 4260 s,
	// when there is one host again: 600 of 4800 s.
	near(t, "covered share", r.HACoveredShare, 600/4800.0)
}

func TestGrowthMovesMigrationAndFailureByHand(t *testing.T) {
	trace := traceOf(request("a", 0, 1000, 1000, 1), request("b", 10, -1, 1000, 1), request("c", 20, 2000, 500, 1))
	o := smallHosts()
	o.MigrateRate = gib
	o.Fail = []Failure{{Host: "h-0002", At: seconds(500)}}
	var first, second *Machine
	s := &script{answers: map[string]func(*World, Event){
		"arrived a": func(w *World, e Event) {
			first = w.Boot(w.PowerOn(Size{}), "", false, Size{1100, 2 * gib})
			w.Place(e.Container, first)
		},
		"arrived b": func(w *World, e Event) { // grows: b starts a second later
			w.Resize(first, Size{2100, 3 * gib})
			w.Place(e.Container, first)
		},
		"arrived c": func(w *World, e Event) {
			second = w.Boot(w.PowerOn(Size{}), "", false, Size{600, 2 * gib})
			w.Place(e.Container, second)
			w.Wake(seconds(100))
		},
		"tick": func(w *World, e Event) {
			switch w.Now() {
			case seconds(100): // b goes where c is, after that machine has grown
				w.Resize(second, Size{2600, 4 * gib})
				w.Move(first.Containers[1], second)
				w.Wake(seconds(200))
			case seconds(200): // the rest goes as it is, after shrinking: 2 GiB in 2 s
				w.Resize(first, Size{1100, 2 * gib})
				w.Migrate(first, second.Host)
				w.Wake(seconds(300))
			case seconds(300):
				w.PowerOff(w.Hosts()[0])
			}
		},
		"lost": func(w *World, e Event) {
			m := w.Boot(w.PowerOn(Size{}), "", false, Size{4000, 8 * gib})
			for _, c := range e.Lost {
				w.Place(c, m)
			}
		},
	}}
	r, out, err := play(t, trace, o, s)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		`{"time":5,"action":"start","container":"a","machine":"m-1","host":"h-0001"}`,
		`{"time":11,"action":"start","container":"b","machine":"m-1","host":"h-0001"}`,
		`{"time":25,"action":"start","container":"c","machine":"m-2","host":"h-0002"}`,
		`{"time":100,"action":"move","container":"b","machine":"m-2","host":"h-0002","from":"m-1","cpu_milli":1000`,
		`{"time":101,"action":"moved","container":"b","machine":"m-2","host":"h-0002"}`,
		`{"time":202,"action":"migrated","machine":"m-1","host":"h-0002","from":"h-0001"}`,
		`{"time":500,"action":"host-fail","host":"h-0002"}`,
		`{"time":505,"action":"start","container":"a","machine":"m-3","host":"h-0001"}`,
		`{"time":1005,"action":"depart","container":"a"}`, // its life goes on
		`{"time":2020,"action":"end"`,
	} {
		if !strings.Contains(out, line) {
			t.Errorf("no %s in\n%s", line, out)
		}
	}
	near(t, "mean wait", r.WaitMean, (5+1+5)/3.0)
	near(t, "p99 wait", r.WaitP99, 5)
	near(t, "migrated", r.MachineMoveGiB, 2)
	near(t, "host-hours", r.HostHours, (300+(500-20)+(2020-500))/3600.0)
	near(t, "machine-hours", r.MachineHours, (500+(500-20)+(2020-500))/3600.0)
	if r.ContainerMoves != 1 || r.MachineMoves != 1 || r.PeakHosts != 2 || r.Rejected != 0 {
		t.Errorf("got %+v\n%s", r, out)
	}
}

func TestWarmupIsExcluded(t *testing.T) {
	trace := traceOf(request("a", 0, 7200, 1000, 1), request("b", 3600, 3600, 1000, 1))
	o := smallHosts()
	o.Warmup = time.Hour
	r, _, err := play(t, trace, o, &single{})
	if err != nil {
		t.Fatal(err)
	}
	near(t, "host-hours", r.HostHours, 1)
	near(t, "machine-hours", r.MachineHours, 2)
	near(t, "lower bound", r.LowerBound, 1)
	if r.Decisions != 1 || r.WaitMean != 60 {
		t.Errorf("got %+v", r)
	}
}

func TestUntilCutsTheTrace(t *testing.T) {
	trace := traceOf(request("a", 0, 7200, 1000, 1), request("b", 3601, 3600, 1000, 1))
	trace.Until = 3600 * 1000
	r, _, err := play(t, trace, smallHosts(), &single{})
	if err != nil {
		t.Fatal(err)
	}
	near(t, "machine-hours", r.MachineHours, 1)
	if r.Decisions != 1 || r.Rejected != 0 {
		t.Errorf("got %+v", r)
	}
}

func TestAPolicyThatBreaksARuleEndsTheRun(t *testing.T) {
	boot := func(w *World, cpu int64, group string) *Machine {
		return w.Boot(w.PowerOn(Size{}), group, false, Size{cpu, 2 * gib})
	}
	for _, x := range []struct {
		want string
		do   func(w *World, c *Container)
	}{
		{"has 4c,8g left", func(w *World, c *Container) { boot(w, 5000, "") }},
		{"less than its overhead", func(w *World, c *Container) { boot(w, 50, "") }},
		{"but machine m-1 has", func(w *World, c *Container) { w.Place(c, boot(w, 1000, "")) }},
		{"of project \"other\"", func(w *World, c *Container) { w.Place(c, boot(w, 2000, "other")) }},
		{"is placed or done already", func(w *World, c *Container) { m := boot(w, 4000, ""); w.Place(c, m); w.Place(c, m) }},
		{"but has containers", func(w *World, c *Container) { m := boot(w, 4000, ""); w.Place(c, m); w.Stop(m) }},
		{"but has machines", func(w *World, c *Container) { w.PowerOff(boot(w, 4000, "").Host) }},
		{"but uses", func(w *World, c *Container) {
			m := boot(w, 4000, "")
			w.Place(c, m)
			w.Resize(m, Size{200, 2 * gib})
		}},
		{"grows by", func(w *World, c *Container) { w.Resize(boot(w, 4000, ""), Size{4001, 2 * gib}) }},
		{"before it has started", func(w *World, c *Container) {
			m := boot(w, 2000, "")
			w.Place(c, m)
			w.Move(c, w.Boot(m.Host, "", false, Size{2000, 2 * gib}))
		}},
		{"is not up", func(w *World, c *Container) { w.Migrate(boot(w, 2000, ""), w.PowerOn(Size{})) }},
	} {
		s := &script{answers: map[string]func(*World, Event){"arrived a": func(w *World, e Event) { x.do(w, e.Container) }}}
		_, _, err := play(t, traceOf(request("a", 0, 10, 1000, 1)), smallHosts(), s)
		if err == nil || !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), "policy script broke a rule: at 0.000 s") {
			t.Errorf("want %q, got %v", x.want, err)
		}
	}
}

func TestPoolsEndAndContainersWait(t *testing.T) {
	o := smallHosts()
	o.Hosts = []Pool{{Size: Size{2000, 8 * gib}, Count: 1, ID: "small"}, {Size: Size{4000, 8 * gib}, Count: 1}}
	trace := traceOf(request("a", 0, 1000, 3500, 1), request("b", 10, 1000, 1500, 1), request("c", 20, 1000, 1500, 1), request("d", 30, -1, 3600, 1))
	r, out, err := play(t, trace, o, &single{})
	if err != nil {
		t.Fatal(err)
	}
	// c gets a's place at 1060 s and starts a minute later. The trace ends at 1020 s,
	// but who waits then is waited for: d gets c's place.
	if !strings.Contains(out, `{"time":1120,"action":"start","container":"c"`) || r.WaitP99 != 2150 || r.Rejected != 0 || r.PeakHosts != 2 {
		t.Errorf("got %+v\n%s", r, out)
	}
}

func TestRunRefusesWhatMakesNoSense(t *testing.T) {
	trace := traceOf(request("a", 0, 10, 1000, 1))
	for _, x := range []struct {
		want string
		edit func(o *Options)
	}{
		{"no hosts", func(o *Options) { o.Hosts = nil }},
		{"no room for a machine's overhead", func(o *Options) { o.Overhead = Size{4000, gib} }},
		{"isolation \"none\"", func(o *Options) { o.Isolation = "none" }},
		{"ha 3", func(o *Options) { o.HA = 3 }},
		{"within the warm-up", func(o *Options) { o.Warmup = time.Hour }},
		{"no policy \"nomad\"", func(o *Options) { o.Policy = "nomad" }},
		{"out of range", func(o *Options) { o.Boot = -1 }},
		{"not switched on", func(o *Options) { o.Fail = []Failure{{Host: "h-9", At: 1}} }},
	} {
		o := smallHosts()
		x.edit(&o)
		if _, err := Run(context.Background(), trace, o); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("want %q, got %v", x.want, err)
		}
	}
}
