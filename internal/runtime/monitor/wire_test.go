package monitor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

func header(kind byte, n uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte{kind}, n)
}

// TestRubbishOnTheSocket: whatever a client sends, its connection ends or it gets an
// error; others are served as before.
func TestRubbishOnTheSocket(t *testing.T) {
	r := newRig(t)
	frame := func(kind byte, p string) []byte { return append(header(kind, uint32(len(p))), p...) }
	for name, raw := range map[string][]byte{
		"nothing":          {},
		"http":             []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"half a header":    {'J', 0, 0},
		"half a frame":     append(header('J', 100), "{"...),
		"too long":         append(header('J', maxFrame+1), bytes.Repeat([]byte{'x'}, 1000)...),
		"endless":          header('J', 1<<32-1),
		"wrong kind first": frame(frameStdin, "hello"),
		"no JSON":          frame('J', "\xff\xfe{"),
		"wrong types":      frame('J', `{"start":17}`),
		"no request":       frame('J', `{}`),
		"from the future":  frame('J', `{"migrate":{"id":"a"}}`),
		"deep":             frame('J', strings.Repeat("[", 100000)),
		"bad exec":         frame('J', `{"exec":{"id":"a","process":"x"}}`),
		"attach, rubbish":  append(frame('J', `{"attach":{"id":"a","stdin":true}}`), append(frame('?', "x"), header('i', 1<<31)...)...),
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("unix", r.socket)
			must(t, err)
			defer c.Close()
			_, _ = c.Write(raw) // it may hang up before all was sent
			must(t, c.(*net.UnixConn).CloseWrite())
			must(t, c.SetReadDeadline(time.Now().Add(time.Minute)))
			if _, err := io.Copy(io.Discard, io.LimitReader(c, 1<<20)); errors.Is(err, net.ErrClosed) || err != nil && strings.Contains(err.Error(), "timeout") {
				t.Fatalf("the connection stays: %v", err)
			}
			if _, err := r.Ping(r.ctx()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestFramesAreBounded: neither side sends or takes what is too large.
func TestFramesAreBounded(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if err := (&conn{Conn: a}).send(frameStdin, make([]byte, maxFrame+1)); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	go a.Write(header(frameStdin, maxFrame+1))
	if _, _, err := (&conn{Conn: b}).recv(nil); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	r := newRig(t)
	s := r.request("a", "exit 0")
	s.Bundle += strings.Repeat("/x", maxFrame/2)
	if _, err := r.Start(r.ctx(), s); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// TestRubbishFromTheMonitor: a client of something that is no monitor gets an error.
func TestRubbishFromTheMonitor(t *testing.T) {
	for name, raw := range map[string][]byte{
		"silence": nil, "text": []byte("hello, I am no monitor\n"), "too long": header('J', maxFrame+1),
		"no JSON": append(header('J', 2), "{{"...), "empty": append(header('J', 2), "{}"...),
	} {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			must(t, err)
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_, _, _ = (&conn{Conn: c}).recv(nil)
					_, _ = c.Write(raw)
					c.Close()
				}
			}()
			if st, err := NewClient(socket, nil).Start(t.Context(), StartRequest{ID: "a"}); err == nil {
				t.Errorf("%+v", st)
			}
			if err := NewClient(socket, nil).Watch(t.Context(), func(Status) {}, nil); err == nil {
				t.Error("a watch that ended says nothing")
			}
		})
	}
}

// TestSlowClient: one that does not read gets so much and no more, and is waited for
// until it reads, goes, or the container has ended.
func TestSlowClient(t *testing.T) {
	begin := func(t *testing.T) (*client, net.Conn, *int) {
		near, far := net.Pipe()
		cl, pushed := newClient(&conn{Conn: near}), new(int)
		t.Cleanup(func() { far.Close(); cl.drop() })
		return cl, far, pushed
	}
	piece := make([]byte, chunk)
	fill := func(cl *client, pushed *int, ending chan struct{}) chan bool {
		ok := make(chan bool, 1)
		go func() {
			for range 4 * queueLimit / chunk {
				if !cl.push(frameStdout, piece, ending) {
					ok <- false
					return
				}
				*pushed += chunk
			}
			ok <- true
		}()
		return ok
	}
	bounded := func(t *testing.T, pushed int) {
		t.Helper()
		if pushed < queueLimit/2 || pushed > 2*queueLimit+chunk { // as much is queued as is being sent
			t.Errorf("%d bytes were taken for who does not read, the limit is %d", pushed, queueLimit)
		}
	}
	t.Run("reads late", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cl, far, pushed := begin(t)
			ok := fill(cl, pushed, nil)
			synctest.Wait()
			bounded(t, *pushed)
			got := 0
			reader := &conn{Conn: far}
			for got < 4*queueLimit {
				_, p, err := reader.recv(nil)
				must(t, err)
				got += len(p)
			}
			if !<-ok || *pushed != got {
				t.Errorf("pushed %d, got %d", *pushed, got)
			}
			cl.finish()
			if _, _, err := reader.recv(nil); !errors.Is(err, io.EOF) {
				t.Error("after the last:", err)
			}
		})
	})
	t.Run("goes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cl, far, pushed := begin(t)
			ok := fill(cl, pushed, nil)
			synctest.Wait()
			bounded(t, *pushed)
			far.Close()
			if <-ok {
				t.Error("output for who went was taken")
			}
		})
	})
	t.Run("is outlived", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cl, _, pushed := begin(t)
			ending := make(chan struct{})
			ok := fill(cl, pushed, ending)
			synctest.Wait()
			bounded(t, *pushed)
			close(ending)
			if !<-ok {
				t.Error("the rest was not taken though the container had ended")
			}
		})
	})
}

// TestSlowClientOfAContainer: it holds its container up, no other client's exit code
// and no log line is lost, and it gets what it missed when it reads at last.
func TestSlowClientOfAContainer(t *testing.T) {
	const size = 6 << 20
	r := newRig(t)
	s := r.request("a", "read x; head -c 6291456 /dev/zero | tr '\\0' x; exit 6")
	s.Stdin, s.StdinOnce = true, true
	_, err := r.Start(r.ctx(), s)
	must(t, err)
	attach := func() *conn {
		c, err := net.Dial("unix", r.socket)
		must(t, err)
		t.Cleanup(func() { c.Close() })
		cn := &conn{Conn: c}
		must(t, cn.sendJSON(request{Attach: &AttachRequest{ID: "a", Stdin: true}}))
		if res, err := recvJSON(cn); err != nil || !res.Started {
			t.Fatal(res, err)
		}
		return cn
	}
	slow, gone := attach(), attach()
	must(t, slow.send(frameStdin, []byte("go\n")))
	r.poll("output flows", func() bool { return len(read(s.LogPath)) > 1000 })
	gone.Close() // with its queue full or not
	got := 0
	var res *response
	for res == nil {
		must(t, slow.SetReadDeadline(time.Now().Add(2*time.Minute)))
		kind, p, err := slow.recv(nil)
		must(t, err)
		if kind == frameStdout {
			got += len(p)
			continue
		}
		res = &response{}
		if !bytes.Contains(p, []byte(`"ended":true`)) || !bytes.Contains(p, []byte(`"exit":6`)) {
			t.Fatalf("%q", p)
		}
	}
	if got != size {
		t.Errorf("the slow client got %d bytes of %d", got, size)
	}
	if st := r.until("a", Exited); st.ExitCode != 6 {
		t.Errorf("%+v", st)
	}
	if n := strings.Count(read(s.LogPath), "x"); n != size {
		t.Errorf("%d bytes were logged of %d", n, size)
	}
}
