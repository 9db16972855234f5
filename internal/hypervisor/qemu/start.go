package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

// Start implements hypervisor.Driver. A cold start returns when the VMM runs,
// not when the guest has booted; a clone is where its template was.
func (d *Driver) Start(ctx context.Context, id string, o hypervisor.StartOptions) error {
	if o.Template != "" && o.ForTemplate {
		return fmt.Errorf("start machine %s: a clone can't become a template: %w", id, errdefs.ErrInvalidArgument)
	}
	m, err := d.find(id)
	if err != nil {
		return err
	}
	unlock, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if ph, proc := m.phase(); proc != nil && (ph == phaseRunning || ph == phaseStopping) {
		select {
		case <-proc.exit:
			// It has just died by itself: wait until that is dealt with, and start anew.
		default:
			if ph == phaseRunning {
				return nil
			}
		}
	}
	if err := m.awaitEnd(ctx); err != nil {
		return err
	}
	var tmpl *sealed
	if o.Template != "" {
		if tmpl, err = d.loadTemplate(ctx, o.Template); err != nil {
			return fmt.Errorf("start machine %s: %w", id, err)
		}
		if err := tmpl.manifest.fits(m.launch(memoryClone), d.host); err != nil {
			return fmt.Errorf("start machine %s from template %s: %w", id, o.Template, err)
		}
	}
	select {
	case d.starts <- struct{}{}:
		defer func() { <-d.starts }()
	case <-ctx.Done():
		return fmt.Errorf("start machine %s: %w", id, ctx.Err())
	}
	if err := m.start(ctx, o, tmpl); err != nil {
		return fmt.Errorf("start machine %s: %w", id, err)
	}
	d.events.Publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventStarted})
	return nil
}

// startTimeout bounds a start; a loaded host may need some of it.
const startTimeout = 60 * time.Second

// launch is the description of the machine's command line, without descriptors.
func (m *machine) launch(kind memoryKind) launch {
	return launch{
		id: m.id, tag: m.d.host.tag, spec: m.spec, accel: m.d.host.accel,
		tb: m.d.cacheSize(m.spec.Ceiling.CPUs), memory: kind, incoming: kind == memoryClone,
	}
}

// start begins a run. The caller holds ops, and there is no VMM.
func (m *machine) start(ctx context.Context, o hypervisor.StartOptions, tmpl *sealed) (err error) {
	d := m.d
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := d.removeTraces(m.id); err != nil {
		return err
	}
	if err := os.MkdirAll(m.runDir(), 0o700); err != nil {
		return err
	}
	kind := memoryAnonymous
	if o.ForTemplate {
		kind = memoryTemplate
	} else if tmpl != nil {
		kind = memoryClone
	}
	l := m.launch(kind)
	who, release := d.user(m.id)
	err = m.change(func(r *run) {
		*r = run{
			Phase: phaseStarting, UID: who.uid, StartedAt: time.Now().UTC(), Template: o.Template,
			ForTemplate: o.ForTemplate, Accelerator: d.host.accel, QEMU: d.host.version, Hardware: l.digest(),
		}
	})
	if err != nil {
		release()
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		if last := lastWords(m.file("qemu.log")); last != "" && ctx.Err() == nil {
			err = fmt.Errorf("%w; QEMU's last words: %s", err, last)
		}
		m.abandon()
		release()
	}()

	size := hypervisor.Size{CPUs: baseCPUs, Memory: baseMemory}
	if d.groups != nil {
		if err := d.groups.create(m.id, m.limits(size.Memory, size.CPUs)); err != nil {
			return err
		}
	}
	h, err := m.spawn(l, who, tmpl)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.proc, m.exited, m.size, m.paused, m.held = h, make(chan struct{}), size, false, ""
	m.mu.Unlock()

	// Nothing below may wait for a VMM that is gone.
	ctx, stop := withExit(ctx, h)
	defer stop()
	q, err := m.connect(ctx)
	if err != nil {
		return notGone(h, err)
	}
	sub := q.Subscribe()
	if tmpl != nil {
		if err := incoming(ctx, q, tmpl); err != nil {
			_ = q.Close()
			return notGone(h, err)
		}
	}
	if err := m.change(func(r *run) { r.Phase = phaseRunning }); err != nil {
		_ = q.Close()
		return err
	}
	m.mu.Lock()
	m.monitor = q
	m.mu.Unlock()
	m.supervise(sub)
	return nil
}

