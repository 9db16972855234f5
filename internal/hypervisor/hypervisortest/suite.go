// Package hypervisortest is the suite that every hypervisor.Driver must pass.
//
//	func TestSuite(t *testing.T) {
//		hypervisortest.Run(t, func(t *testing.T) hypervisortest.Env { ... })
//	}
//
// Each test gets an Env of its own and leaves nothing behind. Machines are
// started as clones when Env.Template is set, which makes the suite quick for
// drivers whose cold start is slow.
package hypervisortest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
)

// Env is a driver with what its tests need.
type Env struct {
	Driver hypervisor.Driver
	// Spec is a valid specification for a machine; the same id gives the same.
	Spec func(id string) hypervisor.MachineSpec
	// Template exists already and fits Spec; "" if machines are to start cold.
	Template string
	// Ready waits until a machine's guest can be hot-plugged and talked to.
	Ready func(ctx context.Context, d hypervisor.Driver, id string) error
	// Echo sends text through a channel's guest and checks that it comes back.
	Echo func(ctx context.Context, c net.Conn, text string) error
	// Disk makes a raw image of so many bytes; Tap makes a tap device.
	Disk func(bytes int64) string
	Tap  func() string
	// Crash kills a machine's VMM from outside.
	Crash func(d hypervisor.Driver, id string)
	// Reopen closes the driver and makes another of the same host.
	Reopen func(d hypervisor.Driver) hypervisor.Driver
}

// Timeout is how long one test of the suite may take.
const Timeout = 4 * time.Minute

// Run runs the suite.
func Run(t *testing.T, make func(t *testing.T) Env) {
	for _, c := range []struct {
		name string
		test func(*T)
	}{
		{"Lifecycle", lifecycle}, {"BadRequests", badRequests}, {"Resize", resize},
		{"Disks", disks}, {"NICs", nics}, {"Channel", channel}, {"Console", console},
		{"Crash", crash}, {"Reopen", reopen}, {"Template", template}, {"Many", many},
		{"CancelledStart", cancelled},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), Timeout)
			defer cancel()
			e := &T{T: t, Env: make(t), ctx: ctx}
			t.Cleanup(e.clean)
			c.test(e)
		})
	}
}

func lifecycle(t *T) {
	d, spec := t.Driver, t.Spec("life")
	events := d.Watch(t.ctx)
	t.must(d.Create(t.ctx, spec))
	t.must(d.Create(t.ctx, spec)) // again is no error
	other := spec
	other.Cmdline = "other"
	t.want(errdefs.IsAlreadyExists, d.Create(t.ctx, other))
	st := t.inspect("life")
	if st.State != hypervisor.Stopped || st.PID != 0 {
		t.Errorf("created: %+v", st)
	}
	if c := st.Spec.Ceiling; c.CPUs == 0 || c.Memory == 0 {
		t.Errorf("ceiling is not filled in: %+v", c)
	}
	t.must(d.Stop(t.ctx, "life", hypervisor.StopOptions{})) // stopped already
	for range 2 {
		t.must(d.Start(t.ctx, "life", hypervisor.StartOptions{Template: t.Template}))
	}
	t.awaitEvent(events, "life", hypervisor.EventStarted)
	st = t.inspect("life")
	base := d.Capabilities().Base
	if st.State != hypervisor.Running || st.PID == 0 || st.Size != base || st.StartedAt.IsZero() || st.Template != t.Template || st.Accelerator != d.Capabilities().Accelerator {
		t.Errorf("started: %+v", st)
	}
	if n, err := d.MemoryUse(t.ctx, "life"); err != nil || n <= 0 || n > 2*base.Memory {
		t.Errorf("memory use %d, %v", n, err)
	}
	list, err := d.List(t.ctx)
	if err != nil || len(list) != 1 || list[0].Spec.ID != "life" {
		t.Errorf("list: %v, %v", list, err)
	}
	t.must(d.Stop(t.ctx, "life", hypervisor.StopOptions{}))
	t.awaitEvent(events, "life", hypervisor.EventExited)
	if st := t.inspect("life"); st.State != hypervisor.Stopped || st.PID != 0 || st.Message != "" {
		t.Errorf("stopped: %+v", st)
	}
	t.must(d.Start(t.ctx, "life", hypervisor.StartOptions{Template: t.Template})) // and again
	for range 2 {
		t.must(d.Delete(t.ctx, "life"))
	}
	_, err = d.Inspect(t.ctx, "life")
	t.want(errdefs.IsNotFound, err)
	t.must(d.Create(t.ctx, other)) // the name is free
}

