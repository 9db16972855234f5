package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

// machine supervises one machine: see step.
type machine struct {
	a      *Agent
	id     string
	log    *slog.Logger
	wake   chan struct{}
	kernel *kernel
	begun  bool // run was called; guarded by a.mu

	mu        sync.Mutex
	want      *v1.MachineAssignment // nil: it shall be gone
	changed   bool
	interrupt context.CancelFunc // ends what may be given up when something changes
	panicked  bool               // the guest's kernel said so
	hung      bool               // keep-alives were not answered for too long
	atRest    bool               // it shall not run, does not, and its record says so
	misses    int                // keep-alives unanswered in a row
	usage     *v1.Usage
	pss       int64
	version   string // of the guest, as it says

	// The rest belongs to the actor's goroutine.
	rec       *machineRecord
	link      *GuestLink
	state     v1.MachineState
	message   string
	retry     backoff
	retryAt   time.Time
	patience  time.Time // without a session until then it is started again
	begin     time.Time // of the VMM, when this process started it
	alive     bool      // it ran when last looked at
	crashes   backoff
	startAt   time.Time
	cloned    bool      // this run is a clone that has not answered yet
	resizeAt  time.Time // ask again for a size that was not reached
	resizeTo  hypervisor.Size
	resized   backoff
	resizeGap string // what the last one left undone
	network   string // hash of what ConfigureNetwork was told last, in this session
	status    hypervisor.Status
}

func newMachine(a *Agent, id string, rec *machineRecord) *machine {
	if rec == nil {
		rec = &machineRecord{}
	}
	m := &machine{a: a, id: id, rec: rec, log: a.log.With("machine", id), wake: make(chan struct{}, 1)}
	d := &diskSet{
		disks: map[string]*heldDisk{}, idle: a.o.Tuning.DiskIdle, clock: a.o.Clock, limit: a.o.Driver.Capabilities().MaxDisks,
		attach: func(ctx context.Context, disk hypervisor.Disk) error { return a.o.Driver.AttachDisk(ctx, id, disk) },
		detach: func(ctx context.Context, name string) error { return a.o.Driver.DetachDisk(ctx, id, name) },
		use:    func(ctx context.Context, vol string) error { return a.o.Volumes.Use(ctx, vol, id) },
		unuse:  func(ctx context.Context, vol string) error { return a.o.Volumes.Unuse(ctx, vol, id) },
	}
	m.kernel = newKernel(id, a.o.Clock, a.log, d, a.belongs)
	d.session = func() *session { return m.kernel.observe("").sess }
	return m
}

func (m *machine) set(want *v1.MachineAssignment) {
	m.mu.Lock()
	same := proto.Equal(m.want, want) && (m.want == nil) == (want == nil)
	if !same {
		// Growth goes on beside a start; only what contradicts it interrupts it.
		if m.interrupt != nil && (want == nil || want.Stopped || want.RestartGeneration != m.want.GetRestartGeneration()) {
			m.interrupt()
		}
		m.want, m.changed = want, true
	}
	m.mu.Unlock()
	if !same {
		m.poke()
	}
}

func (m *machine) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// happened takes an event of the driver.
func (m *machine) happened(e hypervisor.Event) {
	m.mu.Lock()
	switch e.Kind {
	case hypervisor.EventPanic, hypervisor.EventReset:
		m.panicked = true
		fallthrough
	case hypervisor.EventExited:
		if m.interrupt != nil {
			m.interrupt()
		}
	}
	m.mu.Unlock()
	m.poke()
}

// run is the actor. It ends when the machine is gone or ctx ends.
func (m *machine) run(ctx context.Context) {
	defer func() {
		m.kernel.close(nil, "the agent stops")
		m.closeLink()
	}()
	for ctx.Err() == nil {
		wait, done := m.step(ctx)
		if done {
			return
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = m.a.o.Clock.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-m.wake:
		case <-timer:
		}
	}
}

// step compares intent and what is seen, and does what is missing.
func (m *machine) step(ctx context.Context) (time.Duration, bool) {
	soft, cancel := context.WithCancel(ctx)
	defer cancel()
	m.mu.Lock()
	want := m.want
	if m.changed {
		m.changed, m.retryAt = false, time.Time{}
		m.retry.reset()
	}
	m.interrupt = cancel
	m.mu.Unlock()
	want = m.halted(want)
	if left := m.retryAt.Sub(m.a.o.Clock.Now()); left > 0 {
		return left, false
	}
	var wait time.Duration
	var err error
	if want == nil {
		if err = m.remove(ctx); err == nil {
			return 0, true
		}
	} else {
		wait, err = m.reconcile(ctx, soft, want)
	}
	m.mu.Lock()
	m.atRest = err == nil && want.GetStopped()
	m.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return 0, false
	case err == nil:
		m.retryAt, m.message = time.Time{}, ""
		if m.state == v1.MachineState_MACHINE_STATE_RUNNING {
			m.retry.reset()
		}
	case isWait(err):
		m.message = err.Error()
	case soft.Err() != nil:
		m.poke()
		return 0, false
	default:
		wait = m.retry.next(m.a.o.Tuning.RetryDelay, m.a.o.Tuning.RetryDelayMax)
		m.retryAt = m.a.o.Clock.Now().Add(wait)
		m.message = cut(err.Error(), 2048)
		if m.state != v1.MachineState_MACHINE_STATE_UNREACHABLE && m.kernel.observe("").sess == nil {
			m.state = v1.MachineState_MACHINE_STATE_FAILED
			m.kernel.setDown(m.message, true)
		}
		m.log.Warn("machine", "error", err, "retry", wait)
	}
	m.publish(want)
	return wait, false
}

