package session

import (
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// conn is one session: a net.Conn.
type conn struct {
	id    uint64
	l     *link
	local addr
	// onClose is called once by the own Close, after FIN was queued.
	onClose func()

	readable chan struct{} // capacity 1: something changed for readers
	writable chan struct{} // capacity 1: more was allowed
	wlock    chan struct{} // capacity 1: held by the writer
	rd, wd   *deadline
	dead     chan struct{} // closed once by kill

	mu       sync.Mutex
	err      error // why dead
	fin      bool  // the peer sends no more
	buf      []byte
	taken    uint64 // bytes handed to readers
	received uint64 // bytes that came
	granted  uint64 // total bytes allowed to the peer
	rseq     uint32
	sent     uint64 // bytes sent
	allowed  uint64 // total bytes that the peer allows
	wseq     uint32
}

func newConn(id uint64, l *link, local string, peerWindow uint32) *conn {
	return &conn{
		id: id, l: l, local: addr(local),
		readable: make(chan struct{}, 1), writable: make(chan struct{}, 1), wlock: make(chan struct{}, 1),
		rd: newDeadline(), wd: newDeadline(), dead: make(chan struct{}),
		granted: Window, allowed: uint64(peerWindow),
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// kill ends the connection with err for readers and writers.
func (c *conn) kill(err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	c.err = err
	c.buf = nil
	close(c.dead)
	return true
}

// handle takes a frame of this session. An error ends the session.
func (c *conn) handle(f frame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil
	}
	switch f.typ {
	case typeData:
		if c.fin || f.seq != c.rseq {
			return dataLoss("frame %d came where %d was due", f.seq, c.rseq)
		}
		n := uint64(len(f.payload))
		if c.received+n > c.granted {
			return dataLoss("the peer sent more than it was allowed")
		}
		if n == 0 {
			return dataLoss("empty frame")
		}
		c.rseq++
		c.received += n
		c.buf = append(c.buf, f.payload...) // at most Window bytes: granted is taken+Window
		signal(c.readable)
	case typeWindow:
		limit, ok := decodeU64(f.payload)
		if !ok {
			return dataLoss("short window frame")
		}
		if limit > c.allowed {
			c.allowed = limit
			signal(c.writable)
		}
	case typeFin:
		if f.seq != c.rseq {
			return dataLoss("the peer ended after frame %d, but %d came", f.seq, c.rseq)
		}
		c.fin = true
		signal(c.readable)
	}
	return nil
}

// Read reads what came; io.EOF after the peer has closed in good order.
func (c *conn) Read(p []byte) (int, error) {
	for {
		select {
		case <-c.rd.wait():
			return 0, os.ErrDeadlineExceeded
		default:
		}
		if n, err, ok := c.takeData(p); ok {
			return n, err
		}
		select {
		case <-c.readable:
		case <-c.dead:
		case <-c.rd.wait():
		}
	}
}

func (c *conn) takeData(p []byte) (n int, err error, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.err != nil:
		return 0, c.err, true
	case len(p) == 0:
		return 0, nil, true
	case len(c.buf) > 0:
		n = copy(p, c.buf)
		c.buf = c.buf[n:]
		if len(c.buf) == 0 {
			c.buf = nil
		} else {
			signal(c.readable) // for another reader
		}
		c.taken += uint64(n)
		if c.taken+Window-c.granted >= Window/2 && !c.fin {
			c.granted = c.taken + Window
			c.l.control(frame{typ: typeWindow, session: c.id, payload: encodeU64(c.granted)})
		}
		return n, nil, true
	case c.fin:
		signal(c.readable)
		return 0, io.EOF, true
	}
	return 0, nil, false
}

// Write sends p. It returns when the last frame was handed to the link's
// writer; a deadline bounds the wait for the peer to read.
func (c *conn) Write(p []byte) (int, error) {
	select {
	case c.wlock <- struct{}{}:
		defer func() { <-c.wlock }()
	case <-c.dead:
		return 0, c.reason()
	case <-c.wd.wait():
		return 0, os.ErrDeadlineExceeded
	}
	sent := 0
	for sent < len(p) {
		n, err := c.writeFrame(p[sent:])
		sent += n
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// writeFrame sends at most one frame of p; the caller holds wlock.
func (c *conn) writeFrame(p []byte) (int, error) {
	timeout := c.wd.wait()
	select {
	case <-timeout:
		return 0, os.ErrDeadlineExceeded
	case <-c.dead:
		return 0, c.reason()
	default:
	}
	c.mu.Lock()
	n := min(uint64(len(p)), MaxPayload, c.allowed-c.sent)
	seq := c.wseq
	c.mu.Unlock()
	if n == 0 {
		select {
		case <-c.writable:
		case <-c.dead:
		case <-timeout:
		}
		return 0, nil
	}
	b := appendFrame(getBuffer(), frame{typ: typeData, session: c.id, seq: seq, payload: p[:n]})
	select {
	case c.l.out <- b:
		c.mu.Lock()
		c.wseq++
		c.sent += n
		c.mu.Unlock()
		return int(n), nil
	case <-c.dead:
		return 0, c.reason()
	case <-c.l.dead:
		return 0, c.reason()
	case <-timeout:
		return 0, os.ErrDeadlineExceeded
	}
}

func (c *conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		return errPeerGone
	}
	return c.err
}

// Close tells the peer that no more comes and ends the connection.
func (c *conn) Close() error {
	c.mu.Lock()
	seq := c.wseq
	c.mu.Unlock()
	if c.kill(net.ErrClosed) {
		c.l.control(frame{typ: typeFin, session: c.id, seq: seq})
		if c.onClose != nil {
			c.onClose()
		}
	}
	return nil
}

// Done is closed when the session has ended, for whatever reason.
func (c *conn) Done() <-chan struct{} { return c.dead }

func (c *conn) LocalAddr() net.Addr  { return c.local }
func (c *conn) RemoteAddr() net.Addr { return addr(fmt.Sprintf("session-%016x", c.id)) }

func (c *conn) SetDeadline(t time.Time) error {
	c.rd.set(t)
	c.wd.set(t)
	return nil
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.rd.set(t)
	return nil
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.wd.set(t)
	return nil
}