func badRequests(t *T) {
	d := t.Driver
	for _, id := range []string{"", "UPPER", "a/b", "..", "a b", "a,b", strings.Repeat("x", 64)} {
		s := t.Spec("ok")
		s.ID = id
		t.want(errdefs.IsInvalidArgument, d.Create(t.ctx, s))
	}
	s := t.Spec("big")
	s.Ceiling.Memory = 1 << 60
	t.want(errdefs.IsInvalidArgument, d.Create(t.ctx, s))
	none := func(err error) { t.Helper(); t.want(errdefs.IsNotFound, err) }
	none(d.Start(t.ctx, "none", hypervisor.StartOptions{}))
	none(d.Stop(t.ctx, "none", hypervisor.StopOptions{}))
	_, err := d.Resize(t.ctx, "none", hypervisor.Size{CPUs: 1})
	none(err)
	none(d.AttachDisk(t.ctx, "none", hypervisor.Disk{ID: "d", Path: "/x"}))
	none(d.DetachDisk(t.ctx, "none", "d"))
	none(d.AttachNIC(t.ctx, "none", hypervisor.NIC{ID: "n", Tap: "t", MAC: "52:54:00:00:00:01"}))
	none(d.DetachNIC(t.ctx, "none", "n"))
	_, err = d.Channel(t.ctx, "none")
	none(err)
	_, err = d.Console(t.ctx, "none")
	none(err)
	_, err = d.ConsoleLog(t.ctx, "none", 10)
	none(err)
	_, err = d.MemoryUse(t.ctx, "none")
	none(err)
	none(d.SaveTemplate(t.ctx, "none", "x"))

	t.must(d.Create(t.ctx, t.Spec("off")))
	off := func(err error) { t.Helper(); t.want(errdefs.IsFailedPrecondition, err) }
	_, err = d.Resize(t.ctx, "off", hypervisor.Size{CPUs: 1})
	off(err)
	off(d.AttachDisk(t.ctx, "off", hypervisor.Disk{ID: "d", Path: t.Disk(1 << 20)}))
	_, err = d.Channel(t.ctx, "off")
	off(err)
	_, err = d.Console(t.ctx, "off")
	off(err)
	_, err = d.MemoryUse(t.ctx, "off")
	off(err)
	off(d.SaveTemplate(t.ctx, "off", "x"))
	t.want(errdefs.IsNotFound, d.Start(t.ctx, "off", hypervisor.StartOptions{Template: "no-such-template"}))
}

func crash(t *T) {
	t.up("crash")
	events := t.Driver.Watch(t.ctx)
	t.must(t.Driver.AttachDisk(t.ctx, "crash", hypervisor.Disk{ID: "d", Path: t.Disk(1 << 20)}))
	t.Crash(t.Driver, "crash")
	start := time.Now()
	e := t.awaitEvent(events, "crash", hypervisor.EventExited)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("a crash was noticed after %v", took)
	}
	st := t.inspect("crash")
	if st.State != hypervisor.Crashed || st.Message == "" || e.Message == "" || len(st.Disks) != 0 {
		t.Errorf("crashed: %+v, event %+v", st, e)
	}
	t.want(errdefs.IsFailedPrecondition, t.Driver.AttachDisk(t.ctx, "crash", hypervisor.Disk{ID: "d", Path: t.Disk(1 << 20)}))
	t.must(t.Driver.Start(t.ctx, "crash", hypervisor.StartOptions{Template: t.Template}))
	t.ready("crash")
	if st := t.inspect("crash"); st.State != hypervisor.Running || st.Message != "" {
		t.Errorf("started again: %+v", st)
	}
	t.Crash(t.Driver, "crash")
	t.awaitEvent(events, "crash", hypervisor.EventExited)
	t.must(t.Driver.Stop(t.ctx, "crash", hypervisor.StopOptions{}))
	if st := t.inspect("crash"); st.State != hypervisor.Stopped {
		t.Errorf("a crashed machine that was stopped: %+v", st)
	}
}

func reopen(t *T) {
	for _, id := range []string{"lives", "dies"} {
		t.up(id)
	}
	t.must(t.Driver.Create(t.ctx, t.Spec("off")))
	disk := hypervisor.Disk{ID: "d", Path: t.Disk(1 << 20), Serial: "s"}
	t.must(t.Driver.AttachDisk(t.ctx, "lives", disk))
	size, err := t.Driver.Resize(t.ctx, "lives", hypervisor.Size{CPUs: 2, Memory: 320 << 20})
	t.must(err)
	c, err := t.Driver.Channel(t.ctx, "lives")
	t.must(err)
	t.must(t.Echo(t.ctx, c, "before"))
	before := t.inspect("lives")
	watch := t.Driver.Watch(t.ctx)

	t.Driver = t.Reopen(t.Driver)
	for range watch { // ends with its driver
	}
	after := t.inspect("lives")
	if after.State != hypervisor.Running || after.PID != before.PID || after.Size != size || len(after.Disks) != 1 || after.Disks[0] != disk ||
		!after.StartedAt.Equal(before.StartedAt) || after.Template != before.Template {
		t.Errorf("adopted %+v, was %+v", after, before)
	}
	c, err = t.Driver.Channel(t.ctx, "lives")
	t.must(err)
	t.must(t.Echo(t.ctx, c, "after"))
	t.must(t.Driver.DetachDisk(t.ctx, "lives", "d"))
	if st := t.inspect("off"); st.State != hypervisor.Stopped {
		t.Errorf("off: %+v", st)
	}
	events := t.Driver.Watch(t.ctx)
	t.Crash(t.Driver, "dies") // one that it did not start itself
	t.awaitEvent(events, "dies", hypervisor.EventExited)
	if st := t.inspect("dies"); st.State != hypervisor.Crashed {
		t.Errorf("dies: %+v", st)
	}
}

