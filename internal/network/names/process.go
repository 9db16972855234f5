package names

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/files"
)

// process is the name server that outlives its clients.
type process struct {
	o         Options
	stateFile string
	quit      func()
	log       *slog.Logger

	mu    sync.Mutex
	dns   *Server
	state []byte // as it came
	saved string // why it is not in stateFile; empty if it is
}

// Serve is the name server as a process of its own: it serves the state that a
// client (Apart) last set, whether the client is still there or not, until ctx
// ends, a client asks it to end, or a process with another Options.Identity takes
// over. The state is kept in stateFile, too (on a file system that need not
// survive a boot), so that a process that is killed has a successor that answers
// at once. The socket is for the process's own user alone; beside it lies a lock,
// which makes the process the only one: the second of the same identity returns
// AlreadyExists.
func Serve(ctx context.Context, socket, stateFile string, o Options) error {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	lock, err := openLock(socket)
	if err != nil {
		return fmt.Errorf("name server: %w", err)
	}
	defer lock.Close()
	if err := takeOver(ctx, lock, socket, o); err != nil {
		return err
	}
	err = lock.Truncate(0)
	if err == nil {
		_, err = lock.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	}
	if err != nil {
		return fmt.Errorf("name server: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := &process{o: o, stateFile: stateFile, quit: cancel, log: o.Logger}
	p.restore()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		_ = p.dns.closeWithin(100 * time.Millisecond)
	}()
	_ = os.Remove(socket) // a killed process's; nobody else's, as we have the lock
	l, err := net.Listen("unix", socket)
	if err == nil {
		err = os.Chmod(socket, 0o600)
	}
	if err != nil {
		return fmt.Errorf("name server: listen on %s: %w", socket, err)
	}
	defer l.Close()
	context.AfterFunc(ctx, func() { l.Close() })
	o.Logger.Info("name server runs", "socket", socket, "port", p.dns.Port())
	return p.accept(ctx, l)
}

// takeOver returns with the lock, having ended the process that had it if that is
// another program than this one.
func takeOver(ctx context.Context, lock *os.File, socket string, o Options) error {
	const patience = 5 * time.Second
	for deadline := time.Now().Add(patience); !tryLock(lock); time.Sleep(5 * time.Millisecond) {
		if err := ctx.Err(); err != nil {
			return err
		}
		a, err := ask(socket, askHello, time.Second)
		switch {
		case err == nil && a.Identity == o.Identity:
			return fmt.Errorf("a name server (process %d) serves %s: %w", a.PID, socket, errdefs.ErrAlreadyExists)
		case err == nil:
			o.Logger.Info("taking over from another version's name server", "process", a.PID)
			if _, err := ask(socket, askQuit, time.Second); err == nil && waitLock(lock, patience) {
				return nil
			}
		case time.Now().Before(deadline): // it may just be starting or ending
			continue
		}
		o.Logger.Warn("a name server does not answer; ending it", "socket", socket, "error", err)
		if err := killHolder(lock); err != nil {
			return fmt.Errorf("name server that does not answer: %w", err)
		}
		if waitLock(lock, patience) {
			return nil
		}
		return fmt.Errorf("%s is locked by a process that does not end: %w", lockOf(socket), errdefs.ErrUnavailable)
	}
	return nil
}

// restore serves what the last process did. Whatever is wrong with it, a client
// will set the state anew.
func (p *process) restore() {
	p.dns = New(p.o)
	b, err := os.ReadFile(p.stateFile)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	var spec v1.HostSpec
	if err == nil && len(b) > maxState+64 {
		err = fmt.Errorf("%d bytes: %w", len(b), errdefs.ErrOutOfRange)
	}
	if err == nil {
		err = proto.Unmarshal(b, &spec)
	}
	if err != nil {
		p.log.Warn("name server: the last state can't be read; waiting for the agent's", "file", p.stateFile, "error", err)
		return
	}
	v, err := viewOf(&spec)
	if v == nil {
		p.log.Warn("name server: the last state is wrong; waiting for the agent's", "file", p.stateFile, "error", err)
		return
	}
	// The host's rules lead guests to the port that the last process had.
	if ap, err := netip.ParseAddrPort(p.o.Listen); err == nil && p.o.AnyPort && len(spec.GetPorts()) == 1 {
		if last := uint16(spec.GetPorts()[0].GetHostPort()); last != 0 && last != ap.Port() {
			o := p.o
			o.Listen = netip.AddrPortFrom(ap.Addr(), last).String()
			p.dns = New(o)
		}
	}
	p.dns.Set(v)
	// A process that was killed may take a moment to let go of the port.
	for deadline := time.Now().Add(300 * time.Millisecond); !p.dns.free() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if err := p.dns.Start(); err != nil {
		p.log.Warn("name server: waiting for the agent", "error", err)
		p.dns = New(p.o)
		p.dns.Set(v)
	}
}

func (p *process) accept(ctx context.Context, l net.Listener) error {
	slots := make(chan struct{}, maxClients)
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("name server: %w", err)
			}
			time.Sleep(10 * time.Millisecond) // out of descriptors, maybe
			continue
		}
		select {
		case slots <- struct{}{}:
			go func() {
				defer func() { <-slots }()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				defer c.Close()
				p.talk(c)
			}()
		default:
			c.Close()
		}
	}
}

func (p *process) talk(c net.Conn) {
	for {
		kind, payload, err := readRequest(c)
		if err != nil {
			if errdefs.IsInvalidArgument(err) {
				p.log.Warn("name server: a client does not speak our language", "error", err)
				_ = writeAnswer(c, answer{Identity: p.o.Identity, PID: os.Getpid(), Error: err.Error()})
			}
			return
		}
		a := answer{Identity: p.o.Identity, PID: os.Getpid()}
		if kind == askSet {
			if err := p.set(payload); err != nil {
				a.Error = err.Error()
			}
		}
		p.mu.Lock()
		a.Port = p.dns.Port()
		p.mu.Unlock()
		err = writeAnswer(c, a)
		if kind == askQuit {
			p.log.Info("name server ends: it was asked to")
			p.quit()
			return
		}
		if err != nil || c.SetDeadline(time.Time{}) != nil {
			return
		}
	}
}

// set serves a state, then keeps it.
func (p *process) set(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if bytes.Equal(b, p.state) && p.dns.Port() != 0 && p.saved == "" {
		return nil
	}
	var spec v1.HostSpec
	if err := proto.Unmarshal(b, &spec); err != nil {
		return fmt.Errorf("names: %w", err)
	}
	v, err := viewOf(&spec)
	if v == nil {
		return err
	}
	p.dns.Set(v) // single records that are wrong are the client's to tell
	if err := p.dns.Start(); err != nil {
		return err
	}
	p.state = b
	keep := &v1.HostSpec{Networks: spec.GetNetworks(), Names: spec.GetNames(), Containers: spec.GetContainers(), Ports: []*v1.PublishedPort{{HostPort: uint32(p.dns.Port())}}}
	p.saved = ""
	if b, err = proto.Marshal(keep); err == nil {
		err = files.Replace(p.stateFile, b, 0o600)
	}
	if err != nil {
		p.saved = err.Error()
		return fmt.Errorf("names are served but not kept for the next start: %w", err)
	}
	return nil
}
