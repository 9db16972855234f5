package control

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/clock"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"

	"connectrpc.com/connect"
)

// world is the controllers and some hosts on a clock that moves when told: one
// step after the other, in one goroutine, so that a run is the same each time. It
// writes down what was decided, told to hosts, and seen.
type world struct {
	t     *testing.T
	ctx   context.Context
	clock *clock.Fake
	begin time.Time
	st    *store.Store
	ctl   *Controller
	lives byte
	hosts map[string]*simHost
	seen  map[string]string // what was last seen of a record
	out   strings.Builder
	// killed is asked after each run of a controller: does the server die here?
	killed func() bool
}

// simHost is a host and, while it is connected, its session.
type simHost struct {
	*fakehost.Host
	s       *session
	version uint64
	fresh   bool // it has told nothing in this session
	intent  map[string]string
}

// direct calls a host without any connection.
type direct struct {
	tandemv1connect.AgentServiceClient
	h *fakehost.Host
}

func (d direct) Hello(ctx context.Context, r *connect.Request[v1.AgentHelloRequest]) (*connect.Response[v1.AgentHelloResponse], error) {
	return d.h.Hello(ctx, r)
}

func (d direct) Apply(ctx context.Context, r *connect.Request[v1.ApplyHostRequest]) (*connect.Response[v1.ApplyHostResponse], error) {
	return d.h.Apply(ctx, r)
}

func (d direct) Stats(ctx context.Context, r *connect.Request[v1.AgentStatsRequest]) (*connect.Response[v1.AgentStatsResponse], error) {
	return d.h.Stats(ctx, r)
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, ctx: t.Context(), begin: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), hosts: map[string]*simHost{}, seen: map[string]string{}}
	w.clock = clock.NewFake(w.begin)
	st, err := store.Open(w.ctx, store.Options{Dir: t.TempDir()})
	must(t, err)
	t.Cleanup(func() { st.Close() })
	w.st = st
	w.serve()
	return w
}

