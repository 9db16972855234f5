package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

// adopt brings the driver in step with what an earlier one left: machines that
// run are taken over; all else is finished or removed.
func (d *Driver) adopt(ctx context.Context) error {
	if err := d.sweepState(); err != nil {
		return err
	}
	// Whatever runs in our groups or under our name and is no recorded, fully
	// started machine was being started when its driver was killed.
	keep := map[int]bool{}
	for _, m := range d.machines {
		if m.run.Process.alive(d.host.boot) && (m.run.Phase == phaseRunning || m.run.Phase == phaseStopping) {
			keep[m.run.Process.PID] = true
		}
	}
	for pid, id := range strays(d.host.tag) {
		if !keep[pid] {
			d.log.Warn("kill a VMM that was left half started", "machine", id, "pid", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	if d.groups != nil {
		for _, id := range d.groups.list() {
			if m := d.machines[id]; m != nil && keep[m.run.Process.PID] {
				continue
			}
			if err := d.groups.remove(id); err != nil {
				d.log.Error("remove a left cgroup", "machine", id, "error", err)
			}
		}
	}
	entries, err := os.ReadDir(d.opt.RunDir)
	if err != nil {
		return fmt.Errorf("qemu driver: %w", err)
	}
	for _, e := range entries {
		if d.machines[e.Name()] == nil && e.IsDir() && validID.MatchString(e.Name()) {
			_ = os.RemoveAll(filepath.Join(d.opt.RunDir, e.Name()))
		}
	}
	var wg sync.WaitGroup
	for _, m := range d.machines {
		wg.Add(1)
		go func() {
			defer wg.Done()
			m.adopt(ctx, keep[m.run.Process.PID])
		}()
	}
	wg.Wait()
	return ctx.Err()
}

// sweepState reads the machines' specifications and removes half made or half
// deleted things.
func (d *Driver) sweepState() error {
	root := filepath.Join(d.opt.StateDir, "machines")
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("qemu driver: %w", err)
	}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		var spec hypervisor.MachineSpec
		err := readJSON(filepath.Join(dir, "spec.json"), &spec)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			if err := os.RemoveAll(dir); err != nil {
				return fmt.Errorf("qemu driver: %w", err)
			}
			continue
		case err != nil || spec.ID != e.Name() || !validID.MatchString(spec.ID):
			// Not ours to guess. Keep it for a person to look at, out of the way.
			d.log.Error("a machine's record is damaged: set aside", "machine", e.Name(), "error", err)
			if !strings.HasPrefix(e.Name(), "damaged.") {
				_ = os.Rename(dir, filepath.Join(root, "damaged."+e.Name()))
			}
			continue
		}
		m := newMachine(d, spec)
		m.created = true
		err = readJSON(m.runFile(), &m.run)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Error("the record of a run is damaged: its VMM, if any, is killed", "machine", spec.ID, "error", err)
			m.run = run{Phase: phaseStopped}
		}
		d.machines[spec.ID] = m
		for _, e := range []string{m.stateDir(), m.runDir()} {
			left, _ := filepath.Glob(filepath.Join(e, ".tmp-*"))
			for _, f := range left {
				_ = os.Remove(f)
			}
		}
	}
	left, _ := filepath.Glob(filepath.Join(d.opt.StateDir, "templates", "*"))
	for _, t := range left {
		_, err := os.Stat(filepath.Join(t, "manifest.json"))
		if errors.Is(err, fs.ErrNotExist) || strings.HasPrefix(filepath.Base(t), ".") {
			_ = os.RemoveAll(t)
		}
	}
	return nil
}

// adopt takes one machine over.
func (m *machine) adopt(ctx context.Context, live bool) {
	d := m.d
	if live {
		if h, err := m.run.Process.open(d.host.boot); err == nil {
			m.proc, m.exited = h, make(chan struct{})
			m.size = hypervisor.Size{CPUs: baseCPUs, Memory: baseMemory}
			if d.host.rangeLen > 0 {
				d.mu.Lock()
				d.uids[m.run.UID] = m.id
				d.mu.Unlock()
			}
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			ctx, stop := withExit(ctx, h)
			defer stop()
			var sub *qmp.Subscription
			q, err := m.connect(ctx)
			if err == nil {
				sub = q.Subscribe()
				if err = m.look(ctx, q); err == nil {
					m.monitor = q
				} else {
					_ = q.Close() // closes sub.C: the supervisor dials again
				}
			} else {
				closed := make(chan qmp.Event)
				close(closed)
				sub = &qmp.Subscription{C: closed}
			}
			if err != nil {
				d.log.Warn("machine runs, but its monitor does not answer", "machine", m.id, "error", err)
			}
			m.supervise(sub)
			if m.run.Phase == phaseStopping { // finish what was begun
				_ = h.kill()
			}
			return
		}
	}
	switch m.run.Phase {
	case phaseRunning, phaseStopping: // died while nobody looked
		outcome, message := m.judge(m.run.Phase, ending{})
		if m.run.Process.Boot != d.host.boot {
			outcome, message = phaseStopped, "the host was restarted"
		}
		_ = d.removeTraces(m.id)
		_ = os.Remove(m.file("ram"))
		m.run = run{Phase: outcome, Message: message}
		if err := os.MkdirAll(m.runDir(), 0o700); err == nil {
			_ = writeJSON(m.runFile(), m.run)
		}
	case phaseStarting:
		_ = d.removeTraces(m.id)
		_ = os.Remove(m.file("ram"))
		m.run = run{Phase: phaseStopped}
	}
}

// look asks a VMM that was running without us what it has become.
func (m *machine) look(ctx context.Context, q *qmp.Client) error {
	var st struct {
		Status string `json:"status"`
	}
	if err := q.Do(ctx, "query-status", nil, &st); err != nil {
		return err
	}
	size, err := querySize(ctx, q, m.spec.Ceiling)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.paused = st.Status != "running"
	if st.Status != "io-error" {
		m.held = ""
	} else if m.held == "" {
		m.held = holdReason("", false, "")
	}
	m.size = size
	m.mu.Unlock()
	return m.reconcileDevices(ctx, q)
}