func template(t *T) {
	d := t.Driver
	t.must(d.Create(t.ctx, t.Spec("seed")))
	t.want(errdefs.IsInvalidArgument, d.Start(t.ctx, "seed", hypervisor.StartOptions{ForTemplate: true, Template: "x"}))
	t.must(d.Start(t.ctx, "seed", hypervisor.StartOptions{}))
	t.want(errdefs.IsFailedPrecondition, d.SaveTemplate(t.ctx, "seed", "tpl"))
	t.must(d.Stop(t.ctx, "seed", hypervisor.StopOptions{}))
	t.must(d.Start(t.ctx, "seed", hypervisor.StartOptions{ForTemplate: true}))
	t.ready("seed")
	t.want(errdefs.IsInvalidArgument, d.SaveTemplate(t.ctx, "seed", ".x"))
	t.want(errdefs.IsFailedPrecondition, d.AttachDisk(t.ctx, "seed", hypervisor.Disk{ID: "d", Path: t.Disk(1 << 20)}))
	t.must(d.SaveTemplate(t.ctx, "seed", "tpl"))
	_, err := d.Inspect(t.ctx, "seed")
	t.want(errdefs.IsNotFound, err)
	if names, err := d.Templates(t.ctx); err != nil || !contains(names, "tpl") {
		t.Errorf("templates: %v, %v", names, err)
	}
	for _, id := range []string{"c1", "c2"} {
		t.must(d.Create(t.ctx, t.Spec(id)))
		t.must(d.Start(t.ctx, id, hypervisor.StartOptions{Template: "tpl"}))
		t.ready(id)
		if st := t.inspect(id); st.Template != "tpl" || st.State != hypervisor.Running {
			t.Errorf("clone: %+v", st)
		}
	}
	for name, change := range map[string]func(*hypervisor.MachineSpec){
		"ceiling": func(s *hypervisor.MachineSpec) { s.Ceiling.Memory = 512 << 20 },
		"guest":   func(s *hypervisor.MachineSpec) { s.GuestVersion = "another" },
		"cmdline": func(s *hypervisor.MachineSpec) { s.Cmdline = "another" },
	} {
		s := t.Spec("other-" + name)
		change(&s)
		t.must(d.Create(t.ctx, s))
		t.want(errdefs.IsFailedPrecondition, d.Start(t.ctx, s.ID, hypervisor.StartOptions{Template: "tpl"}))
		if st := t.inspect(s.ID); st.State != hypervisor.Stopped {
			t.Errorf("%s: %+v", name, st)
		}
	}
	t.Driver = t.Reopen(t.Driver)
	d = t.Driver
	t.must(d.Create(t.ctx, t.Spec("c3")))
	t.must(d.Start(t.ctx, "c3", hypervisor.StartOptions{Template: "tpl"}))
	t.ready("c3")
	for range 2 {
		t.must(d.DeleteTemplate(t.ctx, "tpl"))
	}
	t.must(d.Stop(t.ctx, "c3", hypervisor.StopOptions{}))
	t.want(errdefs.IsNotFound, d.Start(t.ctx, "c3", hypervisor.StartOptions{Template: "tpl"}))
	c, err := d.Channel(t.ctx, "c1") // not bothered by any of it
	t.must(err)
	t.must(t.Echo(t.ctx, c, "still here"))
}

func many(t *T) {
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			id := fmt.Sprintf("many-%d", i)
			if err := t.Driver.Create(t.ctx, t.Spec(id)); err != nil {
				t.Error(err)
			} else if err := t.Driver.Start(t.ctx, id, hypervisor.StartOptions{Template: t.Template}); err != nil {
				t.Error(err)
			} else if i%2 == 1 {
				if err := t.Driver.Delete(t.ctx, id); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	wg.Wait()
	list, err := t.Driver.List(t.ctx)
	t.must(err)
	if len(list) != 3 {
		t.Errorf("%d machines, want 3: %+v", len(list), list)
	}
	for _, m := range list {
		if m.State != hypervisor.Running {
			t.Errorf("%+v", m)
		}
	}
}

func cancelled(t *T) {
	t.must(t.Driver.Create(t.ctx, t.Spec("late")))
	ctx, cancel := context.WithCancel(t.ctx)
	cancel()
	if err := t.Driver.Start(ctx, "late", hypervisor.StartOptions{Template: t.Template}); !errors.Is(err, context.Canceled) {
		t.Errorf("start with a cancelled context: %v", err)
	}
	if st := t.inspect("late"); st.State != hypervisor.Stopped || st.PID != 0 {
		t.Errorf("%+v", st)
	}
	t.up("late")
}