// spawn makes the sockets and files of a VMM and starts it.
func (m *machine) spawn(l launch, who identity, tmpl *sealed) (*handle, error) {
	d := m.d
	var files []*os.File
	var owned []*os.File
	defer func() {
		for _, f := range owned {
			_ = f.Close()
		}
	}()
	pass := func(fd *int, own bool) func(*os.File, error) error {
		return func(f *os.File, err error) error {
			if err != nil {
				return err
			}
			*fd = 3 + len(files)
			files = append(files, f)
			if own {
				owned = append(owned, f)
			}
			return nil
		}
	}
	logFlags := os.O_WRONLY | os.O_APPEND | os.O_CREATE
	vmmLog, err := os.OpenFile(m.file("qemu.log"), logFlags, 0o600)
	if err != nil {
		return nil, err
	}
	owned = append(owned, vmmLog)
	if err := errors.Join(
		pass(&l.kernelFD, true)(openForAnyone(m.spec.Kernel)),
		pass(&l.initrdFD, true)(openForAnyone(m.spec.Initrd)),
		pass(&l.logFD, true)(os.OpenFile(m.file("console.log"), logFlags, 0o600)),
		pass(&l.qmpFD, true)(listen(filepath.Join(m.runDir(), "qmp.sock"))),
		pass(&l.consoleFD, true)(listen(filepath.Join(m.runDir(), "console.sock"))),
		pass(&l.agentFD, true)(listen(filepath.Join(m.runDir(), "agent.sock"))),
	); err != nil {
		return nil, err
	}
	switch l.memory {
	case memoryTemplate:
		err = pass(&l.ramFD, true)(newMemoryFile(m.file("ram"), who))
	case memoryClone:
		err = pass(&l.ramFD, false)(tmpl.memory, nil)
	}
	if err != nil {
		return nil, err
	}
	pid, err := spawn(spawnRequest{
		path: d.opt.Binary, args: l.args(), files: files, log: vmmLog,
		who: who, groups: d.groups, machine: m.id,
	})
	if err != nil {
		return nil, err
	}
	p, err := identify(pid, d.host.boot)
	if err == nil {
		err = m.change(func(r *run) { r.Process = p })
	}
	var h *handle
	if err == nil {
		h, err = p.open(d.host.boot)
	}
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // ours and not reaped before it ended: the pid is still its own
		return nil, fmt.Errorf("QEMU ended at once: %w", err)
	}
	return h, nil
}

// openForAnyone opens a file such that the VMM's user may open it again through
// /proc/self/fd, as QEMU does: a copy in memory if the file is not for everyone.
func openForAnyone(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if fi.Mode().Perm()&0o004 != 0 {
		return f, nil
	}
	defer f.Close()
	return memoryCopy("tandem-boot", f, fi.Size())
}

// abandon ends a start that failed.
func (m *machine) abandon() {
	m.mu.Lock()
	h := m.proc
	m.hangUp()
	m.proc = nil
	m.mu.Unlock()
	if h != nil {
		_ = h.kill()
		<-h.exit
		h.close()
	}
	if err := m.d.removeTraces(m.id); err != nil {
		m.d.log.Error("clean up after a failed start", "machine", m.id, "error", err)
	}
	_ = os.Remove(m.file("ram"))
	m.mu.Lock()
	m.run = run{Phase: phaseStopped}
	if m.exited != nil {
		close(m.exited)
		m.exited = nil
	}
	m.mu.Unlock()
}

// user picks whom a machine's VMM runs as.
func (d *Driver) user(id string) (who identity, release func()) {
	who = d.host.who
	if d.host.rangeLen == 0 {
		return who, func() {}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := range d.host.rangeLen {
		uid := d.host.rangeFrom + n
		if _, taken := d.uids[uid]; !taken {
			d.uids[uid] = id
			who.uid = uid
			break
		}
	}
	return who, func() { d.releaseUser(who.uid, id) }
}

func (d *Driver) releaseUser(uid uint32, id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.uids[uid] == id {
		delete(d.uids, uid)
	}
}

// connect dials the monitor.
func (m *machine) connect(ctx context.Context) (*qmp.Client, error) {
	conn, err := dial(ctx, filepath.Join(m.runDir(), "qmp.sock"))
	if err != nil {
		return nil, err
	}
	return qmp.New(ctx, conn)
}

func (m *machine) phase() (phase, *handle) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run.Phase, m.proc
}

// withExit is ctx, ended early when the process ends.
func withExit(ctx context.Context, h *handle) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-h.exit:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// notGone replaces an error that came of the VMM's death by that fact.
func notGone(h *handle, err error) error {
	select {
	case <-h.exit:
		return fmt.Errorf("QEMU ended during the start: %w", errdefs.ErrInternal)
	case <-time.After(50 * time.Millisecond):
		return err
	}
}

func isAgain(err error) bool { return errors.Is(err, unix.EAGAIN) }

// lastWords is the end of a log, on one line.
func lastWords(file string) string {
	b, _ := tail(file, 2048)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if len(lines) > 3 {
		lines = lines[len(lines)-3:]
	}
	s := strings.Join(lines, " | ")
	if len(s) > 600 {
		s = s[len(s)-600:]
	}
	return strings.ToValidUTF8(strings.TrimSpace(s), "?")
}
