package qemu

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"

	"tandem/internal/hypervisor/qmp"
)

// consoleBacklog is how many bytes wait for a slow reader of a console; then the
// oldest are dropped: nobody may stall a guest by watching it.
const consoleBacklog = 256 << 10

// console shares the one connection to a machine's serial port.
type console struct {
	conn net.Conn
	mu   sync.Mutex
	ends map[*consoleEnd]struct{}
	done bool
}

// Console implements hypervisor.Driver. Any number may be open at once: all see
// the output, all can type.
func (d *Driver) Console(ctx context.Context, id string) (io.ReadWriteCloser, error) {
	m, err := d.find(id)
	if err != nil {
		return nil, err
	}
	if ph, proc := m.phase(); proc == nil || ph != phaseRunning {
		return nil, m.notRunning()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.console != nil {
		if e := m.console.open(); e != nil {
			return e, nil
		}
	}
	conn, err := dial(ctx, filepath.Join(m.runDir(), "console.sock"))
	if err != nil {
		return nil, fmt.Errorf("console of machine %s: %w", id, err)
	}
	m.console = &console{conn: conn, ends: map[*consoleEnd]struct{}{}}
	e := m.console.open()
	go m.console.copy()
	return e, nil
}

// ConsoleLog implements hypervisor.Driver.
func (d *Driver) ConsoleLog(_ context.Context, id string, n int64) ([]byte, error) {
	m, err := d.find(id)
	if err != nil {
		return nil, err
	}
	b, err := tail(m.file("console.log"), n)
	if err == nil && int64(len(b)) < n {
		var before []byte
		before, err = tail(m.file("console.log.1"), n-int64(len(b)))
		b = append(before, b...)
	}
	if err != nil {
		return nil, fmt.Errorf("console log of machine %s: %w", id, err)
	}
	return b, nil
}

// open adds an end; nil when the connection is gone.
func (c *console) open() *consoleEnd {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return nil
	}
	e := &consoleEnd{c: c}
	e.cond = sync.NewCond(&e.mu)
	c.ends[e] = struct{}{}
	return e
}

func (c *console) copy() {
	buf := make([]byte, 16<<10)
	for {
		n, err := c.conn.Read(buf)
		c.mu.Lock()
		for e := range c.ends {
			e.put(buf[:n])
		}
		c.mu.Unlock()
		if err != nil {
			c.close()
			return
		}
	}
}

func (c *console) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = true
	_ = c.conn.Close()
	for e := range c.ends {
		e.end()
	}
	c.ends = map[*consoleEnd]struct{}{}
}

// consoleEnd is one user's console.
type consoleEnd struct {
	c      *console
	mu     sync.Mutex
	cond   *sync.Cond
	buf    []byte
	closed bool
}

func (e *consoleEnd) put(b []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.buf = append(e.buf, b...)
	if over := len(e.buf) - consoleBacklog; over > 0 {
		e.buf = append([]byte(nil), e.buf[over:]...)
	}
	e.cond.Broadcast()
}

func (e *consoleEnd) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.cond.Broadcast()
}

func (e *consoleEnd) Read(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.buf) == 0 {
		if e.closed {
			return 0, io.EOF
		}
		e.cond.Wait()
	}
	n := copy(p, e.buf)
	e.buf = e.buf[n:]
	return n, nil
}

func (e *consoleEnd) Write(p []byte) (int, error) {
	e.mu.Lock()
	closed := e.closed
	e.mu.Unlock()
	if closed {
		return 0, io.ErrClosedPipe
	}
	return e.c.conn.Write(p)
}

func (e *consoleEnd) Close() error {
	e.c.mu.Lock()
	delete(e.c.ends, e)
	last := len(e.c.ends) == 0 && !e.c.done
	if last {
		e.c.done = true
		_ = e.c.conn.Close()
	}
	e.c.mu.Unlock()
	e.end()
	return nil
}

// channel is the connection to the agent's port that counts.
type channel struct {
	net.Conn
	m *machine
}

// Channel implements hypervisor.Driver. The call before it loses its connection.
func (d *Driver) Channel(ctx context.Context, id string) (net.Conn, error) {
	var c *channel
	err := d.with(ctx, id, func(ctx context.Context, m *machine, _ *qmp.Client) error {
		m.mu.Lock()
		before := m.channel
		m.channel = nil
		m.mu.Unlock()
		if before != nil {
			_ = before.Close()
		}
		conn, err := dial(ctx, filepath.Join(m.runDir(), "agent.sock"))
		if err != nil {
			return fmt.Errorf("channel to machine %s: %w", id, err)
		}
		c = &channel{Conn: conn, m: m}
		m.mu.Lock()
		m.channel = c
		m.mu.Unlock()
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}
