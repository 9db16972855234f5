package session

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// seeds for both sides. A fuzzer does not find a CRC by chance: see script.
func seeds(f *testing.F) {
	ok := appendFrame(nil, frame{typ: typeData, session: 7, payload: []byte("hello")})
	f.Add(ok)
	f.Add(append(append([]byte("rubbish"), ok[:20]...), ok...))
	long := appendFrame(nil, frame{typ: typeData, session: 7, payload: make([]byte, MaxPayload)})
	f.Add(append(long[:3000:3000], ok...))
	huge := bytes.Clone(ok)
	binary.BigEndian.PutUint32(huge[20:], 1<<31)
	f.Add(append(huge, ok...))
	f.Add([]byte{1, 0, 5, 4, 0, 3, 4, 1, 2, 3, 5, 1, 6, 0, 2, 9, 4, 200})
}

// FuzzFrames: whatever comes, the decoder ends, holds to its bounds, and finds
// an intact frame after anything that was padded as sides do when they begin.
func FuzzFrames(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, junk []byte) {
		last := frame{typ: typeData, session: 0xC0FFEE, seq: 3, payload: []byte("the last one")}
		b := append(bytes.Clone(junk), make([]byte, maxFrame)...)
		d := newDecoder(bytes.NewReader(appendFrame(b, last)))
		for {
			fr, err := d.next()
			if err != nil {
				t.Fatalf("the frame after the junk was lost: %v", err)
			}
			if len(fr.payload) > MaxPayload {
				t.Fatalf("%d bytes", len(fr.payload))
			}
			if fr.session == last.session && fr.typ == last.typ && fr.seq == last.seq && bytes.Equal(fr.payload, last.payload) {
				return
			}
		}
	})
}

// script turns fuzz bytes into what a hostile peer says: valid frames of any
// kind with odd content, and raw bytes between them.
func script(w io.Writer, in []byte, session uint64) error {
	var seq uint32
	for len(in) >= 2 {
		op, arg := in[0], in[1]
		in = in[2:]
		fr := frame{typ: frameType(op & 7), session: session, seq: seq}
		if op&0x08 != 0 {
			fr.session ^= uint64(arg)
		}
		if op&0x10 != 0 {
			fr.seq += uint32(arg)
		}
		n := min(int(arg), len(in))
		switch fr.typ {
		case 0: // not a frame
			if _, err := w.Write(in[:n]); err != nil {
				return err
			}
			in = in[n:]
			continue
		case typeData:
			fr.payload = bytes.Repeat([]byte{arg}, int(arg)*64)
			if op&0x10 == 0 && fr.session == session {
				seq++
			}
		case typeWindow:
			fr.payload = encodeU64(uint64(arg) << (op >> 4 * 4))
		default:
			fr.payload = in[:n]
			in = in[n:]
		}
		b := appendFrame(nil, fr)
		if op&0x80 != 0 { // cut short
			b = b[:int(arg)%len(b)]
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// FuzzHost: a hostile guest. Connect and the connection end in time, with a
// class that says what happened.
func FuzzHost(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		h, g := net.Pipe()
		go func() {
			defer g.Close()
			d := newDecoder(g)
			sync, err := d.next()
			if err != nil {
				return
			}
			id := sync.session
			go io.Copy(io.Discard, g)
			if len(in) > 0 && in[0]&1 == 0 { // first as it should be
				g.Write(appendFrame(nil, frame{typ: typeAck, session: id,
					payload: ackPayload{version: 1, minVersion: 1, maxVersion: 1, window: Window, listener: 9}.encode()}))
			}
			script(g, in, id)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		c, err := Connect(ctx, h)
		if err == nil {
			go c.Write(make([]byte, 3*Window))
			c.SetDeadline(time.Now().Add(10 * time.Second))
			_, err = io.Copy(io.Discard, c)
			c.Close()
		}
		if err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) && !errors.Is(err, net.ErrClosed) {
			t.Fatalf("ended with %v", err)
		}
	})
}

// FuzzGuest: a hostile host. The listener serves the next one all the same.
func FuzzGuest(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		streams := make(chan net.Conn, 1)
		l := NewListener(func() (io.ReadWriteCloser, error) {
			c, ok := <-streams
			if !ok {
				return nil, io.EOF
			}
			return c, nil
		}, WithBackoff(time.Millisecond))
		defer func() { close(streams); l.Close() }()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(c, c)
					c.Close()
				}()
			}
		}()
		h, g := net.Pipe()
		streams <- g
		go io.Copy(io.Discard, h)
		h.SetWriteDeadline(time.Now().Add(10 * time.Second))
		h.Write(appendFrame(nil, frame{typ: typeSync, session: 5, payload: syncPayload{1, 1, Window}.encode()}))
		script(h, in, 5)
		h.Close()

		h, g = net.Pipe()
		streams <- g
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		c, err := Connect(ctx, h)
		if err != nil {
			t.Fatalf("the next host is not served: %v", err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		go c.Write([]byte("ping"))
		b := make([]byte, 4)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
			t.Fatalf("%q %v", b, err)
		}
	})
}
