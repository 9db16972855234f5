package guest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/session"
)

// portOpener opens the agent's virtio-serial port for a session.Listener. The
// port stays open from one host to the next; open waits until a host is there.
type portOpener struct {
	name string // of the port
	sys  string // /sys/class/virtio-ports
	f    *os.File
	// broken is set when f failed other than by the host's going.
	broken atomic.Bool
}

func newPortOpener() *portOpener {
	return &portOpener{name: session.PortName, sys: "/sys/class/virtio-ports"}
}

// open returns the stream once a host is connected.
func (p *portOpener) open() (io.ReadWriteCloser, error) {
	if p.f != nil && p.broken.Load() {
		p.f.Close()
		p.f = nil
	}
	if p.f == nil {
		path, err := p.find()
		if err != nil {
			return nil, err
		}
		// Without O_NONBLOCK a read could not be ended.
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("agent port: %w", err)
		}
		p.f = f
		p.broken.Store(false)
	}
	wait := time.Millisecond
	for !p.connected() {
		time.Sleep(wait)
		wait = min(2*wait, 20*time.Millisecond)
	}
	if err := p.f.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return &portStream{p.f, &p.broken}, nil
}

// find looks for the port by its name; the device may still be on its way.
func (p *portOpener) find() (string, error) {
	names, _ := filepath.Glob(filepath.Join(p.sys, "*", "name"))
	for _, n := range names {
		if b, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(b)) == p.name {
			return "/dev/" + filepath.Base(filepath.Dir(n)), nil
		}
	}
	return "", fmt.Errorf("there is no virtio-serial port %q yet", p.name)
}

// connected asks the kernel whether a host is on the other end: POLLHUP says no.
func (p *portOpener) connected() bool {
	rc, err := p.f.SyscallConn()
	if err != nil {
		return true // let the read tell
	}
	up := true
	err = rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
		if _, err := unix.Poll(fds, 0); err == nil {
			up = fds[0].Revents&unix.POLLHUP == 0
		}
	})
	return err != nil || up
}

// portStream is the port while one host is connected.
type portStream struct {
	f      *os.File
	broken *atomic.Bool
}

// Read returns io.EOF when the host is gone.
func (s *portStream) Read(b []byte) (int, error) {
	n, err := s.f.Read(b)
	return n, s.check(err)
}

func (s *portStream) Write(b []byte) (int, error) {
	n, err := s.f.Write(b)
	return n, s.check(err)
}

// check marks the file when it is of no more use, so that the next open is anew.
func (s *portStream) check(err error) error {
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		s.broken.Store(true)
	}
	return err
}

// Close ends reads and writes that wait; the port itself stays open.
func (s *portStream) Close() error { return s.f.SetDeadline(time.Unix(1, 0)) }