// reconcile is one step towards want.
func (m *machine) reconcile(ctx, soft context.Context, want *v1.MachineAssignment) (time.Duration, error) {
	st, err := m.a.o.Driver.Inspect(ctx, m.id)
	if err != nil && !errdefs.IsNotFound(err) {
		return 0, fmt.Errorf("look at the machine: %w", err)
	}
	m.status = st
	running := err == nil && (st.State == hypervisor.Running || st.State == hypervisor.Paused)
	m.mu.Lock()
	hung, panicked := m.hung, m.panicked
	m.hung, m.panicked = false, false
	m.mu.Unlock()

	if running && st.State == hypervisor.Paused && st.Message != "" && !want.Stopped && want.RestartGeneration <= m.rec.RestartGen {
		// It waits for its disk, and no keep-alive is answered meanwhile: ending it
		// would lose what runs in it. Who asks for a restart gets it.
		m.mu.Lock()
		m.misses = 0
		m.mu.Unlock()
		m.alive, m.state = true, v1.MachineState_MACHINE_STATE_UNREACHABLE
		return m.a.o.Tuning.RetryDelay, waiting("its disk: " + cut(st.Message, 512))
	}
	if running && (hung || panicked) {
		why := "its guest did not answer"
		if panicked {
			why = "its guest's kernel crashed"
		}
		m.a.hub.event(m.newEvent("crash", "reason", why))
		if err := m.kill(ctx, why); err != nil {
			return 0, err
		}
		running, m.rec.Restarts = false, m.rec.Restarts+1
	} else if !running && (m.alive || st.State == hypervisor.Crashed && m.state == v1.MachineState_MACHINE_STATE_UNSPECIFIED) {
		m.crashed(st.Message)
	}
	m.alive = running
	if !running {
		m.down("it does not run")
	}
	if want.Stopped {
		if running {
			if err := m.shutdown(ctx); err != nil {
				return 0, err
			}
			m.a.hub.event(m.newEvent("stop"))
		}
		m.rec.RestartGen = want.RestartGeneration
		m.state = v1.MachineState_MACHINE_STATE_STOPPED
		m.kernel.setDown(m.kernel.String()+" is stopped", true)
		return 0, nil
	}
	if want.RestartGeneration > m.rec.RestartGen {
		if running && m.rec.Started {
			if err := m.shutdown(ctx); err != nil {
				return 0, err
			}
			running = false
		}
		m.rec.RestartGen = want.RestartGeneration
		m.save()
	}
	if left := m.startAt.Sub(m.a.o.Clock.Now()); !running && left > 0 {
		m.state = v1.MachineState_MACHINE_STATE_FAILED
		m.kernel.setDown(m.kernel.String()+" crashed and starts again soon", true)
		return left, nil
	}
	if !running {
		if err := m.start(ctx, soft, want); err != nil {
			return 0, err
		}
	} else if m.kernel.observe("").sess == nil {
		if m.patience.IsZero() { // found running, or its session was lost just now
			m.patience = m.a.o.Clock.Now().Add(m.a.o.Tuning.BootTimeout)
			m.kernel.disks.adopt(m.boot(), st.Disks)
			m.kernel.found()
			m.kernel.wakeAll()
		}
		if err := m.connect(ctx, soft, want); err != nil {
			return 0, err
		}
	}
	return m.tend(ctx, want)
}

// crashed notes an end that nobody asked for. A machine that lived for a while
// starts again at once, one that crashes again and again after growing delays.
func (m *machine) crashed(why string) {
	m.log.Warn("the machine crashed", "message", cut(why, 2048))
	m.a.hub.event(m.newEvent("crash", "reason", cut(why, 512)))
	m.rec.Restarts++
	now := m.a.o.Clock.Now()
	if m.begin.IsZero() || now.Sub(m.begin) >= time.Minute {
		m.crashes.reset()
		return
	}
	m.startAt = now.Add(m.crashes.next(m.a.o.Tuning.RetryDelay, m.a.o.Tuning.RetryDelayMax))
}

// down lets go of the session and the disks of a VMM that is gone.
func (m *machine) down(why string) {
	m.kernel.close(nil, why)
	m.closeLink()
	m.kernel.disks.reset("")
	m.kernel.found()
	m.patience = time.Time{}
}

