package session

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/containerd/errdefs"
)

// Connect begins a session with the guest on the other end of raw and owns raw
// from then on, also when it fails. It waits until the guest answers or ctx
// ends: a machine that still boots answers when its agent is up.
//
// The connection dies at once (reads and writes fail) when the guest's agent is
// restarted, when raw ends, or when the guest breaks the protocol. Close tells
// the guest and closes raw. The returned net.Conn has a method Done() <-chan
// struct{} that is closed at its end.
//
// Errors: DeadlineExceeded or Canceled (ctx), Unavailable (raw ended),
// FailedPrecondition (no common version: the guest image does not fit this
// Tandem), DataLoss (rubbish).
func Connect(ctx context.Context, raw io.ReadWriteCloser) (net.Conn, error) {
	h := &host{id: randomID(), l: newLink(raw), acked: make(chan *conn, 1), failed: make(chan error, 1), hello: make(chan struct{}, 1)}
	h.l.begin()
	go h.read(raw)
	wait := 50 * time.Millisecond
	for {
		h.l.control(frame{typ: typeSync, session: h.id, payload: syncPayload{MinVersion, MaxVersion, Window}.encode()})
		t := time.NewTimer(wait)
		select {
		case c := <-h.acked:
			t.Stop()
			return c, nil
		case err := <-h.failed:
			t.Stop()
			return nil, err
		case <-ctx.Done():
			t.Stop()
			h.l.fail(net.ErrClosed)
			var class error = errdefs.ErrUnavailable
			if ctx.Err() == context.DeadlineExceeded {
				class = context.DeadlineExceeded
			}
			return nil, fmt.Errorf("session: the guest's agent did not answer on its channel: %w: %w", ctx.Err(), class)
		case <-h.hello:
			t.Stop()
		case <-t.C:
			wait = min(2*wait, time.Second)
		}
	}
}

// host is the state of one session on the host's side.
type host struct {
	id       uint64
	l        *link
	c        *conn
	listener uint64 // of the guest's listener that took the session
	acked    chan *conn
	failed   chan error
	hello    chan struct{}
}

// read owns the reading half of raw.
func (h *host) read(raw io.Reader) {
	d := newDecoder(raw)
	for {
		f, err := d.next()
		if err == nil {
			err = h.handle(f, d)
		} else if !errdefs.IsDataLoss(err) {
			err = gone(err)
		}
		if err != nil {
			if h.c != nil {
				h.c.kill(err)
			}
			h.l.fail(err)
			h.failed <- err
			return
		}
	}
}

func (h *host) handle(f frame, d *decoder) error {
	switch {
	case f.typ == typeHello:
		id, ok := decodeU64(f.payload)
		if !ok {
			return nil
		}
		if h.c == nil {
			signal(h.hello) // the guest has just come up: offer again now
			return nil
		}
		if id != h.listener {
			return errPeerRestarted
		}
		if f.session == h.id {
			return errRefused
		}
	case f.session != h.id: // of an earlier session
		d.rubbish += int64(headerSize + len(f.payload))
	case f.typ == typeAck:
		if h.c == nil {
			return h.ack(f, d)
		}
	case h.c != nil:
		return h.c.handle(f)
	}
	return nil
}

func (h *host) ack(f frame, d *decoder) error {
	p, ok := decodeAck(f.payload)
	if !ok {
		return dataLoss("short answer to SYNC")
	}
	if p.version < MinVersion || p.version > MaxVersion {
		return fmt.Errorf("session: the guest speaks versions %d to %d of the channel's protocol, this Tandem %d to %d; build the guest image anew: %w",
			p.minVersion, p.maxVersion, MinVersion, MaxVersion, errdefs.ErrFailedPrecondition)
	}
	h.listener = p.listener
	h.c = newConn(h.id, h.l, "host", p.window)
	h.c.onClose = func() { h.l.closeAfter(net.ErrClosed, 500*time.Millisecond) }
	d.rubbish = 0
	h.acked <- h.c
	return nil
}

// randomID is a number that no other session or listener has.
func randomID() uint64 {
	var b [8]byte
	rand.Read(b[:])
	return binary.BigEndian.Uint64(b[:]) | 1
}
