package control

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

func TestAddresses(t *testing.T) {
	n := &v1.Network{Meta: &v1.Meta{Name: "n"}, Cidr: "10.64.0.0/26"} // 4 blocks
	m1, m2 := &v1.Machine{Meta: &v1.Meta{Id: "m1"}}, &v1.Machine{Meta: &v1.Meta{Id: "m2"}}
	p := newIPAM(nil, nil)
	seen := map[string]bool{}
	take := func(m *v1.Machine, fixed string) string {
		t.Helper()
		ip, err := p.pick(n, m, fixed)
		if err != nil {
			t.Fatal(err)
		}
		if seen[ip] || strings.HasSuffix(ip, ".0") {
			t.Fatal("given twice, or a network's:", ip)
		}
		seen[ip] = true
		return ip
	}
	for range 17 { // one more than a block
		take(m1, "")
	}
	if len(m1.Prefixes) != 2 {
		t.Fatal(m1.Prefixes)
	}
	metal := take(nil, "")
	if metal != "10.64.0.48" {
		t.Fatal("metal does not start at the top:", metal)
	}
	take(m2, "10.64.0.33")
	if len(m2.Prefixes) != 1 || m2.Prefixes[0] != "10.64.0.32/28" {
		t.Fatal(m2.Prefixes)
	}
	for _, x := range []struct {
		fixed string
		is    func(error) bool
	}{{"10.64.0.33", errdefs.IsAlreadyExists}, {"10.64.0.34", errdefs.IsFailedPrecondition}, {"10.65.0.1", errdefs.IsInvalidArgument}, {"x", errdefs.IsInvalidArgument}} {
		if _, err := p.pick(n, m1, x.fixed); !x.is(err) {
			t.Errorf("%s: %v", x.fixed, err)
		}
	}
	for i := range 100 {
		if _, err := p.pick(n, m1, ""); err != nil {
			if !errdefs.IsResourceExhausted(err) || i < 10 {
				t.Fatal(i, err)
			}
			return
		}
	}
	t.Fatal("a network without end")
}

func TestCarver(t *testing.T) {
	c := &Controller{opts: Options{ClusterCIDR: netip.MustParsePrefix("10.64.0.0/20"), NetworkBits: 22}}
	k := c.Carver(&store.Snapshot{Networks: []*v1.Network{{Cidr: "10.64.0.0/22"}, {Cidr: "10.64.9.0/24"}}})
	for _, want := range []string{"10.64.4.0/22", "10.64.12.0/22"} {
		if got, err := k.Take(""); err != nil || got != want {
			t.Fatal(got, err)
		}
	}
	if _, err := k.Take(""); !errdefs.IsResourceExhausted(err) {
		t.Fatal(err)
	}
	if _, err := k.Take("10.64.0.128/25"); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	if _, err := k.Take("8.8.8.0/24"); !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
}

func TestWaitsFor(t *testing.T) {
	svc := map[svcKey]*v1.Service{{"p", "db"}: {Replicas: 1}}
	web := func(cond string) *v1.Container {
		return &v1.Container{Meta: &v1.Meta{Project: "p"}, Spec: &v1.ContainerSpec{DependsOn: []*v1.Dependency{{Service: "db", Condition: cond, Required: true}}}}
	}
	now := timestamppb.Now()
	running := &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_RUNNING, StartedAt: now}
	healthy := &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_RUNNING, StartedAt: now, Health: v1.Health_HEALTH_HEALTHY}
	starting := &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_RUNNING, StartedAt: now, Health: v1.Health_HEALTH_STARTING}
	done := &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_EXITED, StartedAt: now}
	failed := &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_EXITED, StartedAt: now, ExitCode: 1}
	for _, x := range []struct {
		cond  string
		st    *v1.ContainerStatus
		holds bool
	}{
		{Started, nil, true}, {Started, running, false}, {Started, done, false},
		{Healthy, starting, true}, {Healthy, healthy, false}, {Healthy, running, false}, {Healthy, done, true},
		{Completed, running, true}, {Completed, failed, true}, {Completed, done, false},
	} {
		groups := map[svcKey][]*v1.Container{{"p", "db"}: {{Meta: &v1.Meta{}, Status: x.st}}}
		if got := waitsFor(web(x.cond), svc, groups); (got != "") != x.holds {
			t.Errorf("%s, %v: %q", x.cond, x.st, got)
		}
	}
	w := web(Started)
	w.Status = running
	if waitsFor(w, svc, nil) != "" {
		t.Error("what ran once is held")
	}
}

