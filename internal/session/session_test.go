package session_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/session"
)

const patience = 30 * time.Second

// port is a virtio-serial port: streams of hosts come and go, the guest's end
// stays. Each plug makes a new stream.
type port struct {
	guest chan io.ReadWriteCloser
	quit  chan struct{}
}

func newPort(t *testing.T) *port {
	p := &port{guest: make(chan io.ReadWriteCloser), quit: make(chan struct{})}
	t.Cleanup(func() { close(p.quit) })
	return p
}

func (p *port) open() (io.ReadWriteCloser, error) {
	select {
	case c := <-p.guest:
		return c, nil
	case <-p.quit:
		return nil, io.EOF
	}
}

func (p *port) plug(t *testing.T) net.Conn {
	t.Helper()
	h, g := net.Pipe()
	select {
	case p.guest <- g:
	case <-time.After(patience):
		t.Fatal("the listener does not open the port")
	}
	return h
}

func pair(t *testing.T) (p *port, l *session.Listener, host, guest net.Conn) {
	t.Helper()
	p = newPort(t)
	l = session.NewListener(p.open)
	t.Cleanup(func() { l.Close() })
	host, guest = connect(t, p.plug(t), l)
	return p, l, host, guest
}

func connect(t *testing.T, raw net.Conn, l *session.Listener) (host, guest net.Conn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	host, err := session.Connect(ctx, raw)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	return host, accept(t, l)
}

func accept(t *testing.T, l *session.Listener) net.Conn {
	t.Helper()
	got := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			got <- c
		}
	}()
	select {
	case c := <-got:
		return c
	case <-time.After(patience):
		t.Fatal("no session was accepted")
		return nil
	}
}

// ends asserts that reading c fails soon, and returns why.
func ends(t *testing.T, c net.Conn) error {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, c)
	if err == nil {
		return io.EOF
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection lives on")
	}
	return err
}

func TestCarriesBytesBothWays(t *testing.T) {
	_, _, host, guest := pair(t)
	data := make([]byte, 3<<20+17)
	rand.Read(data)
	want := sha256.Sum256(data)
	for _, d := range []struct {
		name string
		w, r net.Conn
	}{{"host to guest", host, guest}, {"guest to host", guest, host}} {
		got := make(chan [32]byte, 1)
		go func() {
			b := make([]byte, len(data))
			io.ReadFull(d.r, b)
			got <- sha256.Sum256(b)
		}()
		if n, err := d.w.Write(data); err != nil || n != len(data) {
			t.Fatalf("%s: wrote %d: %v", d.name, n, err)
		}
		if <-got != want {
			t.Errorf("%s: other bytes came than were sent", d.name)
		}
	}
}

func TestCloseIsEOFForTheOtherSideAfterItsData(t *testing.T) {
	for _, closer := range []string{"host", "guest"} {
		_, _, host, guest := pair(t)
		a, b := host, guest
		if closer == "guest" {
			a, b = guest, host
		}
		a.Write([]byte("last words"))
		a.Close()
		b.SetReadDeadline(time.Now().Add(patience))
		got, err := io.ReadAll(b)
		if closer == "guest" && (err != nil || string(got) != "last words") {
			t.Errorf("%s closed: %q, %v", closer, got, err)
		}
		if closer == "host" && err == nil && string(got) != "last words" {
			t.Errorf("%s closed: %q", closer, got)
		}
		if _, err := a.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after close: %v", err)
		}
	}
}

func TestHostCanReconnect(t *testing.T) {
	p, l, host, guest := pair(t)
	for range 5 {
		go guest.Write(make([]byte, 1<<20)) // in the middle of traffic
		host.Close()
		if err := ends(t, guest); err == nil {
			t.Fatal("no end")
		}
		host, guest = connect(t, p.plug(t), l)
		go host.Write([]byte("again"))
		b := make([]byte, 5)
		if _, err := io.ReadFull(guest, b); err != nil || string(b) != "again" {
			t.Fatalf("%q %v", b, err)
		}
	}
}

// A host that was killed leaves no end of stream when the next one is quick:
// only its SYNC tells.
func TestNewerSessionReplacesOlderOnTheSameStream(t *testing.T) {
	g, h := net.Pipe()
	streams := make(chan io.ReadWriteCloser, 1)
	streams <- g
	l := session.NewListener(func() (io.ReadWriteCloser, error) { return <-streams, nil })
	defer func() { close(streams); l.Close() }()
	_, guest := connect(t, keepOpen{h}, l)
	_, guest2 := connect(t, keepOpen{h}, l)
	if err := ends(t, guest); !errdefs.IsUnavailable(err) {
		t.Errorf("the older session ended with %v", err)
	}
	_ = guest2
}

type keepOpen struct{ net.Conn }

func (keepOpen) Close() error { return nil }

func TestGuestRestartIsNoticedAtOnce(t *testing.T) {
	_, host1 := restartGuest(t, nil)
	if err := ends(t, host1); !errdefs.IsUnavailable(err) {
		t.Errorf("ended with %v", err)
	}
}

