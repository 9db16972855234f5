package qemu

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

// machine is one machine. Calls on it hold ops, one at a time, for as long as
// they take; mu guards the fields below it and is never held while waiting.
type machine struct {
	d    *Driver
	id   string
	spec hypervisor.MachineSpec
	ops  chan struct{}

	created bool // under ops: spec.json is written
	gone    bool // under d.mu: deleted

	mu       sync.Mutex
	run      run
	size     hypervisor.Size
	paused   bool
	held     string        // why QEMU paused it by itself; see hold.go
	retrying bool          // it is being told to go on
	proc     *handle       // nil: no VMM
	exited   chan struct{} // closed when the end of proc has been dealt with
	monitor  *qmp.Client   // nil while there is no connection
	console  *console
	channel  *channel
}

func newMachine(d *Driver, spec hypervisor.MachineSpec) *machine {
	return &machine{d: d, id: spec.ID, spec: spec, ops: make(chan struct{}, 1), run: run{Phase: phaseStopped}}
}

func (m *machine) stateDir() string        { return filepath.Join(m.d.opt.StateDir, "machines", m.id) }
func (m *machine) runDir() string          { return filepath.Join(m.d.opt.RunDir, m.id) }
func (m *machine) specFile() string        { return filepath.Join(m.stateDir(), "spec.json") }
func (m *machine) runFile() string         { return filepath.Join(m.runDir(), "run.json") }
func (m *machine) file(name string) string { return filepath.Join(m.stateDir(), name) }

// acquire waits for the machine's turn.
func (m *machine) acquire(ctx context.Context) (func(), error) {
	select {
	case m.ops <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("machine %s is busy: %w", m.id, ctx.Err())
	}
	m.d.mu.Lock()
	gone := m.gone
	m.d.mu.Unlock()
	if gone {
		<-m.ops
		return nil, fmt.Errorf("machine %q: %w", m.id, errdefs.ErrNotFound)
	}
	return func() { <-m.ops }, nil
}

// with runs f on a running machine, alone, with its monitor.
func (d *Driver) with(ctx context.Context, id string, f func(ctx context.Context, m *machine, q *qmp.Client) error) error {
	m, err := d.find(id)
	if err != nil {
		return err
	}
	unlock, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	q, err := m.connected(ctx)
	if err != nil {
		return err
	}
	// A VMM that hangs must not hang us: no single call may take longer.
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err = f(ctx, m, q); errors.Is(err, qmp.ErrClosed) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// callTimeout bounds any call that has no deadline of its own.
const callTimeout = 2 * time.Minute

// connected returns the monitor of a running machine; after a loss it waits for
// the supervisor to connect again.
func (m *machine) connected(ctx context.Context) (*qmp.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		m.mu.Lock()
		q, ph, proc := m.monitor, m.run.Phase, m.proc
		m.mu.Unlock()
		if proc == nil || ph != phaseRunning {
			return nil, m.notRunning()
		}
		if q != nil {
			return q, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("machine %s: its VMM does not answer: %w", m.id, errdefs.ErrUnavailable)
		case <-proc.exit:
			return nil, m.notRunning()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (m *machine) notRunning() error {
	return fmt.Errorf("machine %s does not run: %w", m.id, errdefs.ErrFailedPrecondition)
}

// change alters the record of the run and writes it.
func (m *machine) change(f func(*run)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.run)
	return writeJSON(m.runFile(), m.run)
}

func (m *machine) status() hypervisor.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := hypervisor.Status{Spec: m.spec, State: hypervisor.Stopped, Message: m.run.Message}
	if m.run.Phase == phaseCrashed {
		st.State = hypervisor.Crashed
	}
	if m.proc == nil || m.run.Phase != phaseRunning && m.run.Phase != phaseStopping {
		return st
	}
	st.State = hypervisor.Running
	if m.paused {
		st.State, st.Message = hypervisor.Paused, m.held
	}
	st.Size, st.PID, st.StartedAt = m.size, m.run.Process.PID, m.run.StartedAt
	st.Template, st.Accelerator = m.run.Template, m.run.Accelerator
	for _, d := range m.run.Disks {
		st.Disks = append(st.Disks, d.Disk)
	}
	for _, n := range m.run.NICs {
		st.NICs = append(st.NICs, n.NIC)
	}
	return st
}

// letGo closes all connections to the machine, which goes on.
func (m *machine) letGo() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hangUp()
	if m.proc != nil {
		m.proc.close()
		m.proc = nil
	}
}

// hangUp closes the connections. The caller holds mu.
func (m *machine) hangUp() {
	if m.monitor != nil {
		_ = m.monitor.Close()
		m.monitor = nil
	}
	if m.console != nil {
		m.console.close()
		m.console = nil
	}
	if m.channel != nil {
		_ = m.channel.Close()
		m.channel = nil
	}
}

// memoryLimit is what the machine's control group may use with so much memory.
func (m *machine) limits(memory int64, cpus int) limits {
	l := limits{memory: memory + vmmMemory, shares: 1024 * cpus, pids: m.spec.Ceiling.CPUs + 160}
	if m.d.host.accel == "tcg" {
		l.memory += m.d.cacheSize(m.spec.Ceiling.CPUs)
	}
	return l
}
