package monitor

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

type stream struct {
	name string
	f    *os.File
}

// stdio is both ends of a process's standard streams.
type stdio struct {
	child   [3]*os.File // for runc; nil entries are /dev/null
	out     []stream    // what the monitor reads
	in      *os.File    // what it writes to; nil without stdin
	console *console    // with a terminal, until it has come
}

// openStdio makes a container's FIFOs. The container's ends of stdout and stderr
// are open for reading too: without a monitor it blocks at worst, never dies of
// SIGPIPE. So is stdin, unless a client's EOF shall reach the process.
func openStdio(dir string, r *StartRequest) (*stdio, error) {
	s := &stdio{}
	if r.TTY {
		var err error
		s.console, err = listenConsole(dir)
		return s, err
	}
	fail := func(err error) (*stdio, error) {
		s.closeChild()
		s.close()
		return nil, fmt.Errorf("pipes of container %s: %w", r.ID, err)
	}
	for i, name := range []string{"stdout", "stderr"} {
		path := filepath.Join(dir, string(rune('1'+i)))
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return fail(err)
		}
		f, err := openFIFO(path, unix.O_RDONLY)
		if err != nil {
			return fail(err)
		}
		s.out = append(s.out, stream{name, f})
		w, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return fail(err)
		}
		s.child[1+i] = w
	}
	if r.Stdin {
		path := filepath.Join(dir, "0")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return fail(err)
		}
		// Open for both first: neither end can then block.
		both, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return fail(err)
		}
		s.child[0] = both
		if s.in, err = openFIFO(path, unix.O_WRONLY); err != nil {
			return fail(err)
		}
		if r.StdinOnce {
			rd, err := os.OpenFile(path, os.O_RDONLY, 0)
			if err != nil {
				return fail(err)
			}
			both.Close()
			s.child[0] = rd
		}
	}
	return s, nil
}

// reopenStdio opens the monitor's ends of pipes that a container holds.
func reopenStdio(dir string, r *StartRequest) *stdio {
	s := &stdio{}
	if r.TTY {
		return s // the terminal went with the monitor that had it
	}
	for i, name := range []string{"stdout", "stderr"} {
		if f, err := openFIFO(filepath.Join(dir, string(rune('1'+i))), unix.O_RDONLY); err == nil {
			s.out = append(s.out, stream{name, f})
		}
	}
	if r.Stdin {
		s.in, _ = openFIFO(filepath.Join(dir, "0"), unix.O_WRONLY) // fails when nobody reads
	}
	return s
}

func openFIFO(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openPipes makes the streams of an exec.
func openPipes(dir string, tty, stdin bool) (*stdio, error) {
	s := &stdio{}
	if tty {
		var err error
		s.console, err = listenConsole(dir)
		return s, err
	}
	for i, name := range []string{"stdout", "stderr"} {
		r, w, err := os.Pipe()
		if err != nil {
			s.closeChild()
			s.close()
			return nil, fmt.Errorf("pipes of an exec: %w", err)
		}
		s.out = append(s.out, stream{name, r})
		s.child[1+i] = w
	}
	if stdin {
		r, w, err := os.Pipe()
		if err != nil {
			s.closeChild()
			s.close()
			return nil, fmt.Errorf("pipes of an exec: %w", err)
		}
		s.child[0], s.in = r, w
	}
	return s, nil
}

func (s *stdio) closeChild() {
	for i, f := range s.child {
		if f != nil {
			f.Close()
			s.child[i] = nil
		}
	}
}

func (s *stdio) close() {
	for _, o := range s.out {
		o.f.Close()
	}
	if s.in != nil {
		s.in.Close()
	}
	if s.console != nil {
		s.console.close()
	}
}

// console receives a terminal's master from runc.
type console struct {
	dir, path string
	l         *net.UnixListener
}

func listenConsole(base string) (*console, error) {
	if len(base) > 80 { // socket names have 107 bytes
		base = ""
	}
	dir, err := os.MkdirTemp(base, "tty")
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		os.RemoveAll(dir)
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return &console{dir, path, l}, nil
}

func (c *console) close() {
	c.l.Close()
	os.RemoveAll(c.dir)
}

func (c *console) accept() (*os.File, error) {
	defer c.close()
	_ = c.l.SetDeadline(time.Now().Add(10 * time.Second))
	uc, err := c.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("terminal from runc: %w", err)
	}
	defer uc.Close()
	_ = uc.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := uc.ReadMsgUnix(buf, oob)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("terminal from runc: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) == 0 {
		return nil, fmt.Errorf("terminal from runc: no descriptor came: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) == 0 {
		return nil, fmt.Errorf("terminal from runc: no descriptor came: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	for _, extra := range fds[1:] {
		unix.Close(extra)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("terminal from runc: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}
