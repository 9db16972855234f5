package session

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Listener takes sessions on the guest's side: a net.Listener.
type Listener struct {
	open    func() (io.ReadWriteCloser, error)
	id      uint64
	backoff time.Duration
	onError func(error)

	pending chan *conn // capacity 1: the newest session that nobody accepted yet
	closed  chan struct{}
	once    sync.Once
	ended   chan struct{}

	mu  sync.Mutex
	cur *conn // of the host's newest session; nil: none
	l   *link
}

// Option changes a Listener.
type Option func(*Listener)

// WithErrors has fn called with each error that ends a raw stream (not with the
// end of a session), from the listener's goroutine.
func WithErrors(fn func(error)) Option { return func(l *Listener) { l.onError = fn } }

// WithBackoff sets the longest pause between two attempts to open the stream
// (default 100 ms).
func WithBackoff(d time.Duration) Option { return func(l *Listener) { l.backoff = d } }

// NewListener serves the raw stream that open returns. open is called again
// whenever the stream ends or breaks (a virtio-serial port reads io.EOF while no
// host is connected), and may wait until a host is there.
//
// Accept returns a connection each time the host begins a session. The one
// before is dead by then: reads and writes fail with Unavailable. It dies, too,
// when the stream ends. Close ends the listener and its connection; a host
// notices the next listener on the same port by its HELLO.
func NewListener(open func() (io.ReadWriteCloser, error), opts ...Option) *Listener {
	l := &Listener{open: open, id: randomID(), backoff: 100 * time.Millisecond,
		pending: make(chan *conn, 1), closed: make(chan struct{}), ended: make(chan struct{})}
	for _, o := range opts {
		o(l)
	}
	go l.run()
	return l
}

// Accept waits for the next session; net.ErrClosed after Close.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		select {
		case c := <-l.pending:
			select {
			case <-c.dead: // the host has gone on meanwhile
				continue
			default:
				return c, nil
			}
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
}

// Close ends the listener. It does not wait for open to return.
func (l *Listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.l != nil {
			l.l.fail(net.ErrClosed)
		}
	})
	return nil
}

// Addr is the listener's address, for messages.
func (l *Listener) Addr() net.Addr { return addr("guest") }

func (l *Listener) run() {
	defer close(l.ended)
	wait := time.Millisecond
	for {
		raw, err := l.open()
		if err == nil {
			began := time.Now()
			err = l.serve(raw)
			if time.Since(began) > time.Second {
				wait = time.Millisecond
			}
		}
		l.end(err)
		select {
		case <-l.closed:
			return
		default:
		}
		if l.onError != nil && !errors.Is(err, io.EOF) {
			l.onError(err)
		}
		t := time.NewTimer(wait)
		select {
		case <-l.closed:
			t.Stop()
			return
		case <-t.C:
		}
		wait = min(2*wait, l.backoff)
	}
}

// end kills the session, because its stream has ended.
func (l *Listener) end(err error) {
	l.mu.Lock()
	c := l.cur
	l.cur, l.l = nil, nil
	l.mu.Unlock()
	if c != nil {
		c.kill(gone(err))
	}
}

// serve reads raw until it fails. The writer has ended when it returns.
func (l *Listener) serve(raw io.ReadWriteCloser) error {
	lk := newLink(raw)
	defer func() {
		lk.fail(net.ErrClosed)
		<-lk.done
	}()
	l.mu.Lock()
	l.l = lk
	l.mu.Unlock()
	select {
	case <-l.closed:
		return net.ErrClosed
	default:
	}
	lk.begin()
	lk.control(frame{typ: typeHello, payload: encodeU64(l.id)})
	d := newDecoder(raw)
	var ended uint64 // the last session that is no more, so that it is refused only once
	for {
		f, err := d.next()
		if err != nil {
			return err
		}
		switch f.typ {
		case typeSync:
			l.sync(f, lk, d)
		case typeData, typeWindow, typeFin:
			c := l.cur // written by this goroutine only
			if c == nil || c.id != f.session {
				d.rubbish += int64(headerSize + len(f.payload))
				if f.typ == typeData && f.session != ended {
					ended = f.session
					lk.control(frame{typ: typeHello, session: f.session, payload: encodeU64(l.id)})
				}
				continue
			}
			if err := c.handle(f); err != nil {
				c.kill(err)
				lk.control(frame{typ: typeHello, session: c.id, payload: encodeU64(l.id)})
			}
		}
	}
}

// sync begins a session, or answers again for the one that is.
func (l *Listener) sync(f frame, lk *link, d *decoder) {
	p, ok := decodeSync(f.payload)
	if !ok || f.session == 0 {
		return
	}
	a := ackPayload{minVersion: MinVersion, maxVersion: MaxVersion, window: Window, listener: l.id}
	if v := min(p.maxVersion, MaxVersion); v >= max(p.minVersion, MinVersion) {
		a.version = v
	}
	if c := l.cur; a.version != 0 && (c == nil || c.id != f.session) {
		d.rubbish = 0
		next := newConn(f.session, lk, "guest", p.window)
		l.mu.Lock()
		l.cur = next
		l.mu.Unlock()
		if c != nil {
			c.kill(errReplaced)
		}
		select {
		case <-l.pending:
		default:
		}
		l.pending <- next
	} else if c != nil && c.id == f.session {
		select {
		case <-c.dead: // ended here already: it does not come back
			lk.control(frame{typ: typeHello, session: f.session, payload: encodeU64(l.id)})
			return
		default:
		}
	}
	lk.control(frame{typ: typeAck, session: f.session, payload: a.encode()})
}
