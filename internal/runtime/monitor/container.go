package monitor

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/runtime/jsonlog"
)

// container is one id: the latest start and the clients attached to it.
type container struct {
	s   *server
	id  string
	dir string

	startMu sync.Mutex // one start, clean-up or forget at a time

	mu    sync.Mutex
	req   StartRequest
	st    Status
	proc  *process
	stdin *os.File // write end, or the terminal
	tty   *os.File

	outMu   sync.Mutex // orders the log and what clients see
	logw    *jsonlog.Writer
	logWarn time.Time
	ending  chan struct{} // closed when the process is gone and clients must not be waited for
	clients map[*client]bool
}

func (c *container) status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st
}

func (c *container) set(st Status) {
	c.note(st)
	c.s.publish(st)
}

// note is set for who asks: watchers are told later.
func (c *container) note(st Status) {
	c.mu.Lock()
	c.st = st
	c.mu.Unlock()
}

const (
	fileStart = "start.json"
	fileExit  = "exit.json"
	filePID   = "pid"
)

// start runs the container's first process. A repeated request is answered with
// what the first one did.
func (s *server) start(r *StartRequest) (*Status, error) {
	if !filepath.IsAbs(r.Runc) || !filepath.IsAbs(r.Root) || !filepath.IsAbs(r.Bundle) || !filepath.IsAbs(r.LogPath) || len(r.Cgroup) < 2 || r.Cgroup[0] != '/' {
		return nil, fmt.Errorf("monitor: start of %s: paths must be absolute: %w", r.ID, errdefs.ErrInvalidArgument)
	}
	c, err := s.container(r.ID, true)
	if err != nil {
		return nil, err
	}
	c.startMu.Lock()
	defer c.startMu.Unlock()
	st := c.status()
	if st.Run == r.Run && st.State != "" && !st.Failed {
		return &st, nil
	}
	if st.State == Running || st.State == Starting {
		return nil, fmt.Errorf("container %s runs already: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	s.cg.Prepare()
	c.mu.Lock()
	c.req = *r
	c.mu.Unlock()
	// The directory is there from the first start on, until the container is forgotten.
	if err := os.Mkdir(c.dir, 0o700); errors.Is(err, os.ErrExist) {
		if err := c.clear(); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	if err := writeJSON(filepath.Join(c.dir, fileStart), r); err != nil {
		return nil, err
	}
	c.set(Status{ID: r.ID, Run: r.Run, State: Starting})
	if err := c.launch(r); err != nil {
		c.failed(r, err.Error())
		return nil, err
	}
	st = c.status()
	return &st, nil
}

// failed records that a start did not work; nothing of it is left.
func (c *container) failed(r *StartRequest, why string) {
	if err := c.clear(); err != nil {
		c.s.log.Error("clean up after a failed start", "container", c.id, "error", err)
	}
	st := Status{ID: r.ID, Run: r.Run, State: Exited, ExitCode: ExitUnknown, Failed: true, Message: why, FinishedAt: c.s.o.Now()}
	if err := writeJSON(filepath.Join(c.dir, fileExit), st); err != nil {
		c.s.log.Error("keep a failed start", "container", c.id, "error", err)
	}
	c.set(st)
	c.endClients(&st)
}

// clear removes what an earlier run left: processes, cgroup, runc's state, pipes.
func (c *container) clear() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	g := c.s.cg.Group(c.req.Cgroup)
	if err := g.Kill(ctx); err != nil {
		return err
	}
	if err := g.Remove(ctx); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(c.req.Root, c.id)); err != nil {
		return fmt.Errorf("state of container %s: %w", c.id, err)
	}
	// A runc that was killed leaves the pid's file under its first name, and the
	// next one would not write over it.
	for _, f := range []string{"." + filePID, filePID, fileExit, "runc.log", "0", "1", "2"} {
		if err := os.Remove(filepath.Join(c.dir, f)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("state of container %s: %w", c.id, err)
		}
	}
	return nil
}

// launch makes the pipes and runs `runc run --detach`.
func (c *container) launch(r *StartRequest) error {
	logw, err := jsonlog.NewWriter(r.LogPath, r.LogMaxSize, r.LogMaxFiles)
	if err != nil {
		return err
	}
	io, err := openStdio(c.dir, r)
	if err != nil {
		logw.Close()
		return err
	}
	args := []string{"run", "--detach", "--bundle", r.Bundle, "--pid-file", filepath.Join(c.dir, filePID)}
	if io.console != nil {
		args = append(args, "--console-socket", io.console.path)
	}
	started := c.s.o.Now()
	began := time.Now()
	err = runRunc(r.Runc, r.Root, filepath.Join(c.dir, "runc.log"), append(args, c.id), io.child[:])
	took := time.Since(began)
	io.closeChild()
	var tty *os.File
	if err == nil && io.console != nil {
		tty, err = io.console.accept()
	}
	var p *process
	if err == nil {
		p, err = readPID(filepath.Join(c.dir, filePID))
	}
	if err != nil {
		io.close()
		logw.Close()
		return fmt.Errorf("start container %s: %w", c.id, err)
	}
	if tty != nil {
		io.out, io.in = []stream{{"stdout", tty}}, tty
	}
	awaitExec(p, r.Runc, took)
	c.run(p, io, tty, logw, Status{ID: c.id, Run: r.Run, State: Running, PID: p.pid, StartedAt: started})
	return nil
}

// These bound awaitExec: a program on a disk that does not answer is called
// running although its first page has not come, and so is one that hides its
// arguments.
const (
	execWait   = 5 * time.Second
	noArgsWait = 100 * time.Millisecond
)

// awaitExec waits until a process is the container's program (or has ended):
// `runc run` comes back when its init is about to become it, and whoever looks
// or pauses then would meet runc, or a program without its arguments. What runc took
// says how fast this computer is: looking too early takes the processor from the one
// that is waited for.
func awaitExec(p *process, runc string, took time.Duration) {
	if p.endsWithin(min(took/64, 20*time.Millisecond)) {
		return
	}
	before := []byte(runc + "\x00init\x00")
	cmdline := filepath.Join("/proc", strconv.Itoa(p.pid), "cmdline")
	noArgs := time.Duration(0)
	for waited, wait := time.Duration(0), 500*time.Microsecond; waited < execWait && noArgs < noArgsWait; waited, wait = waited+wait, min(2*wait, 20*time.Millisecond) {
		look := time.Now()
		b, err := os.ReadFile(cmdline)
		wait = max(wait, 3*time.Since(look)) // where looking is slow it keeps others from running
		if err != nil || len(b) > 0 && !bytes.Equal(b, before) {
			return
		}
		if len(b) == 0 {
			noArgs += wait
		}
		if p.endsWithin(wait) {
			return
		}
	}
}

// run begins to serve a running process.
func (c *container) run(p *process, io *stdio, tty *os.File, logw *jsonlog.Writer, st Status) {
	c.outMu.Lock()
	c.logw, c.ending = logw, make(chan struct{})
	ending := c.ending
	c.outMu.Unlock()
	c.mu.Lock()
	c.proc, c.stdin, c.tty = p, io.in, tty
	c.mu.Unlock()
	c.set(st)
	var pumps sync.WaitGroup
	for _, s := range io.out {
		pumps.Go(func() { c.pump(s) })
	}
	go c.reap(p, io, &pumps, ending, st)
}

func (c *container) pump(s stream) {
	buf := make([]byte, chunk)
	for {
		n, err := s.f.Read(buf)
		if n > 0 {
			c.output(s.name, buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// output logs a piece and hands it to all clients. A client that is connected and
// does not read holds the container up after a while, as a terminal would.
func (c *container) output(name string, p []byte) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	now := c.s.o.Now()
	if err := c.logw.Write(name, p, now); err != nil && now.Sub(c.logWarn) > time.Minute {
		c.logWarn = now
		c.s.log.Warn("output is lost", "container", c.id, "error", err)
	}
	for cl := range c.clients {
		if !cl.push(kindOf(name), p, c.ending) {
			delete(c.clients, cl)
		}
	}
}

// clearDelay is when an ended container's leavings are cleared: after those who wait
// for its end have had the processor.
const clearDelay = 50 * time.Millisecond

// reap waits for the end and records it.
func (c *container) reap(p *process, io *stdio, pumps *sync.WaitGroup, ending chan struct{}, st Status) {
	code, known := p.wait()
	st.State, st.ExitCode, st.FinishedAt = Exited, code, c.s.o.Now()
	if !known {
		st.Message = "it ended while its monitor was being replaced: the exit code is not known"
	}
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(2 * time.Second): // someone outside holds the pipes, or a client does not read
	}
	close(ending)
	io.close()
	<-drained
	c.mu.Lock()
	c.proc, c.stdin, c.tty = nil, nil, nil
	root, group := c.req.Root, c.s.cg.Group(c.req.Cgroup)
	c.mu.Unlock()
	st.OOMKills = group.OOMKills()
	c.outMu.Lock()
	if err := errors.Join(c.logw.Flush(c.s.o.Now()), c.logw.Close()); err != nil {
		c.s.log.Warn("output is lost", "container", c.id, "error", err)
	}
	c.logw = nil
	c.outMu.Unlock()
	if err := writeJSON(filepath.Join(c.dir, fileExit), st); err != nil {
		c.s.log.Error("keep an exit code", "container", c.id, "error", err)
	}
	c.note(st)
	c.endClients(&st) // first: somebody may sit before it
	c.s.publish(st)

	// What is left can wait until the exit is known; a start meanwhile clears too.
	time.Sleep(clearDelay)
	c.startMu.Lock()
	defer c.startMu.Unlock()
	if now := c.status(); now.Run != st.Run || now.State != Exited || !c.s.knows(c) {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := errors.Join(group.Kill(ctx), group.Remove(ctx), os.RemoveAll(filepath.Join(root, c.id)))
	if err != nil {
		c.s.log.Warn("clean up after a container", "container", c.id, "error", err)
	}
}

// writeJSON replaces a file in one step.
func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		err = os.WriteFile(path+".new", b, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("monitor's state: %w", err)
	}
	return nil
}

func resize(tty *os.File, p []byte) {
	if tty == nil || len(p) != 4 {
		return
	}
	ws := unix.Winsize{Row: binary.BigEndian.Uint16(p), Col: binary.BigEndian.Uint16(p[2:])}
	if rc, err := tty.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &ws) })
	}
}
