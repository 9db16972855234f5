package qemu

import (
	"context"
	"fmt"
	"time"

	"tandem/internal/hypervisor/qmp"
)

// A write that finds no space on the host pauses the machine: QEMU keeps the
// request (its default, werror=enospc), and makes it again when the machine is told
// to go on. A guest never sees the error, so no file system in it turns read-only.
// Here the machine is told so, again and again, until the write works.

// holdRetry is how often a machine that waits for its disk is told to go on.
const holdRetry = time.Second

// ioError notes why QEMU is about to pause the machine.
func (m *machine) ioError(e qmp.Event) {
	var data struct {
		Device  string `json:"device"`
		Node    string `json:"node-name"`
		Action  string `json:"action"` // "stop", "report" (the guest sees it), "ignore"
		NoSpace bool   `json:"nospace"`
		Reason  string `json:"reason"`
	}
	if e.Decode(&data) != nil {
		return
	}
	disk := ""
	m.mu.Lock()
	for _, d := range m.run.Disks {
		if d.node() == data.Node || d.node() == data.Device {
			disk = d.Disk.ID
		}
	}
	m.mu.Unlock()
	why := holdReason(disk, data.NoSpace, data.Reason)
	if data.Action != "stop" {
		m.d.log.Warn("a machine's disk", "machine", m.id, "error", why)
		return
	}
	m.mu.Lock()
	first := m.held == ""
	m.held = why
	m.mu.Unlock()
	if first {
		m.d.log.Warn("the machine is paused until its disk can be written again", "machine", m.id, "error", why)
	}
}

// holdReason says what a machine waits for.
func holdReason(disk string, noSpace bool, reason string) string {
	if disk == "" {
		disk = "a disk"
	} else {
		disk = "disk " + disk
	}
	switch {
	case noSpace:
		return fmt.Sprintf("the host has no space left for %s of the machine: it is paused, and goes on by itself when there is some", disk)
	case reason == "":
		reason = "an I/O error"
	}
	return fmt.Sprintf("%s of the machine can't be written (%s): it is paused, and goes on by itself when it can", disk, reason)
}

// retryHeld lets a machine that QEMU paused go on: QEMU makes the write again, and
// pauses it again if that fails. Why a machine is paused is QEMU's word, not what was
// heard: between its error and its pause this may look.
func (m *machine) retryHeld() {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch q := m.monitor; {
	case q == nil, m.retrying:
	case m.paused:
		m.retrying = true
		m.d.wg.Go(func() {
			m.letGoOn(q)
			m.mu.Lock()
			m.retrying = false
			m.mu.Unlock()
		})
	case m.held != "":
		m.held = ""
		m.d.log.Info("the machine goes on: its disk can be written again", "machine", m.id)
	}
}

// letGoOn continues a machine that paused itself, and none that migrates or was
// paused on purpose.
func (m *machine) letGoOn(q *qmp.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var st struct {
		Status string `json:"status"`
	}
	if err := q.Do(ctx, "query-status", nil, &st); err != nil || st.Status != "io-error" {
		return
	}
	m.mu.Lock()
	if m.held == "" {
		m.held = holdReason("", false, "")
	}
	m.mu.Unlock()
	if err := q.Do(ctx, "cont", nil, nil); err != nil {
		m.d.log.Debug("let a paused machine go on", "machine", m.id, "error", err)
	}
}