// serve starts the controllers on the store as it is; hosts connect anew.
func (w *world) serve() {
	for _, h := range w.hosts {
		h.s = nil
	}
	w.lives++
	c, err := New(Options{Store: w.st, Clock: w.clock, Rand: rand.NewChaCha8([32]byte{w.lives}), Logger: slog.New(decisions{w})})
	must(w.t, err)
	must(w.t, c.forgetConnections(w.ctx))
	w.ctl = c
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// line writes one line: when, who, what becomes of whom, and why.
func (w *world) line(who, what, why string) {
	if why != "" {
		what += ": " + why
	}
	fmt.Fprintf(&w.out, "%9.3f  %-8s  %s\n", w.clock.Now().Sub(w.begin).Seconds(), who, what)
}

// decisions is a log handler that writes down what controllers tell.
type decisions struct{ w *world }

func (decisions) Enabled(context.Context, slog.Level) bool { return true }
func (d decisions) WithAttrs([]slog.Attr) slog.Handler     { return d }
func (d decisions) WithGroup(string) slog.Handler          { return d }
func (d decisions) Handle(_ context.Context, r slog.Record) error {
	attrs := map[string]string{}
	r.Attrs(func(a slog.Attr) bool { attrs[a.Key] = a.Value.String(); return true })
	if by, ok := attrs["by"]; ok {
		d.w.line(by, attrs["whom"]+" "+r.Message, attrs["why"])
	} else if r.Level >= slog.LevelWarn {
		d.w.line("warning", r.Message, fmt.Sprint(attrs))
	}
	return nil
}

// settle lets everybody take steps until nobody has anything to do, and says after
// how long somebody will (0: never).
func (w *world) settle() time.Duration {
	w.t.Helper()
life:
	for range 1000 {
		before, next := w.st.Revision(), time.Duration(0)
		later := func(d time.Duration) {
			if d > 0 && (next == 0 || d < next) {
				next = d
			}
		}
		for _, l := range w.ctl.loops() {
			d, err := l.run(w.ctx)
			if err != nil {
				w.t.Fatalf("%s: %v\n%s", l.name, err, w.out.String())
			}
			later(d)
			w.look()
			if w.killed != nil && w.killed() {
				w.serve()
				for _, name := range slices.Sorted(maps.Keys(w.hosts)) {
					w.connect(name)
				}
				continue life
			}
		}
		busy := false
		for _, name := range slices.Sorted(maps.Keys(w.hosts)) {
			h := w.hosts[name]
			if h.s != nil {
				later(h.s.offer(w.ctx))
				w.compare(name, h)
			}
			later(h.Tick())
			if h.s == nil {
				continue
			}
			st, version := h.News(h.version, h.fresh)
			h.version, h.fresh = version, false
			if st != nil {
				busy = true
				h.s.take(st)
				if p := h.s.news(); p != nil {
					must(w.t, h.s.store(w.ctx, p))
				}
			}
			w.look()
		}
		if !busy && w.st.Revision() == before {
			return next
		}
	}
	w.t.Fatalf("it never settles:\n%s", w.out.String())
	return 0
}

// pass lets d go by.
func (w *world) pass(d time.Duration) {
	for {
		next := w.settle()
		if next == 0 || next > d {
			w.clock.Advance(d)
			w.settle()
			return
		}
		w.clock.Advance(next)
		d -= next
	}
}

func (w *world) connect(name string) {
	h := w.hosts[name]
	s, f, err := w.ctl.greet(w.ctx, func() {}, h.ID(), direct{h: h.Host})
	must(w.t, err)
	close(s.done)
	w.ctl.Hosts.enter(s)
	must(w.t, w.ctl.saveFacts(w.ctx, f))
	h.s, h.fresh = s, true
}

func (w *world) disconnect(name string) {
	h := w.hosts[name]
	w.ctl.Hosts.leave(h.s)
	h.s = nil
}

// look writes down what is new in the records of what was seen.
func (w *world) look() {
	snap := w.st.Snapshot()
	now := map[string]string{}
	var order []string
	note := func(key, what string) {
		now[key] = what
		order = append(order, key)
	}
	for _, h := range snap.Hosts {
		note("host "+h.Meta.Name, map[bool]string{true: "is connected", false: "is not connected"}[h.Connected])
	}
	for _, m := range snap.Machines {
		note("machine "+m.Meta.Name, "is "+machineWords(m.GetStatus()))
	}
	for _, x := range snap.Containers {
		note("container "+x.Meta.Name, "is "+containerWords(x.GetStatus()))
	}
	for _, v := range snap.Volumes {
		note("volume "+v.Meta.Name, map[bool]string{true: "is ready", false: "is not there yet"}[v.GetStatus().GetReady()])
	}
	for _, k := range order {
		if old, known := w.seen[k]; known && old != now[k] || !known && strings.HasPrefix(k, "host") {
			_, name, _ := strings.Cut(k, " ")
			w.line("seen", name+" "+now[k], "")
		}
	}
	w.seen = now
}

func machineWords(st *v1.MachineStatus) string {
	s := strings.ToLower(strings.TrimPrefix(st.GetState().String(), "MACHINE_STATE_"))
	if st.GetSize() != nil {
		s += " with " + text(st.Size)
	}
	if st.GetRestarts() > 0 {
		s += fmt.Sprintf(", restarts %d", st.Restarts)
	}
	if st.GetMessage() != "" {
		s += ": " + st.Message
	}
	return s
}

func containerWords(st *v1.ContainerStatus) string {
	s := strings.ToLower(strings.TrimPrefix(st.GetState().String(), "CONTAINER_STATE_"))
	if h := st.GetHealth(); h != v1.Health_HEALTH_UNSPECIFIED {
		s += ", " + strings.ToLower(strings.TrimPrefix(h.String(), "HEALTH_"))
	}
	if st.GetState() == v1.ContainerState_CONTAINER_STATE_EXITED || st.GetState() == v1.ContainerState_CONTAINER_STATE_RESTARTING {
		s += fmt.Sprintf(", exit code %d", st.ExitCode)
	}
	if st.GetRestartCount() > 0 {
		s += fmt.Sprintf(", restarts %d", st.RestartCount)
	}
	if m := st.GetMessage(); m != "" && !strings.HasPrefix(m, "no place") {
		s += ": " + m
	}
	return s
}

// compare writes down how a host's intent differs from the one before.
func (w *world) compare(name string, h *simHost) {
	now := w.describe(h.Spec())
	for _, k := range slices.Sorted(maps.Keys(now)) {
		switch old, there := h.intent[k]; {
		case !there:
			w.line("to "+name, "+ "+k, now[k])
		case old != now[k]:
			w.line("to "+name, "~ "+k, now[k])
		}
	}
	for _, k := range slices.Sorted(maps.Keys(h.intent)) {
		if _, there := now[k]; !there {
			w.line("to "+name, "- "+k, "")
		}
	}
	h.intent = now
}

// describe says in words what an intent asks for, thing by thing.
func (w *world) describe(spec *v1.HostSpec) map[string]string {
	out := map[string]string{}
	snap := w.st.Snapshot()
	names := map[string]string{}
	for _, m := range spec.GetMachines() {
		names[m.Id] = m.Name
		out["machine "+m.Name] = text(m.Size)
	}
	waits := map[string]string{}
	for _, x := range snap.Containers {
		names[x.Meta.Id] = x.Meta.Name
		waits[x.Meta.Id] = w.ctl.WaitsFor(x, snap)
	}
	for _, x := range spec.GetContainers() {
		s := x.Spec.Image + " in " + names[x.MachineId]
		if x.MachineId == "" {
			s = x.Spec.Image + " on the host"
		}
		switch {
		case x.Hold && waits[x.Id] == "":
			s += ", held, waits for its turn"
		case x.Hold:
			s += ", held, waits for " + waits[x.Id]
		}
		if x.Stopped {
			s += ", stopped"
		}
		if x.StopTimeout != nil {
			s += ", has " + x.StopTimeout.AsDuration().String() + " to end"
		}
		out["container "+names[x.Id]] = s
	}
	for _, x := range spec.GetLeaving() {
		out["leaving "+names[x.Id]] = x.StopTimeout.AsDuration().String() + " to end"
	}
	for _, v := range spec.GetVolumes() {
		out["volume "+v.Name] = "kept"
	}
	for _, p := range spec.GetPorts() {
		var to []string
		for _, b := range p.Backends {
			to = append(to, names[b.ContainerId]+map[bool]string{true: "", false: " (not ready)"}[b.Ready])
		}
		out[fmt.Sprintf("port %d/%s", p.HostPort, p.Protocol)] = "to " + strings.Join(to, ", ")
	}
	return out
}
