// Package monitor is the process beside containers: parent of their first
// processes, owner of their standard streams, logs and exit codes. It lives
// longer than the agent that asks it to start something, and does nothing else,
// so that there is no reason to restart it.
//
// In a guest it runs inside PID 1; on metal it is `tandem monitor`, a process of
// its own session:
//
//	err := monitor.Serve(ctx, monitor.Options{Dir: run + "/monitor", Socket: run + "/monitor.sock"})
//
// The runtime talks to it with a Client:
//
//	c := monitor.NewClient(socket, spawn) // spawn may be nil
//	st, err := c.Start(ctx, monitor.StartRequest{...})
//
// Serve makes its process a subreaper and waits for each process by its own id
// (pidfd + wait4(pid)), never with wait4(-1). A PID 1 that hosts it must not call
// wait4(-1) either: Serve collects orphans by itself (those zombies that no one
// in the process has waited for within seconds), os/exec works as usual.
//
// When the monitor itself dies, containers run on: output goes to FIFOs which
// the containers hold open for reading too, so that nobody gets SIGPIPE; a new
// monitor takes them over and only the exit codes are lost (ExitUnknown).
// Terminals can't be kept: those containers get SIGHUP from the kernel.
package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/runtime/cgroup"
)

// Options say where a monitor lives.
type Options struct {
	Socket string // unix socket it listens on; at most 107 bytes
	Dir    string // its state: pipes, requests, exit codes. On a file system that does not survive a boot
	Logger *slog.Logger
	Now    func() time.Time // nil = time.Now
	// Ready is called once, when the socket answers. May be nil.
	Ready func()
}

type server struct {
	o   Options
	cg  *cgroup.Layout
	log *slog.Logger

	mu       sync.Mutex
	ctrs     map[string]*container
	watchers map[chan Status]bool
}

var idPattern = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}$`)

// Serve runs the monitor until ctx ends; containers then run on. It returns
// AlreadyExists if another monitor holds the directory.
func Serve(ctx context.Context, o Options) error {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	cg, err := cgroup.Detect()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return fmt.Errorf("monitor: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(o.Dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("monitor: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another monitor serves %s: %w", o.Dir, errdefs.ErrAlreadyExists)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("monitor: become a subreaper: %w", err)
	}
	s := &server{o: o, cg: cg, log: o.Logger, ctrs: map[string]*container{}, watchers: map[chan Status]bool{}}
	s.adopt()
	_ = os.Remove(o.Socket)
	l, err := net.Listen("unix", o.Socket)
	if err == nil {
		err = os.Chmod(o.Socket, 0o600)
	}
	if err != nil {
		return fmt.Errorf("monitor: listen on %s: %w", o.Socket, err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { l.Close() })
	go reapOrphans(ctx, s.log)
	go s.watchOOM(ctx)
	if o.Ready != nil {
		o.Ready()
	}
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("monitor: %w", err)
			}
			s.log.Warn("monitor: accept", "error", err)
			time.Sleep(50 * time.Millisecond) // out of descriptors: let some go
			continue
		}
		go s.serve(ctx, &conn{Conn: c})
	}
}

// serve answers one connection: one request each.
func (s *server) serve(ctx context.Context, c *conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	if !trusted(c.Conn) {
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
	kind, p, err := c.recv(nil)
	if err != nil || kind != frameJSON {
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	var r request
	if err := json.Unmarshal(p, &r); err != nil {
		_ = c.sendJSON(failure(fmt.Errorf("monitor: request: %w: %w", err, errdefs.ErrInvalidArgument)))
		return
	}
	switch {
	case r.Ping:
		_ = c.sendJSON(response{PID: os.Getpid()})
	case r.Start != nil:
		st, err := s.start(r.Start)
		if err != nil {
			_ = c.sendJSON(failure(err))
			return
		}
		_ = c.sendJSON(response{Status: st})
	case r.Exec != nil:
		if err := s.exec(c, r.Exec); err != nil {
			_ = c.sendJSON(failure(err))
		}
	case r.Attach != nil:
		if err := s.attach(c, r.Attach); err != nil {
			_ = c.sendJSON(failure(err))
		}
	case r.Watch:
		s.watch(ctx, c)
	case r.Forget != "":
		if err := s.forget(r.Forget); err != nil {
			_ = c.sendJSON(failure(err))
			return
		}
		_ = c.sendJSON(response{})
	default:
		_ = c.sendJSON(failure(fmt.Errorf("monitor: unknown request; is the monitor older than the agent?: %w", errdefs.ErrInvalidArgument)))
	}
}

// trusted is true for processes of root or of the monitor's own user.
func trusted(c net.Conn) bool {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil || cerr != nil {
		return false
	}
	return cred.Uid == 0 || int(cred.Uid) == os.Geteuid()
}

// container finds or makes the entry of an id.
func (s *server) container(id string, make bool) (*container, error) {
	if !idPattern.MatchString(id) {
		return nil, fmt.Errorf("container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.ctrs[id]
	if c == nil {
		if !make {
			return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
		}
		c = &container{s: s, id: id, dir: filepath.Join(s.o.Dir, id), clients: map[*client]bool{}}
		s.ctrs[id] = c
	}
	return c, nil
}

// knows is false when a container was forgotten; its id may be another's now.
func (s *server) knows(c *container) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ctrs[c.id] == c
}

// forget drops what is known of a container that does not run.
func (s *server) forget(id string) error {
	c, err := s.container(id, false)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	}
	c.startMu.Lock()
	defer c.startMu.Unlock()
	st := c.status()
	if st.State == Running || st.State == Starting {
		return fmt.Errorf("container %s runs: %w", id, errdefs.ErrFailedPrecondition)
	}
	s.mu.Lock()
	delete(s.ctrs, id)
	s.mu.Unlock()
	c.endClients(nil)
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("forget container %s: %w", id, err)
	}
	s.publish(Status{ID: id, State: Gone, Run: st.Run})
	return nil
}

// publish tells all watchers; one that does not listen is dropped and will
// connect and ask for everything again.
func (s *server) publish(st Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ch := range s.watchers {
		select {
		case ch <- st:
		default:
			delete(s.watchers, ch)
			close(ch)
		}
	}
}

func (s *server) watch(ctx context.Context, c *conn) {
	ch := make(chan Status, 1024)
	s.mu.Lock()
	s.watchers[ch] = true
	var all []*container
	for _, ctr := range s.ctrs {
		all = append(all, ctr)
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, ch)
		s.mu.Unlock()
	}()
	for _, ctr := range all {
		if st := ctr.status(); st.State != "" {
			if c.sendJSON(response{Status: &st}) != nil {
				return
			}
		}
	}
	if c.sendJSON(response{Synced: true}) != nil {
		return
	}
	gone := make(chan struct{})
	go func() { // the client never sends: a read ends when it goes
		defer close(gone)
		_, _, _ = c.recv(nil)
	}()
	for {
		select {
		case st, ok := <-ch:
			if !ok || c.sendJSON(response{Status: &st}) != nil {
				return
			}
		case <-gone:
			return
		case <-ctx.Done():
			return
		}
	}
}
