package control

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// folding is a world in which two machines with three containers each are about to be
// folded into one.
func folding(t *testing.T) *script {
	x := &script{world: newWorld(t)}
	for _, line := range strings.Split(`host alpha cpu=8 memory=16GiB boot=600ms prepare=50ms
image web healthy=2s stops=200ms
project p
service p web image=web replicas=2 check=yes restart=always publish=80:80 spread=machine memory=128MiB
service p api image=web replicas=2 check=yes restart=always spread=machine memory=128MiB
service p cache image=web replicas=2 check=yes restart=always spread=machine memory=128MiB
pass 1m
service p web image=web replicas=2 check=yes restart=always publish=80:80 memory=128MiB
service p api image=web replicas=2 check=yes restart=always memory=128MiB
service p cache image=web replicas=2 check=yes restart=always memory=128MiB
pass 4m`, "\n") {
		x.do(line)
	}
	return x
}

// sound checks what must hold at every instant of a move.
func (x *script) sound(t *testing.T) {
	t.Helper()
	snap := x.st.Snapshot()
	live := active(snap.Containers)
	for k, group := range byService(live) {
		if len(group) != 2 {
			t.Fatalf("%d containers count for service %s\n%s", len(group), k.service, x.out.String())
		}
	}
	for _, p := range publishedPorts(live) {
		if len(p.Backends) != 2 {
			t.Fatalf("port %d leads to %v\n%s", p.HostPort, p.Backends, x.out.String())
		}
	}
	for _, r := range nameRecords(live, networkIDs(snap.Networks)) {
		if len(r.Ips) == 0 {
			t.Fatalf("%s resolves to nothing", r.Name)
		}
	}
	have := map[string]string{}
	for _, c := range snap.Containers {
		for _, a := range addresses(c) {
			if have[a.Ip] != "" {
				t.Fatalf("%s and %s have %s", have[a.Ip], c.Meta.Name, a.Ip)
			}
			have[a.Ip] = c.Meta.Name
		}
	}
}

// served says whether the port leads to somebody who is ready, for all that hosts know.
func (x *script) served(t *testing.T) {
	t.Helper()
	for name, h := range x.hosts {
		for _, p := range h.Spec().GetPorts() {
			if !slices.ContainsFunc(p.Backends, func(b *v1.Backend) bool {
				return b.Ready && slices.Contains(h.Running(), containerName(h.Spec(), b.ContainerId))
			}) {
				t.Fatalf("%s: port %d leads to nobody: %v\n%s", name, p.HostPort, p.Backends, x.out.String())
			}
		}
	}
}

func containerName(spec *v1.HostSpec, id string) string {
	for _, c := range spec.GetContainers() {
		if c.Id == id {
			return c.Name
		}
	}
	return ""
}

// TestKilledAtEachStep kills the server after each transaction of a fold in turn, and
// after every second one, third one and so on, until folds need no transaction more.
func TestKilledAtEachStep(t *testing.T) {
	t.Parallel()
	for _, each := range []bool{false, true} {
		for n := 1; ; n++ {
			x := folding(t)
			last, steps := x.st.Revision(), 0
			x.killed = func() bool {
				x.sound(t)
				now := x.st.Revision()
				if now == last || last == 0 { // 0: what a server writes at its start is no step
					last = now
					return false
				}
				last, steps = now, steps+1
				if steps == n || each && steps%n == 0 {
					last = 0
				}
				return last == 0
			}
			// A restart begins the wait for stillness anew: two folds' time, and more.
			for d, end := 5*time.Second, x.clock.Now().Add(30*time.Minute); x.clock.Now().Before(end); {
				x.pass(d)
				x.served(t)
				if d = 5 * time.Second; slices.ContainsFunc(x.st.Snapshot().Containers, func(c *v1.Container) bool { return c.Replaces != "" }) {
					d = 200 * time.Millisecond
				}
			}
			snap := x.st.Snapshot()
			var names []string
			for _, c := range snap.Containers {
				names = append(names, c.Meta.Name)
				if c.Replaces+c.ReplacedBy != "" {
					t.Errorf("killed at step %d (each %t): %s is still moving", n, each, c.Meta.Name)
				}
			}
			slices.Sort(names)
			if got, want := fmt.Sprint(names), "[p-api-1 p-api-2 p-cache-1 p-cache-2 p-web-1 p-web-2]"; got != want || len(snap.Machines) != 1 {
				t.Fatalf("killed at step %d (each %t): %s in %d machines\n%s", n, each, got, len(snap.Machines), x.out.String())
			}
			if steps < n || each && n == 3 {
				t.Logf("a fold took %d steps", steps)
				break
			}
		}
	}
}