// lab is controllers over a store of their own, with fake hosts.
type lab struct {
	t   *testing.T
	st  *store.Store
	dir string
	ctl *Controller
	end func()
}

func newLab(t *testing.T, o Options) *lab {
	l := &lab{t: t, dir: t.TempDir()}
	l.start(o)
	t.Cleanup(func() { l.end() })
	return l
}

func (l *lab) start(o Options) {
	st, err := store.Open(l.t.Context(), store.Options{Dir: l.dir})
	if err != nil {
		l.t.Fatal(err)
	}
	o.Store = st
	c, err := New(o)
	if err != nil {
		l.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.Run(ctx) }()
	l.st, l.ctl = st, c
	l.end = func() { cancel(); <-done; st.Close() }
}

func (l *lab) serve(h *fakehost.Host) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	client := h.Client(ctx)
	go func() { defer close(done); l.ctl.Serve(ctx, h.ID(), client) }()
	stop = func() { cancel(); <-done }
	end := l.end
	l.end = func() { stop(); end() }
	return stop
}

func (l *lab) create(rs ...store.Record) {
	l.t.Helper()
	tx := l.st.Txn()
	for _, r := range rs {
		tx.Create(r)
	}
	if _, err := tx.Commit(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) until(what string, ok func(s *store.Snapshot) bool) *store.Snapshot {
	l.t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		s := l.st.Snapshot()
		if ok(s) {
			return s
		}
		if time.Now().After(end) {
			l.t.Fatalf("not in time: %s; containers %v machines %v", what, s.Containers, s.Machines)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func project(name string) []store.Record {
	return []store.Record{&v1.Project{Meta: &v1.Meta{Name: name, Id: "p-" + name}},
		&v1.Network{Meta: &v1.Meta{Project: name, Name: "default", Id: "n-" + name}, Cidr: "10.64.0.0/22"}}
}

func service(project, name string, replicas int32, spec *v1.ContainerSpec) *v1.Service {
	return &v1.Service{Meta: &v1.Meta{Project: project, Name: name, Id: "s-" + project + name}, Template: spec, Replicas: replicas, Hash: ServiceHash(spec)}
}

func running(n int) func(*store.Snapshot) bool {
	return func(s *store.Snapshot) bool {
		have := 0
		for _, c := range s.Containers {
			if c.Status.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
				have++
			}
		}
		return have == n && len(s.Containers) == n
	}
}

func TestContainersShareOneMachine(t *testing.T) {
	l := newLab(t, Options{})
	h := fakehost.New(fakehost.Options{})
	l.create(project("p")...)
	l.create(service("p", "web", 5, &v1.ContainerSpec{Image: "x"}))
	// Nothing runs without a host; that is said, not hidden.
	l.until("the reason", func(s *store.Snapshot) bool {
		return len(s.Containers) == 5 && strings.HasPrefix(s.Containers[0].Status.Message, "no place")
	})
	l.serve(h)
	s := l.until("all run", running(5))
	if len(s.Machines) != 1 || s.Machines[0].Meta.Name != "m-1" || len(s.Machines[0].Prefixes) != 1 {
		t.Fatal(s.Machines)
	}
	for _, c := range s.Containers {
		p := netip.MustParsePrefix(s.Machines[0].Prefixes[0])
		if !p.Contains(netip.MustParseAddr(c.Assignment.Ip)) || c.Assignment.Reason.GetSummary() == "" || strings.Contains(c.Assignment.Reason.Summary, s.Machines[0].Meta.Id) {
			t.Error(c.Assignment)
		}
	}
}

// TestMachineIsPersistedBeforeItsContainers: no intent ever names a container in a
// machine that is not there, whatever the host is asked at.
func TestKillAnywhere(t *testing.T) {
	l := newLab(t, Options{Elasticity: Elasticity{IdleStop: 200 * time.Millisecond}})
	h := fakehost.New(fakehost.Options{Boot: 20 * time.Millisecond, Prepare: 5 * time.Millisecond})
	l.serve(h)
	l.create(project("p")...)
	for i := range 4 {
		l.create(service("p", fmt.Sprint("s", i), 10, &v1.ContainerSpec{Image: "x", Resources: &v1.Resources{MemoryBytesReservation: 64 << 20}}))
	}
	for i := range 6 {
		time.Sleep(time.Duration(i*7) * time.Millisecond) // wherever it may be
		l.end()
		l.start(Options{Elasticity: Elasticity{IdleStop: 200 * time.Millisecond}})
		l.serve(h)
	}
	s := l.until("all run", running(40))
	ips, names := map[string]bool{}, map[string]bool{}
	for _, c := range s.Containers {
		ips[c.Assignment.Ip], names[c.Meta.Name] = true, true
	}
	if len(ips) != 40 || len(names) != 40 {
		t.Fatal(len(ips), len(names))
	}
	p, err := store.Get[*v1.Project](l.st, store.Key{Kind: store.Projects, Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Update(t.Context(), l.st, store.KeyOf(p), func(p *v1.Project) error { p.Meta.Deleting = true; return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		time.Sleep(time.Duration(i*11) * time.Millisecond)
		l.end()
		l.start(Options{Elasticity: Elasticity{IdleStop: 200 * time.Millisecond}})
		l.serve(h)
	}
	l.until("all gone", func(s *store.Snapshot) bool {
		return len(s.Containers)+len(s.Services)+len(s.Networks)+len(s.Projects)+len(s.Machines) == 0
	})
	if m, c, _ := h.Left(); m+c != 0 {
		t.Fatal("left on the host:", m, c)
	}
}

func TestStopsInOrderOfDependencies(t *testing.T) {
	l := newLab(t, Options{})
	h := fakehost.New(fakehost.Options{})
	h.Script("web", fakehost.Script{StopsAfter: 200 * time.Millisecond})
	l.serve(h)
	l.create(project("p")...)
	l.create(service("p", "db", 1, &v1.ContainerSpec{Image: "db"}),
		service("p", "web", 1, &v1.ContainerSpec{Image: "web", DependsOn: []*v1.Dependency{{Service: "db", Required: true}}}))
	l.until("both run", running(2))
	p, _ := store.Get[*v1.Project](l.st, store.Key{Kind: store.Projects, Name: "p"})
	store.Update(t.Context(), l.st, store.KeyOf(p), func(p *v1.Project) error { p.Meta.Deleting = true; return nil })
	l.until("gone", func(s *store.Snapshot) bool {
		if len(s.Containers) == 1 && s.Containers[0].Service == "web" {
			t.Fatal("what others need went first")
		}
		return len(s.Projects) == 0
	})
}

func TestPublishedPortsFollowReadiness(t *testing.T) {
	check := &v1.ContainerSpec{Healthcheck: &v1.HealthCheck{Test: []string{"CMD", "x"}}}
	c := func(id string, h v1.Health) *v1.Container {
		return &v1.Container{Meta: &v1.Meta{Id: id}, Spec: check, Status: &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_RUNNING, Health: h},
			Assignment: &v1.Assignment{Ip: "10.0.0." + id, Ports: []*v1.PortMapping{{HostPort: 80, ContainerPort: 8080}}}}
	}
	ps := publishedPorts([]*v1.Container{c("1", v1.Health_HEALTH_HEALTHY), c("2", v1.Health_HEALTH_STARTING)})
	want := &v1.PublishedPort{Protocol: "tcp", HostPort: 80, Backends: []*v1.Backend{
		{Ip: "10.0.0.1", Port: 8080, ContainerId: "1", Ready: true}, {Ip: "10.0.0.2", Port: 8080, ContainerId: "2"}}}
	if len(ps) != 1 || !proto.Equal(ps[0], want) {
		t.Fatal(ps)
	}
}

func TestServiceHashIgnoresDependencies(t *testing.T) {
	a := &v1.ContainerSpec{Image: "x", DependsOn: []*v1.Dependency{{Service: "y"}}}
	if ServiceHash(a) != ServiceHash(&v1.ContainerSpec{Image: "x"}) || ServiceHash(a) == ServiceHash(&v1.ContainerSpec{Image: "y"}) {
		t.Fatal("hash")
	}
	if !SameHash("a+1", "a") || SameHash("a", "b") {
		t.Fatal("salt")
	}
}

func TestEventsAreBounded(t *testing.T) {
	e := newEvents(100)
	for i := range 1000 {
		e.Add(&v1.Event{Id: fmt.Sprint(i)})
	}
	evs, next, _ := e.From(0)
	if len(evs) > 110 || next != 1000 || evs[len(evs)-1].Id != "999" {
		t.Fatal(len(evs), next)
	}
	if evs, _, _ := e.From(999); len(evs) != 1 {
		t.Fatal(evs)
	}
}
