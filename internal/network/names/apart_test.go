package names

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/spawn"
)

// The test binary is the process, too.
func TestMain(m *testing.M) {
	if len(os.Args) == 6 && os.Args[1] == "serve-names" {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		err := Serve(context.Background(), os.Args[2], os.Args[3], Options{Listen: os.Args[4], AnyPort: true, Identity: os.Args[5], Logger: log})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// apart is where a test's process lives.
type apart struct {
	dir, addr string
}

func newApart(t *testing.T) *apart {
	t.Helper()
	dir, err := os.MkdirTemp("", "names") // short: paths of sockets are
	if err != nil {
		t.Fatal(err)
	}
	x := &apart{dir: dir, addr: ownAddr()}
	t.Cleanup(func() {
		if err := x.client(t, "any").Stop(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			b, _ := os.ReadFile(filepath.Join(dir, "log"))
			t.Logf("the process's log:\n%s", b)
		}
		os.RemoveAll(dir)
	})
	return x
}

func (x *apart) socket() string { return filepath.Join(x.dir, "s") }

func (x *apart) spawn(identity string) func() error {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return spawn.Session([]string{exe, "serve-names", x.socket(), filepath.Join(x.dir, "state"), x.addr, identity}, filepath.Join(x.dir, "log"))
}

func (x *apart) client(t *testing.T, identity string) *Apart {
	t.Helper()
	a := NewApart(ApartOptions{Socket: x.socket(), Spawn: x.spawn(identity), Identity: identity, Logger: slog.New(slog.DiscardHandler)})
	t.Cleanup(func() { a.Close() })
	return a
}

// set serves one name.
func set(t *testing.T, a *Apart, name, ip string) {
	t.Helper()
	a.Set(testNets, []*v1.NameRecord{{Network: "na", Name: name, Ips: []string{ip}}}, nil)
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
}

// resolve asks once, as a client of network na.
func (x *apart) resolve(port uint16, name string) (string, error) {
	ap := netip.MustParseAddrPort(x.addr)
	if port != 0 {
		ap = netip.AddrPortFrom(ap.Addr(), port)
	}
	c := &dns.Client{Timeout: 200 * time.Millisecond, Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(clientA)}, Timeout: time.Second}}
	m, _, err := c.Exchange(new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA), ap.String())
	if err != nil {
		return "", err
	}
	if len(m.Answer) != 1 {
		return "", errors.New(dns.RcodeToString[m.Rcode])
	}
	return m.Answer[0].(*dns.A).A.String(), nil
}

// want asks until there is an answer: a loaded host may be slow with one.
func (x *apart) want(t *testing.T, name, ip string) {
	t.Helper()
	var got string
	x.eventually(t, name, func() (err error) { got, err = x.resolve(0, name); return err })
	if got != ip {
		t.Errorf("%s: %q; want %s", name, got, ip)
	}
}

func (x *apart) eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// pid is the process's id; 0 if none answers.
func (x *apart) pid() int {
	a, err := ask(x.socket(), askHello, 5*time.Second)
	if err != nil {
		return 0
	}
	return a.PID
}

func TestApartOutlivesItsClient(t *testing.T) {
	x := newApart(t)
	a := x.client(t, "v1")
	set(t, a, "web", "127.1.0.1")
	if got := fmt.Sprint(a.Port()); !strings.HasSuffix(x.addr, ":"+got) {
		t.Errorf("port %s, want that of %s", got, x.addr)
	}
	if st, err := os.Stat(x.socket()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", st.Mode(), err)
	}
	x.want(t, "web", "127.1.0.1")
	set(t, a, "web", "127.1.0.2")
	x.want(t, "web", "127.1.0.2")
	pid := x.pid()
	a.Close()
	x.want(t, "web", "127.1.0.2")
	if err := a.Start(); err == nil {
		t.Error("a closed client starts")
	}
	b := x.client(t, "v1")
	set(t, b, "web", "127.1.0.3")
	x.want(t, "web", "127.1.0.3")
	if x.pid() != pid {
		t.Error("a new client of the same program made a new process")
	}
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, 0); err == nil && !zombie(pid) {
		t.Error("the process is there after Stop")
	}
	if err := b.Stop(); err != nil {
		t.Errorf("stop without a process: %v", err)
	}
	set(t, b, "web", "127.1.0.4") // Stop is not Close
	x.want(t, "web", "127.1.0.4")
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(b), ") Z ")
}

func TestApartKilledIsStartedAgain(t *testing.T) {
	x := newApart(t)
	a := x.client(t, "v1")
	set(t, a, "web", "127.1.0.1")
	for range 3 {
		pid := x.pid()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		x.eventually(t, "the name after a kill", func() error {
			_, err := x.resolve(0, "web")
			return err
		})
		t.Logf("killed: answers after %s", time.Since(start).Round(time.Millisecond))
		x.eventually(t, "another process", func() error {
			if p := x.pid(); p == 0 || p == pid {
				return fmt.Errorf("process %d, was %d", p, pid)
			}
			return nil
		})
	}
	set(t, a, "web", "127.1.0.5")
	x.want(t, "web", "127.1.0.5")
}

