package bed

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// Serve answers every TCP connection and UDP datagram on addr with
// "NAME sees CLIENTIP", until the test ends or stop is called. A nil namespace is
// this process's.
func Serve(t testing.TB, n *NS, name, addr string) (stop func()) {
	t.Helper()
	var l net.Listener
	var pc net.PacketConn
	err := n.do(func() (err error) {
		if l, err = net.Listen("tcp4", addr); err == nil {
			pc, err = net.ListenPacket("udp4", addr)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				buf := make([]byte, 1024)
				for { // an echo for each thing said: connections may live on
					if _, err := c.Read(buf); err != nil {
						return
					}
					fmt.Fprintf(c, "%s sees %s\n", name, host)
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			pc.WriteTo(fmt.Appendf(nil, "%s sees %s\n", name, host), from)
		}
	}()
	stop = func() { l.Close(); pc.Close() }
	t.Cleanup(stop)
	return stop
}

func (n *NS) do(fn func() error) error {
	if n == nil {
		return fn()
	}
	return n.Do(fn)
}

// Dial connects from a namespace (nil: this process's).
func Dial(n *NS, network, addr string) (c net.Conn, err error) {
	err = n.do(func() (err error) {
		c, err = net.DialTimeout(network, addr, 3*time.Second)
		return err
	})
	return c, err
}

// Say says something on a connection and returns the answer.
func Say(c net.Conn) (string, error) {
	c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.WriteString(c, "hello\n"); err != nil {
		return "", err
	}
	buf := make([]byte, 1024)
	k, err := c.Read(buf)
	return strings.TrimSpace(string(buf[:k])), err
}

// Ask connects, asks once, and hangs up.
func Ask(n *NS, network, addr string) (string, error) {
	c, err := Dial(n, network, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return Say(c)
}

// MustAsk asks until the answer is want.
func MustAsk(t testing.TB, n *NS, network, addr, want string) {
	t.Helper()
	var got string
	var err error
	for range 5 { // a busy machine may lose the first
		if got, err = Ask(n, network, addr); err == nil && got == want {
			return
		}
		if err == nil {
			break
		}
	}
	t.Errorf("%s %s: got %q, %v; want %q", network, addr, got, err, want)
}

// MustFail expects no answer.
func MustFail(t testing.TB, n *NS, network, addr string) {
	t.Helper()
	got, err := Ask(n, network, addr)
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("%s %s: got %q, %v; want no answer", network, addr, got, err)
	}
}
