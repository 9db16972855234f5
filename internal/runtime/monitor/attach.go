package monitor

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/runtime/jsonlog"
)

// attach serves one client until the container ends or the client goes. A
// container that never started is waited for: so nothing of its output is missed.
func (s *server) attach(cn *conn, r *AttachRequest) error {
	c, err := s.container(r.ID, true)
	if err != nil {
		return err
	}
	cl := newClient(cn)
	c.outMu.Lock()
	cl.push(frameJSON, mustJSON(response{Started: true}), c.ending)
	if r.Logs {
		if err := c.replay(cl); err != nil {
			c.outMu.Unlock()
			cl.drop()
			return nil
		}
	}
	if st := c.status(); st.State == Exited && c.logw == nil {
		c.outMu.Unlock()
		cl.push(frameJSON, mustJSON(ended(&st)), nil)
		cl.finish()
		<-cl.gone
		return nil
	}
	c.clients[cl] = true
	c.outMu.Unlock()
	defer func() {
		cl.drop() // first: output may be waiting for it
		c.outMu.Lock()
		delete(c.clients, cl)
		c.outMu.Unlock()
	}()
	buf := make([]byte, chunk)
	for {
		kind, p, err := cn.recv(buf)
		if err != nil {
			return nil
		}
		if (kind == frameStdin || kind == frameCloseStdin) && !r.Stdin {
			continue
		}
		c.input(cn, kind, p)
	}
}

// input applies one frame of a client.
func (c *container) input(cn *conn, kind byte, p []byte) {
	// Input may come before the start; wait for it, as long as the client does.
	for c.status().State == "" || c.status().State == Starting {
		time.Sleep(10 * time.Millisecond)
		if !c.s.knows(c) || cn.left() {
			return
		}
	}
	c.mu.Lock()
	in, tty, proc, once := c.stdin, c.tty, c.proc, c.req.StdinOnce
	c.mu.Unlock()
	switch kind {
	case frameStdin:
		if in != nil {
			_, _ = in.Write(p)
		}
	case frameCloseStdin:
		if in == nil || !once {
			return
		}
		if tty != nil {
			_, _ = tty.Write([]byte{4})
			return
		}
		c.mu.Lock()
		c.stdin = nil
		c.mu.Unlock()
		in.Close()
	case frameResize:
		resize(tty, p)
	case frameSignal:
		if proc != nil && len(p) == 1 {
			_ = proc.signal(unix.Signal(p[0]))
		}
	}
}

// replay queues the log and the unfinished lines; the caller holds outMu.
func (c *container) replay(cl *client) error {
	c.mu.Lock()
	path := c.req.LogPath
	c.mu.Unlock()
	if path == "" {
		return nil
	}
	send := func(stream string, p []byte) error {
		if !cl.push(kindOf(stream), p, c.ending) {
			return net.ErrClosed
		}
		return nil
	}
	err := jsonlog.Read(context.Background(), path, jsonlog.Options{Tail: -1}, func(e jsonlog.Entry) error { return send(e.Stream, e.Line) })
	if err != nil || c.logw == nil {
		return err
	}
	for _, s := range []string{"stdout", "stderr"} {
		if p := c.logw.Pending(s); len(p) > 0 {
			if err := send(s, p); err != nil {
				return err
			}
		}
	}
	return nil
}

// endClients tells all clients that the container ended (nil: was removed).
func (c *container) endClients(st *Status) {
	c.outMu.Lock()
	defer c.outMu.Unlock()
	for cl := range c.clients {
		if st != nil {
			cl.push(frameJSON, mustJSON(ended(st)), closed)
		}
		cl.finish()
		delete(c.clients, cl)
	}
}

// ended is the last word to a client: the exit code, or that the start failed.
func ended(st *Status) response {
	r := response{Ended: true, Exit: st.ExitCode}
	if st.Failed {
		f := failure(fmt.Errorf("could not start: %s: %w", st.Message, errdefs.ErrFailedPrecondition))
		r.Error, r.Class = f.Error, f.Class
	}
	return r
}

