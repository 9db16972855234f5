// Package qmp is a client of the QEMU Machine Protocol, the JSON line protocol
// with which a QEMU process is driven.
//
//	c, err := qmp.Dial(ctx, "/run/tandem/machines/web/qmp.sock")
//	sub := c.Subscribe()
//	defer sub.Close()
//	err = c.Do(ctx, "device_del", qmp.Args{"id": "disk3"}, nil)
//	ev := <-sub.C // DEVICE_DELETED
//
// One goroutine reads the connection. It never waits for anybody: replies go to
// buffered channels, events to a bounded queue for each subscriber, whose oldest
// entry is dropped (and counted) when the subscriber is too slow. Events are
// hints in QEMU anyway; whoever needs certainty asks the machine again.
//
// A file descriptor that is handed over travels with the first byte of its own
// command (SCM_RIGHTS); writes are serialised so that it can't be mistaken for
// another command's. Messages are bounded by MaxMessage: a QEMU that was taken
// over by its guest can't exhaust the memory of its driver.
//
// All methods may be called from any goroutine.
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Args are the arguments of a command.
type Args map[string]any

// ErrClosed is returned by commands whose connection ended before the answer.
var ErrClosed = errors.New("QMP connection closed")

// eventQueue is how many events wait for a slow subscriber.
const eventQueue = 256

// Client is a connection to one QEMU process.
type Client struct {
	conn    *net.UnixConn
	version Version
	seq     atomic.Uint64
	wmu     sync.Mutex // one command, with its descriptors, at a time

	mu      sync.Mutex
	pending map[string]chan Message
	subs    map[*Subscription]struct{}
	err     error
	done    chan struct{}
}

// Version is what QEMU says of itself in its greeting.
type Version struct {
	Major, Minor, Micro int
	Package             string // distribution's version, may be empty
}

// String is the version as one word, the package's in parentheses.
func (v Version) String() string {
	s := fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	if v.Package != "" {
		s += " (" + v.Package + ")"
	}
	return s
}

// Dial connects to a listening QMP socket, waiting for it to appear until ctx
// ends, and negotiates capabilities.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	for {
		c, err := d.DialContext(ctx, "unix", path)
		if err == nil {
			return New(ctx, c.(*net.UnixConn))
		}
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("connect to QMP socket %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to QMP socket %s: %w", path, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// New speaks QMP on a connection that was made already, and owns it: it is
// closed on error.
func New(ctx context.Context, conn *net.UnixConn) (*Client, error) {
	c := &Client{
		conn:    conn,
		pending: map[string]chan Message{},
		subs:    map[*Subscription]struct{}{},
		done:    make(chan struct{}),
	}
	// The context may end during the greeting: a past deadline wakes the reader.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 64<<10)
	if err := c.greet(r); err != nil {
		stop()
		_ = conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("QMP greeting: %w", err)
	}
	if !stop() {
		_ = conn.Close()
		return nil, fmt.Errorf("QMP greeting: %w", ctx.Err())
	}
	go c.read(r)
	if err := c.Do(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) greet(r *bufio.Reader) error {
	line, err := ReadMessage(r, MaxMessage)
	if err != nil {
		return err
	}
	m, err := Parse(line)
	if err != nil {
		return err
	}
	if m.Greeting == nil {
		return fmt.Errorf("the other side is no QMP server: %.60q", line)
	}
	v := m.Greeting.Version
	c.version = Version{v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro, v.Package}
	return nil
}

// Version is the version of the QEMU at the other side.
func (c *Client) Version() Version { return c.version }

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the connection; commands under way return ErrClosed.
func (c *Client) Close() error { return c.conn.Close() }

// Do runs a command and decodes what it returns into out, unless that is nil.
// A command that QEMU refuses returns an *Error. When ctx ends first, the
// command may still take effect: QMP has no way to call it back.
func (c *Client) Do(ctx context.Context, command string, args Args, out any) error {
	return c.DoWithFiles(ctx, command, args, out)
}

// DoWithFiles is Do with file descriptors handed over ("getfd", "add-fd"). The
// caller keeps its own copies and closes them.
func (c *Client) DoWithFiles(ctx context.Context, command string, args Args, out any, files ...*os.File) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	id := strconv.FormatUint(c.seq.Add(1), 10)
	req := map[string]any{"execute": command, "id": id}
	if len(args) > 0 {
		req["arguments"] = args
	}
	b, err := json.Marshal(req)
	if err != nil {
		return fmt.Errorf("QMP %s: encode arguments: %w", command, err)
	}
	answer := make(chan Message, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, c.err)
	}
	c.pending[id] = answer
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
	}()
	if err := c.write(ctx, append(b, '\n'), files); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-answer:
		return m.result(command, out)
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: %w", command, ctx.Err())
	case <-c.done:
		select { // the answer may have been the connection's last words
		case m := <-answer:
			return m.result(command, out)
		default:
		}
		return fmt.Errorf("QMP %s: %w", command, ErrClosed)
	}
}

// write sends one command. A QEMU that does not read is given until ctx ends;
// then the connection is given up, as half a command can't be taken back.
func (c *Client) write(ctx context.Context, b []byte, files []*os.File) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			_ = c.conn.SetWriteDeadline(time.Time{})
		}
	}()
	var oob []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fd := -1
			rc, err := f.SyscallConn() // unlike Fd(), leaves the file's mode alone
			if err == nil {
				err = rc.Control(func(n uintptr) { fd = int(n) })
			}
			if err != nil {
				return fmt.Errorf("descriptor of %s: %w", f.Name(), err)
			}
			fds[i] = fd
		}
		oob = unix.UnixRights(fds...)
	}
	n, _, err := c.conn.WriteMsgUnix(b, oob, nil)
	runtime.KeepAlive(files)
	if err == nil && n < len(b) {
		_, err = c.conn.Write(b[n:])
	}
	if err != nil {
		if n > 0 {
			_ = c.conn.Close()
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w: %v", ErrClosed, err)
	}
	return nil
}

func (c *Client) read(r *bufio.Reader) {
	var err error
	for {
		var line []byte
		if line, err = ReadMessage(r, MaxMessage); err != nil {
			break
		}
		var m Message
		if m, err = Parse(line); err != nil {
			break // out of step with the other side: nothing can be trusted any more
		}
		c.dispatch(m)
	}
	_ = c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = fmt.Errorf("%w (%v)", ErrClosed, err)
	close(c.done)
	for s := range c.subs {
		close(s.events)
	}
	c.subs = nil
}

func (c *Client) dispatch(m Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Event != "" {
		for s := range c.subs {
			s.push(m.event())
		}
		return
	}
	if ch := c.pending[m.ID]; ch != nil {
		delete(c.pending, m.ID)
		ch <- m // buffered; one answer for each id
	} // else: its caller gave up; the late answer is dropped
}