// kill ends the VMM at once.
func (m *machine) kill(ctx context.Context, why string) error {
	m.log.Warn("the machine is killed", "why", why)
	m.down(why)
	m.alive = false
	if err := m.a.o.Driver.Stop(ctx, m.id, hypervisor.StopOptions{}); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill: %w", err)
	}
	return nil
}

// shutdown ends the machine in order: the guest stops its containers and powers
// off. Containers don't see their ends: they start again with the machine.
func (m *machine) shutdown(ctx context.Context) error {
	m.state = v1.MachineState_MACHINE_STATE_STOPPING
	m.publish(nil)
	t := m.a.o.Tuning
	link := m.link
	m.link = nil
	m.kernel.close(nil, "it is stopping")
	grace, asked := time.Duration(0), false
	if link != nil {
		containers := m.a.longestGrace(m.id)
		call, cancel := context.WithTimeout(ctx, containers+t.ShutdownGrace)
		_, err := link.Guest.Shutdown(call, shutdownRequest(containers))
		cancel()
		if err != nil {
			m.log.Info("the guest was asked to power off", "error", err)
		}
		asked = err == nil
		grace = t.ShutdownGrace
		defer link.Close()
	}
	begin := m.a.o.Clock.Now()
	if err := m.a.o.Driver.Stop(ctx, m.id, hypervisor.StopOptions{Grace: grace}); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("stop: %w", err)
	}
	m.down("it was stopped")
	m.alive = false
	if asked && m.a.o.Clock.Now().Sub(begin) < grace { // it powered itself off
		m.rec.Clean = true
	}
	m.save()
	return nil
}

// remove makes the machine and everything that was made for it be gone. Its
// containers' actors clean up first, as long as the guest answers.
func (m *machine) remove(ctx context.Context) error {
	if m.kernel.observe("").sess != nil && m.kernel.residents() > 0 {
		m.state = v1.MachineState_MACHINE_STATE_STOPPING
		return waiting("its containers to end")
	}
	m.down("it is being removed")
	if err := m.a.o.Driver.Delete(ctx, m.id); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete: %w", err)
	}
	m.kernel.setGone()
	scratch := scratchID(m.id)
	if err := m.a.o.Volumes.Unuse(ctx, scratch, m.id); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("scratch disk: %w", err)
	}
	if err := m.a.o.Volumes.Remove(ctx, scratch); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("scratch disk: %w", err)
	}
	if err := m.a.state.remove("machines/" + m.id + ".json"); err != nil {
		return err
	}
	m.a.hub.event(m.newEvent("destroy"))
	m.a.hub.removeMachine(m.id)
	m.a.dropMachine(m)
	return nil
}

func (m *machine) closeLink() {
	if m.link != nil {
		m.link.Close()
		m.link = nil
	}
}

func (m *machine) save() {
	if err := saveRecord(m.a.state, "machines", m.id, m.rec); err != nil {
		m.log.Error("a machine's record can't be written", "error", err)
	}
}

func (m *machine) newEvent(action string, attrs ...string) *v1.Event {
	m.mu.Lock()
	want := m.want
	m.mu.Unlock()
	e := m.a.newEvent("machine", action, m.id, want.GetName(), want.GetProject())
	for i := 0; i+1 < len(attrs); i += 2 {
		e.Attributes[attrs[i]] = attrs[i+1]
	}
	return e
}

// boot names the VMM's run: the count of starts and its process.
func (m *machine) boot() string { return fmt.Sprintf("%d/%d", m.rec.Boots, m.status.PID) }

// publish tells the hub what is seen now.
func (m *machine) publish(want *v1.MachineAssignment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if want == nil {
		want = m.want
	}
	st := &v1.MachineStatus{
		Id: m.id, State: m.state, StartMethod: m.rec.StartMethod, Restarts: m.rec.Restarts, Message: m.message,
		HostId: m.a.hostID, GuestVersion: m.version, ObservedGeneration: want.GetGeneration(),
	}
	if m.rec.StartTook > 0 {
		st.StartDuration = durationpb.New(m.rec.StartTook)
	}
	switch m.state {
	case v1.MachineState_MACHINE_STATE_RUNNING, v1.MachineState_MACHINE_STATE_UNREACHABLE, v1.MachineState_MACHINE_STATE_STARTING:
		if m.status.PID != 0 {
			st.Pid, st.Accelerator = int64(m.status.PID), m.status.Accelerator
			st.Size = &v1.Size{CpuMilli: int64(m.status.Size.CPUs) * 1000, MemoryBytes: m.status.Size.Memory}
			st.Usage, st.PssBytes = m.usage, m.pss
			if st.Message == "" {
				st.Message = m.resizeGap
			}
			if !m.status.StartedAt.IsZero() {
				st.StartedAt = timestamppb.New(m.status.StartedAt)
			}
		}
	}
	m.a.hub.setMachine(st)
}

var errGone = errors.New("the connection to the guest ended")