var closed = func() chan struct{} { ch := make(chan struct{}); close(ch); return ch }()

func kindOf(stream string) byte {
	if stream == "stderr" {
		return frameStderr
	}
	return frameStdout
}

func mustJSON(r response) []byte {
	b, _ := json.Marshal(r) // plain fields always marshal
	return b
}

var execSeq atomic.Uint64

// exec runs a process in a container and serves its one client.
func (s *server) exec(cn *conn, r *ExecRequest) error {
	c, err := s.container(r.ID, false)
	if err != nil {
		return err
	}
	c.mu.Lock()
	req, running := c.req, c.st.State == Running
	c.mu.Unlock()
	if !running {
		return fmt.Errorf("container %s does not run: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	s.cg.Prepare()
	base := filepath.Join(c.dir, "exec-"+strconv.FormatUint(execSeq.Add(1), 10))
	defer func() {
		for _, suffix := range []string{".json", ".pid", ".log"} {
			os.Remove(base + suffix)
		}
	}()
	if err := os.WriteFile(base+".json", r.Process, 0o600); err != nil {
		return fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	io, err := openPipes(c.dir, r.TTY, r.Stdin)
	if err != nil {
		return err
	}
	defer io.close()
	args := []string{"exec", "--detach", "--process", base + ".json", "--pid-file", base + ".pid"}
	if io.console != nil {
		args = append(args, "--console-socket", io.console.path)
	}
	err = runRunc(req.Runc, req.Root, base+".log", append(args, r.ID), io.child[:])
	io.closeChild()
	var tty *os.File
	if err == nil && io.console != nil {
		tty, err = io.console.accept()
		io.console = nil
	}
	var p *process
	if err == nil {
		p, err = readPID(base + ".pid")
	}
	if err != nil {
		if tty != nil {
			tty.Close()
		}
		return fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	os.Remove(base + ".json") // it may hold secrets
	if tty != nil {
		io.out = []stream{{"stdout", tty}}
		if r.Stdin {
			io.in = tty
		}
	}
	_ = cn.sendJSON(response{Started: true})
	s.serveExec(cn, r, p, io, tty)
	return nil
}

func (s *server) serveExec(cn *conn, r *ExecRequest, p *process, io *stdio, tty *os.File) {
	var pumps sync.WaitGroup
	for _, st := range io.out {
		pumps.Go(func() {
			kind := kindOf(st.name)
			buf := make([]byte, chunk)
			for {
				n, err := st.f.Read(buf)
				if n > 0 {
					_ = cn.send(kind, buf[:n]) // a client that went: go on reading
				}
				if err != nil {
					return
				}
			}
		})
	}
	go func() {
		buf := make([]byte, chunk)
		for {
			kind, b, err := cn.recv(buf)
			if err != nil {
				if !r.Detach {
					_ = p.signal(unix.SIGKILL)
				}
				return
			}
			switch {
			case kind == frameStdin && io.in != nil:
				_, _ = io.in.Write(b)
			case kind == frameCloseStdin && tty != nil:
				_, _ = tty.Write([]byte{4})
			case kind == frameCloseStdin && io.in != nil:
				io.in.Close()
			case kind == frameResize:
				resize(tty, b)
			case kind == frameSignal && len(b) == 1:
				_ = p.signal(unix.Signal(b[0]))
			}
		}
	}()
	var late atomic.Bool
	if r.Timeout > 0 {
		t := time.AfterFunc(r.Timeout, func() {
			late.Store(true)
			_ = p.signal(unix.SIGKILL)
		})
		defer t.Stop()
	}
	code, _ := p.wait()
	drained := make(chan struct{})
	go func() { pumps.Wait(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(time.Second): // a child of it holds the pipes
	}
	res := response{Ended: true, Exit: code}
	if late.Load() {
		res.Error, res.Class = fmt.Sprintf("exec in container %s took longer than %v and was killed", r.ID, r.Timeout), "deadline_exceeded"
	}
	_ = cn.sendJSON(res)
}