// Who keeps something is never started a second time.
func TestMovable(t *testing.T) {
	mk := func(fn func(*v1.Container)) *v1.Container {
		x := &v1.Container{Meta: &v1.Meta{Name: "p-web-1"}, Service: "web", Spec: &v1.ContainerSpec{Restart: &v1.RestartPolicy{Name: "always"}}}
		fn(x)
		return x
	}
	if !movable(mk(func(*v1.Container) {})) {
		t.Fatal("a plain one is not")
	}
	for what, fn := range map[string]func(*v1.Container){
		"a volume":              func(x *v1.Container) { x.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Source: "v"}} },
		"a bind mount":          func(x *v1.Container) { x.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_BIND, Source: "/v"}} },
		"a volume of its image": func(x *v1.Container) { x.Status = &v1.ContainerStatus{AnonymousVolumes: true} },
		"no restart policy":     func(x *v1.Container) { x.Spec.Restart = nil },
		"on-failure":            func(x *v1.Container) { x.Spec.Restart.Name = "on-failure" },
		"made by run":           func(x *v1.Container) { x.Service = "" },
		"one-off":               func(x *v1.Container) { x.OneOff = true },
		"batch work":            func(x *v1.Container) { x.Spec.WorkClass = v1.WorkClass_WORK_CLASS_BATCH },
		"metal":                 func(x *v1.Container) { x.Spec.Isolation = v1.Isolation_ISOLATION_METAL },
		"a fixed address":       func(x *v1.Container) { x.Spec.Networks = []*v1.NetworkAttachment{{Network: "n", Ipv4: "10.64.0.9"}} },
		"stopped":               func(x *v1.Container) { x.Stopped = true },
		"paused":                func(x *v1.Container) { x.Paused = true },
		"moving":                func(x *v1.Container) { x.Replaces = "y" },
		"going":                 func(x *v1.Container) { x.Meta.Deleting = true },
	} {
		if movable(mk(fn)) {
			t.Errorf("%s: is moved", what)
		}
	}
}

// What no back end can is kept out of plans, and refused if it comes nevertheless.
func TestActionsNobodyCan(t *testing.T) {
	h := planHost(&v1.Host{Meta: &v1.Meta{Id: "h"}, Connected: true, Facts: &v1.HostFacts{Capabilities: &v1.Capabilities{GrowCpu: true, GrowMemory: true, Clone: true}}})
	if h.Capabilities.MoveSecondsGiB != 0 || h.Off || h.Capabilities.PowerOnSeconds != 0 {
		t.Errorf("a host says that it can migrate or be switched on: %+v", h)
	}
	x := folding(t)
	before := x.st.Revision()
	for _, k := range []planner.Kind{planner.Migrate, planner.PowerOn, planner.PowerOff, "dance"} {
		w := newPlacement(x.ctl, x.st.Snapshot(), x.ctl.claims(x.st.Snapshot()))
		for _, m := range w.snap.Machines {
			w.action(planner.Action{Kind: planner.Grow, Machine: m.Meta.Id, To: planner.Size{CPU: 1000, Memory: 4 << 30}})
			w.action(planner.Action{Kind: k, Machine: m.Meta.Id, Host: "h-alpha"})
		}
		if err := w.commit(x.ctx); !errdefs.IsNotImplemented(err) {
			t.Errorf("%s: %v", k, err)
		}
	}
	w := newPlacement(x.ctl, x.st.Snapshot(), x.ctl.claims(x.st.Snapshot()))
	w.evictions([]planner.Action{{Kind: planner.Evict, Container: w.snap.Containers[0].Meta.Id}, {Kind: planner.Place, Container: w.snap.Containers[1].Meta.Id}})
	if err := w.commit(x.ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("latency work gives way: %v", err)
	}
	if x.st.Revision() != before {
		t.Error("half of a refused plan was written")
	}
}

// Batch work that gives way keeps its place until it has ended, and finds another then.
func TestEvict(t *testing.T) {
	x := folding(t)
	all := store.List[*v1.Container](x.st, "p")
	change(x, store.KeyOf(all[0]), func(c *v1.Container) { c.Spec.WorkClass = v1.WorkClass_WORK_CLASS_BATCH })
	w := newPlacement(x.ctl, x.st.Snapshot(), x.ctl.claims(x.st.Snapshot()))
	must(t, w.evict(planner.Action{Kind: planner.Evict, Container: all[0].Meta.Id}, "another"))
	must(t, w.commit(x.ctx))
	c, err := store.ByID[*v1.Container](x.st, store.Containers, all[0].Meta.Id)
	if err != nil || c.Assignment == nil || c.GivesWayTo != "another" {
		t.Fatal(c, err)
	}
	snap := x.st.Snapshot()
	if givenUp(c) {
		t.Error("it runs, and counts as ended")
	}
	for _, a := range hostSpec(snap, c.Assignment.HostId, "").Containers {
		if a.Stopped != (a.Id == c.Meta.Id) {
			t.Errorf("%s is told to stop: %v", a.Name, a.Stopped)
		}
	}
	x.pass(10 * time.Second)
	if c, err := store.ByID[*v1.Container](x.st, store.Containers, all[0].Meta.Id); err != nil || !Ready(c) {
		t.Errorf("it does not run again: %v %v", c.GetStatus(), err)
	}
}

func TestElasticityIsValidated(t *testing.T) {
	for _, e := range []Elasticity{{IdleStop: -1}, {ShrinkDelay: -1}, {FoldsPerHour: -1}, {FoldDelay: time.Millisecond}, {RestartDelay: 1}} {
		if err := e.Validate(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", e, err)
		}
	}
	if err := (Elasticity{FoldDelay: -1, RestartDelay: -1, IdleStop: time.Millisecond}).Validate(); err != nil {
		t.Error(err)
	}
}