// restartGuest connects over a stream on which then another listener begins,
// after the bytes in between.
func restartGuest(t *testing.T, between []byte) (l2 *session.Listener, host net.Conn) {
	t.Helper()
	h, g := net.Pipe()
	l1 := session.NewListener(func() (io.ReadWriteCloser, error) { return &stop{Conn: g}, nil })
	host, guest := connect(t, h, l1)
	if _, err := guest.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	// The agent is killed: nothing is said on the stream, another one opens it.
	l1.Close()
	g.SetDeadline(time.Now())
	g.SetDeadline(time.Time{})
	if between != nil {
		go g.Write(between)
	}
	once := make(chan struct{}, 1)
	once <- struct{}{}
	l2 = session.NewListener(func() (io.ReadWriteCloser, error) {
		if _, ok := <-once; !ok {
			return nil, io.EOF
		}
		return g, nil
	})
	t.Cleanup(func() { close(once); l2.Close() })
	return l2, host
}

// stop is a stream whose Close leaves the underlying one open.
type stop struct {
	net.Conn
}

func (s *stop) Close() error { return s.Conn.SetDeadline(time.Now()) }

func TestDeadlines(t *testing.T) {
	_, _, host, guest := pair(t)
	host.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := host.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	host.SetReadDeadline(time.Time{})
	host.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	n, err := host.Write(make([]byte, 2*session.Window))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n > session.Window {
		t.Errorf("write to one who does not read: %d, %v", n, err)
	}
	// The session goes on where it was.
	host.SetWriteDeadline(time.Now().Add(patience))
	go host.Write([]byte("end"))
	b := make([]byte, n+3)
	if _, err := io.ReadFull(guest, b); err != nil || string(b[n:]) != "end" {
		t.Errorf("after the deadline: %v", err)
	}
	var ne net.Error
	host.SetReadDeadline(time.Now())
	if _, err := host.Read(b); !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("not a net.Error with Timeout: %v", err)
	}
}

func TestReaderThatSleepsDoesNotHideARestart(t *testing.T) {
	p, l, host, guest := pair(t)
	go func() { // fills the guest's window; nobody reads there
		for {
			if _, err := host.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	}()
	host.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	_ = guest
	connect(t, p.plug2(t, host), l)
}

// plug2 unplugs by closing host first.
func (p *port) plug2(t *testing.T, host net.Conn) net.Conn {
	host.Close()
	return p.plug(t)
}

func TestConnectGivesUpWithItsContext(t *testing.T) {
	h, g := net.Pipe()
	defer g.Close()
	go io.Copy(io.Discard, g) // silence
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Millisecond)
	defer cancel()
	_, err := session.Connect(ctx, h)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent guest: %v", err)
	}
	if _, err := h.Write([]byte{0}); err == nil {
		t.Error("the raw stream was left open")
	}
}

func TestConnectWithAGuestThatIsNotThere(t *testing.T) {
	h, g := net.Pipe()
	g.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := session.Connect(ctx, h); !errdefs.IsUnavailable(err) {
		t.Errorf("closed stream: %v", err)
	}
}

func TestRubbishFromTheGuest(t *testing.T) {
	zeros := make([]byte, 1<<16)
	noise := make([]byte, 1<<16)
	rand.Read(noise)
	magic := bytes.Repeat([]byte{0x9A, 0x7A, 0x4D, 0x5E}, 1<<14)
	huge := append([]byte{0x9A, 0x7A, 0x4D, 0x5E, 4, 1, 0, 0}, binary.BigEndian.AppendUint32(make([]byte, 12), 0xFFFFFFF0)...)
	for name, junk := range map[string][]byte{"zeros": zeros, "noise": noise, "magic": magic, "huge lengths": bytes.Repeat(huge, 1000)} {
		t.Run("endless "+name, func(t *testing.T) {
			h, g := net.Pipe()
			go io.Copy(io.Discard, g)
			go func() {
				for {
					if _, err := g.Write(junk); err != nil {
						return
					}
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if _, err := session.Connect(ctx, h); !errdefs.IsDataLoss(err) {
				t.Errorf("%v", err)
			}
		})
		t.Run("before the hello "+name, func(t *testing.T) {
			h, g := net.Pipe()
			ended := make(chan struct{})
			go func() { g.Write(junk); close(ended) }()
			first := make(chan io.ReadWriteCloser, 1)
			l := session.NewListener(func() (io.ReadWriteCloser, error) {
				<-ended
				select {
				case c := <-first:
					return c, nil
				default:
					return nil, io.EOF
				}
			})
			first <- g
			defer l.Close()
			host, guest := connect(t, h, l)
			go guest.Write([]byte("clean"))
			b := make([]byte, 5)
			if _, err := io.ReadFull(host, b); err != nil || string(b) != "clean" {
				t.Errorf("%q %v", b, err)
			}
		})
	}
}
