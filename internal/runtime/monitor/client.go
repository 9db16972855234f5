package monitor

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Client talks to a monitor. Each call uses a connection of its own.
type Client struct {
	socket string
	spawn  func() error

	mu   sync.Mutex
	last time.Time // of the latest spawn
}

// NewClient makes a client of the monitor on socket. spawn, if not nil, starts
// one when none answers; see package spawn. Nothing is dialled yet.
func NewClient(socket string, spawn func() error) *Client {
	return &Client{socket: socket, spawn: spawn}
}

// dial connects, starting a monitor if that is needed and allowed.
func (c *Client) dial(ctx context.Context) (*conn, error) {
	deadline := time.Now().Add(30 * time.Second)
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		nc, err := (&net.Dialer{}).DialContext(ctx, "unix", c.socket)
		if err == nil {
			c.mu.Lock()
			c.last = time.Time{} // it came up: should it go, start the next at once
			c.mu.Unlock()
			return &conn{Conn: nc}, nil
		}
		absent := errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
		if !absent || time.Now().After(deadline) || ctx.Err() != nil {
			return nil, fmt.Errorf("the container monitor does not answer on %s: %w: %w", c.socket, err, errdefs.ErrUnavailable)
		}
		if c.spawn != nil {
			c.mu.Lock()
			if time.Since(c.last) > 5*time.Second {
				c.last = time.Now()
				err = c.spawn()
			} else {
				err = nil
			}
			c.mu.Unlock()
			if err != nil {
				return nil, err
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// open sends a request on a new connection; the connection ends with ctx.
func (c *Client) open(ctx context.Context, r request) (*conn, func(), error) {
	cn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { cn.Close() })
	end := func() { stop(); cn.Close() }
	if err := cn.sendJSON(r); err != nil {
		end()
		return nil, nil, c.broken(ctx, err)
	}
	return cn, end, nil
}

func (c *Client) broken(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if errdefs.IsInvalidArgument(err) {
		return err
	}
	return fmt.Errorf("the container monitor went away: %w: %w", err, errdefs.ErrUnavailable)
}

func (c *Client) call(ctx context.Context, r request) (*response, error) {
	cn, end, err := c.open(ctx, r)
	if err != nil {
		return nil, err
	}
	defer end()
	res, err := recvJSON(cn)
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	return res, res.err()
}

func recvJSON(cn *conn) (*response, error) {
	kind, p, err := cn.recv(nil)
	if err != nil {
		return nil, err
	}
	if kind != frameJSON {
		return nil, fmt.Errorf("unexpected frame %q: %w", kind, errdefs.ErrInternal)
	}
	var r response
	if err := json.Unmarshal(p, &r); err != nil {
		return nil, err
	}
	return &r, nil
}

// Ping returns the monitor's process id.
func (c *Client) Ping(ctx context.Context) (int, error) {
	r, err := c.call(ctx, request{Ping: true})
	if err != nil {
		return 0, err
	}
	return r.PID, nil
}

// Start runs a container and returns when its process runs. When ctx ends
// earlier the start goes on; Watch tells how it went. InvalidArgument means that
// the image or the request is wrong (no such program, no such directory).
func (c *Client) Start(ctx context.Context, s StartRequest) (Status, error) {
	r, err := c.call(ctx, request{Start: &s})
	if err != nil {
		return Status{}, err
	}
	if r.Status == nil {
		return Status{}, fmt.Errorf("start container %s: empty answer: %w", s.ID, errdefs.ErrInternal)
	}
	return *r.Status, nil
}

// Forget drops what the monitor knows of a container that does not run.
func (c *Client) Forget(ctx context.Context, id string) error {
	_, err := c.call(ctx, request{Forget: id})
	return err
}

// Watch calls fn for the status of every container the monitor knows, then
// synced once, then fn for each change, until ctx ends (its error) or the
// connection breaks (Unavailable: call it again).
func (c *Client) Watch(ctx context.Context, fn func(Status), synced func()) error {
	cn, end, err := c.open(ctx, request{Watch: true})
	if err != nil {
		return err
	}
	defer end()
	for {
		r, err := recvJSON(cn)
		if err != nil {
			return c.broken(ctx, err)
		}
		if err := r.err(); err != nil {
			return err
		}
		if r.Status != nil {
			fn(*r.Status)
		}
		if r.Synced && synced != nil {
			synced()
		}
	}
}

// IO is a client's side of Exec and Attach. Nil fields are not connected.
type IO struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Resize         <-chan [2]uint16 // rows, columns
	Signals        <-chan unix.Signal
	Started        func()
}

// Exec runs a process in a container and returns its exit code. Unless Detach is
// set the process is killed when ctx ends.
func (c *Client) Exec(ctx context.Context, r ExecRequest, s IO) (int, error) {
	return c.stream(ctx, request{Exec: &r}, s)
}

// Attach connects to a container's first process until it ends (its exit code)
// or ctx does.
func (c *Client) Attach(ctx context.Context, r AttachRequest, s IO) (int, error) {
	return c.stream(ctx, request{Attach: &r}, s)
}

func (c *Client) stream(ctx context.Context, r request, s IO) (int, error) {
	cn, end, err := c.open(ctx, r)
	if err != nil {
		return 0, err
	}
	defer end()
	done := make(chan struct{})
	defer close(done)
	if s.Stdin != nil {
		go copyInput(cn, s.Stdin)
	}
	go func() {
		for {
			select {
			case <-done:
				return
			case ws, ok := <-s.Resize:
				if !ok {
					s.Resize = nil
					continue
				}
				var b [4]byte
				binary.BigEndian.PutUint16(b[:], ws[0])
				binary.BigEndian.PutUint16(b[2:], ws[1])
				_ = cn.send(frameResize, b[:])
			case sig, ok := <-s.Signals:
				if !ok {
					s.Signals = nil
					continue
				}
				_ = cn.send(frameSignal, []byte{byte(sig)})
			}
		}
	}()
	buf := make([]byte, chunk)
	for {
		kind, p, err := cn.recv(buf)
		if err != nil {
			return 0, c.broken(ctx, err)
		}
		switch kind {
		case frameStdout, frameStderr:
			w := s.Stdout
			if kind == frameStderr {
				w = s.Stderr
			}
			if w != nil {
				if _, err := w.Write(p); err != nil {
					return 0, fmt.Errorf("output to the client: %w", err)
				}
			}
		case frameJSON:
			var res response
			if err := json.Unmarshal(p, &res); err != nil {
				return 0, c.broken(ctx, err)
			}
			if err := res.err(); err != nil {
				return res.Exit, err
			}
			if res.Started && s.Started != nil {
				s.Started()
			}
			if res.Ended {
				return res.Exit, nil
			}
		}
	}
}

func copyInput(cn *conn, r io.Reader) {
	buf := make([]byte, chunk)
	for {
		n, err := r.Read(buf)
		if n > 0 && cn.send(frameStdin, buf[:n]) != nil {
			return
		}
		if err != nil {
			_ = cn.send(frameCloseStdin, nil)
			return
		}
	}
}
