package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

// ending is what was heard of a VMM's end before it came.
type ending struct {
	reason string // of QMP's SHUTDOWN event
	panic  bool
}

// supervise follows a running machine until its end or the driver's.
func (m *machine) supervise(sub *qmp.Subscription) {
	m.mu.Lock()
	h, exited := m.proc, m.exited
	m.mu.Unlock()
	m.d.wg.Add(1)
	go func() {
		defer m.d.wg.Done()
		var end ending
		retry := time.NewTicker(holdRetry)
		defer retry.Stop()
		for {
			var events <-chan qmp.Event
			if sub != nil {
				events = sub.C
			}
			select {
			case <-m.d.closed:
				return
			case <-retry.C:
				m.retryHeld()
			case <-h.exit:
				m.drain(sub, &end)
				m.finish(h, exited, end)
				return
			case e, ok := <-events:
				if ok {
					m.heard(e, &end)
					continue
				}
				m.mu.Lock()
				m.monitor = nil
				m.mu.Unlock()
				sub = nil
				select {
				case <-h.exit: // the usual reason: it is about to end
				case <-m.d.closed:
				case <-time.After(500 * time.Millisecond):
					sub = m.reconnect(h)
				}
			}
		}
	}()
}

// drain takes what QEMU said just before it ended.
func (m *machine) drain(sub *qmp.Subscription, end *ending) {
	if sub == nil {
		return
	}
	timeout := time.After(time.Second)
	for {
		select {
		case e, ok := <-sub.C:
			if !ok {
				return
			}
			m.heard(e, end)
		case <-timeout:
			return
		}
	}
}

func (m *machine) heard(e qmp.Event, end *ending) {
	publish := func(k hypervisor.EventKind, msg string) {
		m.d.events.Publish(hypervisor.Event{Machine: m.id, Kind: k, Message: msg})
	}
	switch e.Name {
	case "SHUTDOWN":
		var data struct {
			Reason string `json:"reason"`
		}
		_ = e.Decode(&data)
		end.reason = data.Reason
	case "GUEST_PANICKED":
		if !end.panic {
			end.panic = true
			publish(hypervisor.EventPanic, "guest kernel panic")
		}
	case "RESET":
		publish(hypervisor.EventReset, "")
	case "VSERPORT_CHANGE":
		publish(hypervisor.EventChannel, "")
	case "BLOCK_IO_ERROR":
		m.ioError(e)
	case "STOP", "RESUME":
		m.mu.Lock()
		m.paused = e.Name == "STOP"
		held := m.held != ""
		m.mu.Unlock()
		if held && e.Name == "STOP" {
			publish(hypervisor.EventHeld, "")
		}
	case "MEMORY_DEVICE_SIZE_CHANGE":
		var data struct {
			ID   string `json:"id"`
			Size int64  `json:"size"`
		}
		if e.Decode(&data) == nil && data.ID == "vm0" {
			m.setMemory(baseMemory + data.Size)
		}
	}
}

func (m *machine) setMemory(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.size.Memory = n
}

// reconnect dials the monitor until it answers or the VMM or the driver ends.
func (m *machine) reconnect(h *handle) *qmp.Subscription {
	ctx, stop := withExit(context.Background(), h)
	defer stop()
	go func() {
		select {
		case <-m.d.closed:
			stop()
		case <-ctx.Done():
		}
	}()
	for wait := 10 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 2*time.Second) {
		dctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		q, err := m.connect(dctx)
		if err == nil {
			sub := q.Subscribe()
			if err = m.look(dctx, q); err == nil {
				cancel()
				m.mu.Lock()
				m.monitor = q
				m.mu.Unlock()
				return sub
			}
			_ = q.Close()
		}
		cancel()
		m.d.log.Warn("machine's monitor does not answer", "machine", m.id, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// finish records how a run ended, and cleans up after it.
func (m *machine) finish(h *handle, exited chan struct{}, end ending) {
	m.mu.Lock()
	ph, uid := m.run.Phase, m.run.UID
	m.hangUp()
	m.mu.Unlock()
	outcome, message := m.judge(ph, end)
	if outcome == phaseCrashed && !end.panic && strings.HasPrefix(message, "guest kernel panic") {
		m.d.events.Publish(hypervisor.Event{Machine: m.id, Kind: hypervisor.EventPanic, Message: message})
	}
	if end.reason == "guest-reset" {
		m.d.events.Publish(hypervisor.Event{Machine: m.id, Kind: hypervisor.EventReset, Message: message})
	}
	// The group goes before the record says that the run is over: what a kill
	// leaves in between is a run whose process is dead, which adopt finishes.
	if g := m.d.groups; g != nil {
		if err := g.remove(m.id); err != nil {
			m.d.log.Error("remove cgroup", "machine", m.id, "error", err)
		}
	}
	for _, s := range []string{"qmp.sock", "console.sock", "agent.sock"} {
		_ = os.Remove(filepath.Join(m.runDir(), s))
	}
	_ = os.Remove(m.file("ram"))
	m.d.releaseUser(uid, m.id)
	err := m.change(func(r *run) {
		r.Phase, r.Message = outcome, message
		r.Disks, r.NICs = nil, nil
	})
	if err != nil {
		m.d.log.Error("record the end of a machine", "machine", m.id, "error", err)
	}
	m.mu.Lock()
	if m.proc == h {
		m.proc = nil
	}
	m.size, m.paused, m.held = hypervisor.Size{}, false, ""
	m.exited = nil
	m.mu.Unlock()
	h.close()
	close(exited)
	m.d.log.Info("machine ended", "machine", m.id, "state", outcome, "message", message)
	m.d.events.Publish(hypervisor.Event{Machine: m.id, Kind: hypervisor.EventExited, Message: message})
}

// judge tells a wanted end from a crash.
func (m *machine) judge(ph phase, end ending) (phase, string) {
	if ph == phaseStopping {
		return phaseStopped, ""
	}
	if m.d.groups != nil && m.d.groups.outOfMemory(m.id) {
		return phaseCrashed, "the host killed the VMM: it used more than its memory limit"
	}
	shown, _ := tail(m.file("console.log"), 16<<10)
	if i := strings.LastIndex(string(shown), "Kernel panic"); i >= 0 && end.reason != "guest-shutdown" {
		return phaseCrashed, "guest kernel panic: " + strings.ToValidUTF8(firstLine(string(shown[i:])), "?")
	}
	switch {
	case end.panic || end.reason == "guest-panic":
		return phaseCrashed, "guest kernel panic"
	case end.reason == "guest-shutdown":
		return phaseStopped, "the guest powered itself off"
	case end.reason == "guest-reset":
		return phaseCrashed, "the guest reset itself"
	case end.reason == "host-qmp-quit", end.reason == "host-signal":
		return phaseCrashed, "the VMM was ended from outside (" + end.reason + ")"
	}
	msg := "the VMM died"
	if last := lastWords(m.file("qemu.log")); last != "" {
		msg = fmt.Sprintf("%s; its last words: %s", msg, last)
	}
	return phaseCrashed, msg
}
