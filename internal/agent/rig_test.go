package agent

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// rig runs agents on a world, in simulated time.
type rig struct {
	t      *testing.T
	w      *world
	dir    string
	a      *Agent
	cancel context.CancelFunc
	done   chan error
	spec   *v1.HostSpec
	next   string // state directory of the agent after the one that was killed
	plan   any    // of the property test
	last   string // what was not right when last looked at
	tuning Tuning
	idle   func() // returns when nobody has anything to do; in real time, at once
}

func cloneSpec(s *v1.HostSpec) *v1.HostSpec { return proto.Clone(s).(*v1.HostSpec) }

func newRig(t *testing.T) *rig {
	r := &rig{t: t, w: newWorld(), dir: t.TempDir(), spec: &v1.HostSpec{ClusterId: "c1"}, idle: synctest.Wait}
	r.start()
	return r
}

// live is a rig in real time, for what can't be in a bubble (HTTP/2 shares channels
// between connections); its machines boot in no time.
func live(t *testing.T) *rig {
	r := &rig{t: t, w: newWorld(), dir: t.TempDir(), spec: &v1.HostSpec{ClusterId: "c1"}, idle: func() {}}
	r.w.drv.bootTime, r.w.drv.cloneTime = time.Millisecond, time.Millisecond
	r.tuning.CallTimeout = 2 * time.Second
	r.start()
	t.Cleanup(r.end)
	return r
}

// end stops the agent and all machines.
func (r *rig) end() {
	r.stop()
	for _, m := range r.w.drv.ms {
		if m.guest != nil {
			m.guest.die()
		}
	}
}

// rngReader is safe for use by many goroutines, as crypto/rand is.
type rngReader struct {
	mu sync.Mutex
	c  *rand.ChaCha8
}

func (r *rngReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.c.Read(p)
}

func (r *rig) start() {
	r.t.Helper()
	level := slog.LevelError
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	a, err := New(Options{StateDir: r.dir, HostName: "test", Driver: r.w.drv, Metal: r.w.rt, Images: r.w.imgs, Volumes: r.w.vols, Network: r.w.net,
		Guest: Guest{Version: "g1"}, Tuning: r.tuning, Connect: fakeConnect, Rand: &rngReader{c: rand.NewChaCha8([32]byte{byte(time.Now().UnixNano())})},
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))})
	if err != nil {
		r.t.Fatal(err)
	}
	r.w.gmu.Lock()
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), genKey{}, r.w.gen))
	r.w.gmu.Unlock()
	r.a, r.cancel, r.done = a, cancel, make(chan error, 1)
	go func() { r.done <- a.Run(ctx, nil, "") }()
	r.idle()
}

func (r *rig) stop() {
	r.t.Helper()
	r.cancel()
	if err := <-r.done; err != nil {
		r.t.Fatal(err)
	}
	r.idle()
}

func (r *rig) apply() {
	r.t.Helper()
	r.spec.Revision++
	if _, err := r.a.apply(proto.Clone(r.spec).(*v1.HostSpec)); err != nil {
		r.t.Fatal(err)
	}
	r.idle()
}

func (r *rig) status(id string) *v1.ContainerStatus {
	r.a.hub.mu.Lock()
	defer r.a.hub.mu.Unlock()
	return r.a.hub.containers[id]
}

func (r *rig) machineStatus(id string) *v1.MachineStatus {
	r.a.hub.mu.Lock()
	defer r.a.hub.mu.Unlock()
	return r.a.hub.machines[id]
}

// peek looks at the world while nobody changes it.
func (r *rig) peek(ok func() bool) bool {
	r.idle()
	w := r.w
	for _, mu := range []*sync.Mutex{&w.drv.mu, &w.rt.mu, &w.imgs.mu, &w.vols.mu, &w.net.mu} {
		mu.Lock()
		defer mu.Unlock()
	}
	for _, m := range w.drv.ms {
		if m.rt != nil {
			m.rt.mu.Lock()
			defer m.rt.mu.Unlock()
		}
	}
	return ok()
}

// starts is how often the driver started a machine.
func (r *rig) starts() (n int) {
	r.peek(func() bool { n = len(r.w.drv.starts); return true })
	return n
}

// until lets time pass until ok, at most d.
func (r *rig) until(d time.Duration, what string, ok func() bool) time.Duration {
	r.t.Helper()
	begin := time.Now()
	for {
		if r.peek(ok) {
			return time.Since(begin)
		}
		if time.Since(begin) >= d {
			for _, c := range r.spec.Containers {
				r.t.Logf("container %s: %v", c.Id, r.status(c.Id))
			}
			for _, m := range r.spec.Machines {
				r.t.Logf("machine %s: %v", m.Id, r.machineStatus(m.Id))
			}
			if r.plan != nil {
				r.t.Logf("plan: %+v", r.plan)
			}
			r.t.Fatalf("not within %s: %s %s", d, what, r.last)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (r *rig) machine(id string) *v1.MachineAssignment {
	m := &v1.MachineAssignment{Id: id, Name: id, Size: &v1.Size{CpuMilli: 1000, MemoryBytes: 256 << 20}, Mac: "02:00:00:00:00:01"}
	r.spec.Machines = append(r.spec.Machines, m)
	return m
}

func (r *rig) container(id, machine string, cmd ...string) *v1.ContainerAssignment {
	c := &v1.ContainerAssignment{Id: id, Name: id, MachineId: machine, Generation: 1, Spec: &v1.ContainerSpec{Image: "app"}}
	if len(cmd) > 0 {
		c.Spec.Command = &v1.StringList{Values: cmd}
	}
	r.spec.Containers = append(r.spec.Containers, c)
	return c
}

func (r *rig) state(id string, s v1.ContainerState) func() bool {
	return func() bool { return r.status(id).GetState() == s }
}

const (
	running = v1.ContainerState_CONTAINER_STATE_RUNNING
	exited  = v1.ContainerState_CONTAINER_STATE_EXITED
	failed  = v1.ContainerState_CONTAINER_STATE_FAILED
)

// rigged runs a test in a bubble of simulated time.
func rigged(t *testing.T, fn func(*rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		fn(r)
		r.end()
	})
}

// runs is true when a container runs in the nth run of its machine. (An agent takes
// containers to run until it has looked.)
func (r *rig) runs(id, machine string, nth int) func() bool {
	return func() bool {
		boots := 0
		for _, s := range r.w.drv.starts {
			if strings.HasPrefix(s, machine+" ") {
				boots++
			}
		}
		c := r.w.drv.ms[machine].rt.cs[id]
		return boots == nth && c != nil && c.st.State == running
	}
}

// madeAnew is true when a container was made in the machine since it was started: its
// writable layer is new.
func (r *rig) madeAnew(machine string) bool {
	return r.peek(func() bool { return r.w.drv.ms[machine].rt.creates != 0 })
}

// clean names what is left of machines and containers, or "".
func (r *rig) clean() string {
	w := r.w
	switch {
	case len(w.drv.ms) > 0:
		return "machine"
	case len(w.rt.cs) > 0:
		return "metal container"
	case len(w.imgs.leases) > 0:
		return "lease"
	case len(w.vols.vols) > 0:
		return "volume"
	case len(w.vols.used) > 0:
		return "volume use"
	}
	for _, d := range []string{"containers", "machines"} {
		if e, _ := os.ReadDir(r.a.state.path(d)); len(e) > 0 {
			return d + " record"
		}
	}
	return ""
}