// The successor of a killed process answers before any client came.
func TestApartStateIsRestored(t *testing.T) {
	x := newApart(t)
	a := x.client(t, "v1")
	set(t, a, "web", "127.1.0.1")
	pid := x.pid()
	a.Close()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := x.spawn("v1")(); err != nil {
		t.Fatal(err)
	}
	x.eventually(t, "the name", func() error { _, err := x.resolve(0, "web"); return err })
	x.want(t, "web", "127.1.0.1")

	// What is no state does no harm.
	if err := x.client(t, "v1").Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(x.dir, "state"), []byte("\xffgarbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	set(t, x.client(t, "v1"), "web", "127.1.0.6")
	x.want(t, "web", "127.1.0.6")
}

// A successor takes the port that guests are led to, even if it is not the first choice.
func TestApartKeepsItsPort(t *testing.T) {
	x := newApart(t)
	pc, err := net.ListenPacket("udp4", x.addr)
	if err != nil {
		t.Fatal(err)
	}
	a := x.client(t, "v1")
	set(t, a, "web", "127.1.0.1")
	port := a.Port()
	if port == 0 || strings.HasSuffix(x.addr, ":"+strconv.Itoa(int(port))) {
		t.Fatalf("port %d, want another than that of %s", port, x.addr)
	}
	pc.Close()
	old := x.pid()
	syscall.Kill(old, syscall.SIGKILL)
	x.eventually(t, "another process", func() error {
		if p := x.pid(); p == 0 || p == old {
			return errors.New("none yet")
		}
		return nil
	})
	x.eventually(t, "the name on the old port", func() error { _, err := x.resolve(port, "web"); return err })
}

func TestApartOfAnotherIdentityIsReplaced(t *testing.T) {
	x := newApart(t)
	a := x.client(t, "v1")
	set(t, a, "web", "127.1.0.1")
	old := x.pid()
	a.Close()

	stop, worst := make(chan struct{}), make(chan time.Duration, 1)
	go func() { // how long names don't resolve
		var gap time.Duration
		last := time.Now()
		for {
			select {
			case <-stop:
				worst <- gap
				return
			default:
			}
			if _, err := x.resolve(0, "web"); err == nil {
				gap, last = max(gap, time.Since(last)), time.Now()
			}
		}
	}()
	a = x.client(t, "v2")
	set(t, a, "web", "127.1.0.2")
	close(stop)
	gap := <-worst
	t.Logf("no answer for at most %s", gap.Round(time.Millisecond))
	if gap > 5*time.Second {
		t.Errorf("no answer for %s", gap)
	}
	x.want(t, "web", "127.1.0.2")
	if p := x.pid(); p == old || p == 0 {
		t.Errorf("process %d, was %d", p, old)
	}
	if h, err := ask(x.socket(), askHello, 5*time.Second); err != nil || h.Identity != "v2" {
		t.Errorf("%+v, %v", h, err)
	}

	// One that hangs is replaced too. (Of two clients alive, each would replace the other's.)
	a.Close()
	old = x.pid()
	syscall.Kill(old, syscall.SIGSTOP)
	set(t, x.client(t, "v3"), "web", "127.1.0.3")
	x.want(t, "web", "127.1.0.3")
}

func TestApartSecondProcessGivesWay(t *testing.T) {
	x := newApart(t)
	set(t, x.client(t, "v1"), "web", "127.1.0.1")
	pid := x.pid()
	err := Serve(context.Background(), x.socket(), filepath.Join(x.dir, "state"), Options{Listen: x.addr, Identity: "v1", Logger: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(pid)) {
		t.Errorf("a second process: %v", err)
	}
	x.want(t, "web", "127.1.0.1")
}

func TestApartGarbageIsBounded(t *testing.T) {
	x := newApart(t)
	set(t, x.client(t, "v1"), "web", "127.1.0.1")
	pid := x.pid()
	huge := binary.BigEndian.AppendUint32([]byte{askSet}, 1<<32-1)
	many := binary.BigEndian.AppendUint32([]byte{askHello}, 1)
	notProto := append(binary.BigEndian.AppendUint32([]byte{askSet}, 4), "\xff\xff\xff\xff"...)
	for _, g := range [][]byte{[]byte("GET / HTTP/1.0\r\n\r\n"), huge, many, notProto, {askSet}, {0}, {}} {
		c, err := net.Dial("unix", x.socket())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(20 * time.Second))
		c.Write(g)
		if u, ok := c.(*net.UnixConn); ok {
			u.CloseWrite()
		}
		if b, err := io.ReadAll(io.LimitReader(c, maxAnswer)); err != nil && !errors.Is(err, syscall.ECONNRESET) || len(b) > 8192 {
			t.Errorf("%q: %d bytes of answer, %v", g, len(b), err)
		}
		c.Close()
	}
	// Idle connections beyond the bound are refused, the client's goes on.
	var idle []net.Conn
	for range 3 * maxClients {
		if c, err := net.Dial("unix", x.socket()); err == nil {
			idle = append(idle, c)
		}
	}
	x.want(t, "web", "127.1.0.1")
	for _, c := range idle {
		c.Close()
	}
	x.eventually(t, "the process answers", func() error {
		if p := x.pid(); p != pid {
			return fmt.Errorf("process %d, was %d", p, pid)
		}
		return nil
	})
}

func TestApartTellsWhyItCanNotListen(t *testing.T) {
	x := newApart(t)
	x.addr = "192.0.2.77:5353" // not an address of this host
	a := x.client(t, "v1")
	a.Set(testNets, nil, nil)
	for range 2 {
		if err := a.Start(); err == nil || !strings.Contains(err.Error(), "listen") || !strings.Contains(err.Error(), "192.0.2.77") {
			t.Errorf("got %v", err)
		}
	}
	if a.Port() != 0 {
		t.Errorf("port %d", a.Port())
	}
	b := NewApart(ApartOptions{Socket: filepath.Join(x.dir, "none"), Spawn: func() error { return nil }, Logger: slog.New(slog.DiscardHandler)})
	if err := b.Stop(); err != nil {
		t.Errorf("stop of what never was: %v", err)
	}
	b.Close()
}
