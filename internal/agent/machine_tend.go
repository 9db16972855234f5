package agent

import (
	"context"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

// tend looks after a machine that runs and answers: size, prefixes, disks.
func (m *machine) tend(ctx context.Context, want *v1.MachineAssignment) (time.Duration, error) {
	sess := m.kernel.observe("").sess
	if sess == nil || m.link == nil {
		m.poke() // lost while it was being opened
		return 0, nil
	}
	m.state = v1.MachineState_MACHINE_STATE_RUNNING
	m.mu.Lock()
	misses := m.misses
	m.mu.Unlock()
	if misses >= m.a.o.Tuning.UnreachablePings {
		m.state = v1.MachineState_MACHINE_STATE_UNREACHABLE
		return 0, waiting(fmt.Sprintf("its guest, which left %d keep-alives unanswered", misses))
	}
	m.publish(want)
	again, err := m.resize(ctx, want)
	if err != nil {
		return 0, err
	}
	call, cancel := context.WithTimeout(ctx, 2*m.a.o.Tuning.CallTimeout)
	defer cancel()
	if err := m.configureNetwork(call, m.link, want); err != nil {
		return 0, err
	}
	idle, err := m.kernel.disks.sweep(call, sess, false, nil)
	if err != nil {
		m.log.Info("an unused disk stays attached until the next try", "error", err)
	}
	if idle > 0 && (again == 0 || idle < again) {
		again = idle
	}
	return again, nil
}

// wantedSize rounds a machine's wanted size to what the driver can make: whole
// CPUs, memory in steps above the base, within the ceiling.
func wantedSize(want, ceiling *v1.Size, c hypervisor.Capabilities) hypervisor.Size {
	s := hypervisor.Size{CPUs: int((want.GetCpuMilli() + 999) / 1000), Memory: want.GetMemoryBytes()}
	most := c.Max
	if n := int(ceiling.GetCpuMilli() / 1000); n > 0 && (most.CPUs == 0 || n < most.CPUs) {
		most.CPUs = n
	}
	if n := ceiling.GetMemoryBytes(); n > 0 && (most.Memory == 0 || n < most.Memory) {
		most.Memory = n
	}
	if most.CPUs > 0 {
		s.CPUs = min(s.CPUs, most.CPUs)
	}
	s.CPUs = max(s.CPUs, c.Base.CPUs, 1)
	step := max(c.MemoryStep, 1)
	if s.Memory > c.Base.Memory {
		s.Memory = c.Base.Memory + (s.Memory-c.Base.Memory+step-1)/step*step
		for most.Memory > 0 && s.Memory > most.Memory && s.Memory-step >= c.Base.Memory {
			s.Memory -= step
		}
	}
	s.Memory = max(s.Memory, c.Base.Memory)
	return s
}

// resize grows or shrinks the machine to what is wanted. A guest may give back
// less than asked for: it is asked again later.
func (m *machine) resize(ctx context.Context, want *v1.MachineAssignment) (time.Duration, error) {
	caps := m.a.o.Driver.Capabilities()
	size := wantedSize(want.Size, want.Ceiling, caps)
	have := m.status.Size
	if !caps.GrowCPU && size.CPUs > have.CPUs || !caps.ShrinkCPU && size.CPUs < have.CPUs {
		size.CPUs = have.CPUs
	}
	if !caps.GrowMemory && size.Memory > have.Memory || !caps.ShrinkMemory && size.Memory < have.Memory {
		size.Memory = have.Memory
	}
	if size == have {
		m.resized.reset()
		m.resizeAt, m.resizeTo, m.resizeGap = time.Time{}, size, ""
		return 0, nil
	}
	now := m.a.o.Clock.Now()
	if left := m.resizeAt.Sub(now); left > 0 && m.resizeTo == size {
		return left, nil
	}
	call, cancel := context.WithTimeout(ctx, 3*m.a.o.Tuning.CallTimeout)
	defer cancel()
	if size.CPUs < have.CPUs && m.link != nil {
		if _, err := m.link.Guest.OfflineCPUs(call, connect.NewRequest(&v1.OfflineCPUsRequest{Keep: int32(size.CPUs)})); err != nil {
			m.log.Info("the guest keeps its CPUs", "error", err)
		}
	}
	wanted := size
	if size.Memory < have.Memory {
		size.Memory = m.shrinkTo(call, size.Memory, have.Memory, caps.MemoryStep)
	}
	got := have
	var err error
	if size != have {
		got, err = m.a.o.Driver.Resize(call, m.id, size)
	}
	if err != nil {
		return 0, fmt.Errorf("resize to %d CPUs and %d MiB: %w", size.CPUs, size.Memory>>20, err)
	}
	action := "grow"
	if got.CPUs < have.CPUs || got.Memory < have.Memory {
		action = "shrink"
	}
	m.status.Size, m.resizeGap = got, gap(got, wanted)
	if got != have {
		m.a.hub.event(m.newEvent(action, "cpus", fmt.Sprint(got.CPUs), "memory", fmt.Sprint(got.Memory)))
	}
	m.publish(want)
	m.resizeTo = wanted
	if got == wanted {
		m.resized.reset()
		return 0, nil
	}
	most := 2 * time.Minute
	if got.CPUs < wanted.CPUs || got.Memory < wanted.Memory {
		most = 10 * time.Second // somebody needs it
	}
	wait := m.resized.next(2*time.Second, most)
	m.resizeAt = m.a.o.Clock.Now().Add(wait)
	return wait, nil
}

// gap says in words what a machine could not be given, or could not give back, now.
func gap(got, want hypervisor.Size) string {
	var out []string
	add := func(format string, a ...any) { out = append(out, fmt.Sprintf(format, a...)) }
	switch {
	case got.CPUs < want.CPUs:
		add("%d of %d CPUs are there: the emulator has no room for more now", got.CPUs, want.CPUs)
	case got.CPUs > want.CPUs:
		add("the guest keeps %d CPUs, and not %d", got.CPUs, want.CPUs)
	}
	switch {
	case got.Memory < want.Memory:
		add("%d of %d MiB are there: the guest has not taken the rest", got.Memory>>20, want.Memory>>20)
	case got.Memory > want.Memory:
		add("the guest keeps %d MiB, and not %d", got.Memory>>20, want.Memory>>20)
	}
	if out == nil {
		return ""
	}
	return strings.Join(out, "; ") + "; it is tried again"
}

// shrinkReserve is what a guest keeps beside what it uses when it shrinks: taking
// away memory moves pages into the rest, and a kernel without room for them panics.
const shrinkReserve = 96 << 20

// shrinkTo is how far a machine may shrink now: to what is wanted, or to what its
// guest uses and a reserve. A guest that does not tell keeps what it has.
func (m *machine) shrinkTo(ctx context.Context, want, have, step int64) int64 {
	if m.link == nil {
		return have
	}
	res, err := m.link.Guest.Resources(ctx, connect.NewRequest(&v1.GuestResourcesRequest{}))
	if err != nil {
		return have
	}
	free := max(0, res.Msg.GetMemoryAvailableBytes()-shrinkReserve)
	step = max(step, 1)
	return max(want, have-min(free, have)/step*step)
}

// watchSession keeps a session honest: it notices its end, asks the guest
// whether it is alive, and measures now and then.
func (m *machine) watchSession(sess *session, link *GuestLink) {
	t, clock := m.a.o.Tuning, m.a.o.Clock
	defer func() {
		m.kernel.close(sess, "the connection to its guest was lost")
		m.poke()
	}()
	go func() {
		select {
		case <-link.Done:
			m.kernel.close(sess, "the connection to its guest was lost")
			sess.end()
		case <-sess.ctx.Done():
		}
	}()
	var measured time.Time
	for nonce := uint64(1); ; nonce++ {
		select {
		case <-sess.ctx.Done():
			return
		case <-clock.After(t.PingEvery):
		}
		ctx, cancel := context.WithTimeout(sess.ctx, t.PingTimeout)
		res, err := link.Guest.Ping(ctx, connect.NewRequest(&v1.PingRequest{Nonce: nonce}))
		cancel()
		if sess.ctx.Err() != nil {
			return
		}
		if err == nil && res.Msg.Nonce != nonce {
			err = fmt.Errorf("the guest answered ping %d with %d", nonce, res.Msg.Nonce)
		}
		m.mu.Lock()
		before := m.misses
		if err != nil {
			m.misses++
		} else {
			m.misses = 0
		}
		misses := m.misses
		if misses >= t.RestartPings {
			m.hung = true
		}
		m.mu.Unlock()
		if misses >= t.RestartPings {
			m.poke()
			return
		}
		if (misses >= t.UnreachablePings) != (before >= t.UnreachablePings) {
			m.poke()
		}
		if now := clock.Now(); err == nil && now.Sub(measured) >= t.MeasureEvery {
			measured = now
			m.measure(sess, link)
		}
	}
}

// measure takes the machine's memory on the host and its guest's usage.
func (m *machine) measure(sess *session, link *GuestLink) {
	ctx, cancel := context.WithTimeout(sess.ctx, m.a.o.Tuning.CallTimeout)
	defer cancel()
	pss, err := m.a.o.Driver.MemoryUse(ctx, m.id)
	if err != nil {
		pss = 0
	}
	res, err := link.Guest.Resources(ctx, connect.NewRequest(&v1.GuestResourcesRequest{}))
	m.mu.Lock()
	m.pss = pss
	if err == nil {
		m.usage = res.Msg.Usage
	}
	m.mu.Unlock()
	if err == nil {
		m.a.measuredOverhead(res.Msg.OverheadBytes)
	}
	m.poke()
}
