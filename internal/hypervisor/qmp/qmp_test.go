package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 7.2"}, "capabilities": ["oob"]}}` + "\r\n"

// server plays QEMU: it answers each command by what reply returns; "" is no answer.
func server(t *testing.T, reply func(cmd, id string, conn *net.UnixConn) string) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		c, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.WriteString(c, greeting)
		r := bufio.NewReader(c)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			var req struct {
				Execute string `json:"execute"`
				ID      string `json:"id"`
			}
			if json.Unmarshal(line, &req) != nil {
				return
			}
			answer := fmt.Sprintf(`{"return": {}, "id": %q}`, req.ID)
			if req.Execute != "qmp_capabilities" {
				answer = reply(req.Execute, req.ID, c)
			}
			if answer != "" {
				if _, err := io.WriteString(c, answer+"\r\n"); err != nil {
					return
				}
			}
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := Dial(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestCommands(t *testing.T) {
	c := server(t, func(cmd, id string, _ *net.UnixConn) string {
		switch cmd {
		case "good":
			return fmt.Sprintf(`{"return": {"n": 7}, "id": %q}`, id)
		case "missing":
			return fmt.Sprintf(`{"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": %q}`, id)
		case "mute":
			return ""
		}
		return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no"}, "id": %q}`, id)
	})
	if v := c.Version(); v.String() != "7.2.22 (Debian 7.2)" {
		t.Errorf("version %v", v)
	}
	ctx := context.Background()
	var out struct{ N int }
	if err := c.Do(ctx, "good", Args{"a": 1}, &out); err != nil || out.N != 7 {
		t.Errorf("good: %+v, %v", out, err)
	}
	if err := c.Do(ctx, "missing", nil, nil); !IsNotFound(err) || !IsRefused(err) {
		t.Errorf("missing: %v", err)
	}
	if err := c.Do(ctx, "other", nil, nil); IsNotFound(err) || !IsRefused(err) {
		t.Errorf("other: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := c.Do(short, "mute", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("mute: %v", err)
	}
	var wg sync.WaitGroup
	for range 50 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := c.Do(ctx, "good", nil, nil); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	time.AfterFunc(10*time.Millisecond, func() { _ = c.Close() })
	if err := c.Do(ctx, "mute", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("closed under way: %v", err)
	}
	<-c.Done()
	if err := c.Do(ctx, "good", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("closed before: %v", err)
	}
}

// A subscriber that never reads must not stop replies, nor other subscribers.
func TestSlowSubscriber(t *testing.T) {
	const n = 3 * eventQueue
	c := server(t, func(cmd, id string, conn *net.UnixConn) string {
		for i := range n {
			fmt.Fprintf(conn, `{"event": "TICK", "data": {"i": %d}, "timestamp": {"seconds": 1, "microseconds": 2}}`+"\r\n", i)
		}
		return fmt.Sprintf(`{"return": {}, "id": %q}`, id)
	})
	lazy := c.Subscribe()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.Do(ctx, "tick", nil, nil); err != nil {
		t.Fatal(err)
	}
	if lazy.Lost() != n-eventQueue {
		t.Errorf("lost %d", lazy.Lost())
	}
	e, err := lazy.Wait(ctx, func(e Event) bool { return strings.Contains(string(e.Data), fmt.Sprint(n-1)) })
	if err != nil || e.Name != "TICK" || e.Time.Unix() != 1 {
		t.Errorf("newest event: %+v, %v", e, err)
	}
	lazy.Close()
	last := c.Subscribe()
	_ = c.Close()
	if _, err := last.Wait(ctx, func(Event) bool { return true }); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
}

func TestFileIsHandedOver(t *testing.T) {
	a, b, err := socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	got := make(chan string, 1)
	go func() {
		_, _ = io.WriteString(b, greeting)
		buf, oob := make([]byte, 4096), make([]byte, 256)
		for i := 1; ; i++ {
			n, on, _, _, err := b.ReadMsgUnix(buf, oob)
			if err != nil {
				return
			}
			if msgs, err := unix.ParseSocketControlMessage(oob[:on]); err == nil && len(msgs) == 1 {
				fds, _ := unix.ParseUnixRights(&msgs[0])
				f := os.NewFile(uintptr(fds[0]), "got")
				content, _ := io.ReadAll(f)
				_ = f.Close()
				got <- string(content) + " with " + string(buf[:n])
			}
			fmt.Fprintf(b, `{"return": {}, "id": "%d"}`+"\n", i)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := New(ctx, a)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := c.DoWithFiles(ctx, "getfd", Args{"fdname": "x"}, nil, f); err != nil {
		t.Fatal(err)
	}
	if s := <-got; !strings.HasPrefix(s, "content with ") || !strings.Contains(s, "getfd") {
		t.Errorf("got %q", s)
	}
}

func socketpair() (*net.UnixConn, *net.UnixConn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			return nil, nil, err
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1], nil
}

func TestBadPeers(t *testing.T) {
	for name, says := range map[string]string{
		"silent": "", "no JSON": "hello\n", "no greeting": `{"return": {}}` + "\n", "array": "[1]\n",
		"garbage after the greeting": greeting + "garbage\n",
	} {
		a, b, err := socketpair()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(b, says)
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		if c, err := New(ctx, a); err == nil {
			t.Errorf("%s: accepted", name)
			_ = c.Close()
		}
		cancel()
		_ = b.Close()
	}
}

func TestReadMessage(t *testing.T) {
	r := bufio.NewReaderSize(strings.NewReader("\r\n{}\r\n\n"+strings.Repeat("x", 50)+"\n"+strings.Repeat("y", 51)+"\n"), 16)
	for _, want := range []string{"{}", strings.Repeat("x", 50)} {
		if b, err := ReadMessage(r, 50); err != nil || string(b) != want {
			t.Errorf("%q, %v", b, err)
		}
	}
	if _, err := ReadMessage(r, 50); !errors.Is(err, ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
	if _, err := ReadMessage(bufio.NewReader(strings.NewReader("{")), 50); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut: %v", err)
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add([]byte(greeting + `{"return": {}, "id": "1"}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": {"guest": true}, "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n"))
	f.Add([]byte("{\"error\": {\"class\": 5}}\n\r\n[]\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		const limit = 1 << 10
		r := bufio.NewReaderSize(bytes.NewReader(b), 64)
		for {
			line, err := ReadMessage(r, limit)
			if err != nil {
				return
			}
			if len(line) == 0 || len(line) > limit || bytes.IndexByte(line, '\n') >= 0 {
				t.Fatalf("message %q", line)
			}
			m, err := Parse(line)
			if err != nil {
				continue
			}
			_ = m.result("x", &struct{ N int }{})
			_ = named(m.event())
		}
	})
}

func named(e Event) string {
	var d struct{ Device string }
	_ = e.Decode(&d)
	return d.Device
}
