package runtimetest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

func testLogs(t *testing.T, tg Target) {
	id := start(t, tg, Spec(tg.Layer, "echo", "one line"))
	wait(t, tg, id)
	var es []*v1.LogEntry
	read := func(o *v1.LogOptions) []*v1.LogEntry {
		es = nil
		o.ContainerId = id
		if err := tg.RT.Logs(Context(t), o, func(e *v1.LogEntry) error { es = append(es, e); return nil }); err != nil {
			t.Fatal(err)
		}
		return es
	}
	if l := read(&v1.LogOptions{Tail: -1}); len(l) != 1 || string(l[0].Line) != "one line\n" || l[0].Stream != "stdout" || l[0].Time == nil || l[0].ContainerId != id {
		t.Errorf("all: %v", l)
	}
	at := es[0].Time
	if l := read(&v1.LogOptions{Tail: 0}); len(l) != 0 {
		t.Errorf("tail 0: %v", l)
	}
	if l := read(&v1.LogOptions{Tail: -1, Stderr: true}); len(l) != 0 {
		t.Errorf("stderr: %v", l)
	}
	if l := read(&v1.LogOptions{Tail: -1, Since: at, Until: at}); len(l) != 1 {
		t.Errorf("since and until are inclusive: %v", l)
	}
	stop := errors.New("enough")
	if err := tg.RT.Logs(Context(t), &v1.LogOptions{ContainerId: id, Tail: -1}, func(*v1.LogEntry) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the callback's error: %v", err)
	}
}

// safeBuffer is a bytes.Buffer for several goroutines.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func testFollow(t *testing.T, tg Target) {
	id := create(t, tg, Spec(tg.Layer, "echo", "later"))
	var got safeBuffer
	done := make(chan error, 1)
	ctx := Context(t)
	go func() {
		done <- tg.RT.Logs(ctx, &v1.LogOptions{ContainerId: id, Tail: -1, Follow: true}, func(e *v1.LogEntry) error { _, err := got.Write(e.Line); return err })
	}()
	if err := tg.RT.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "the follower sees the line", func() bool { return got.String() == "later\n" })
	wait(t, tg, id)
	if err := tg.RT.Delete(ctx, id, false); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("following ends with the container: %v", err)
		}
	case <-time.After(Limit):
		t.Error("the follower goes on after the container is gone")
	}
}

func testAttach(t *testing.T, tg Target) {
	s := Spec(tg.Layer, "cat")
	s.StdinOpen, s.StdinOnce = true, true
	id := create(t, tg, s)
	pr, pw := io.Pipe()
	var a, b safeBuffer
	attached := make(chan bool, 2)
	done := make(chan error, 2)
	ctx := Context(t)
	go func() {
		done <- tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: id, Stdin: true}, runtime.Streams{Stdin: pr, Stdout: &a, Started: func() { attached <- true }})
	}()
	go func() {
		done <- tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: id}, runtime.Streams{Stdout: &b, Started: func() { attached <- true }})
	}()
	<-attached
	<-attached
	if err := tg.RT.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := pw.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "both clients see it", func() bool { return a.String() == "hello\n" && b.String() == "hello\n" })
	pw.Close()
	for range 2 {
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("attach: %v", err)
			}
		case <-time.After(Limit):
			t.Fatal("attach goes on after the end")
		}
	}
	if st := wait(t, tg, id); st.ExitCode != 0 {
		t.Errorf("cat after its input's end: %v", st)
	}
	var c safeBuffer
	if err := tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: id, Logs: true}, runtime.Streams{Stdout: &c}); err != nil || c.String() != "hello\n" {
		t.Errorf("attach with logs after the end: %q %v", c.String(), err)
	}
}

// testAttachTells attaches before the start: the end's code comes with the stream,
// and so does it when there is no start.
func testAttachTells(t *testing.T, tg Target) {
	attach := func(id string) (code int, err error) {
		code = -1
		attached, done := make(chan bool, 1), make(chan error, 1)
		go func() {
			done <- tg.RT.Attach(Context(t), &v1.AttachSpec{ContainerId: id, Logs: true},
				runtime.Streams{Started: func() { attached <- true }, Ended: func(n int) { code = n }})
		}()
		<-attached
		started := tg.RT.Start(Context(t), id)
		select {
		case err = <-done:
		case <-time.After(Limit):
			t.Fatal("attach goes on after the end")
		}
		if (started == nil) != (err == nil) {
			t.Errorf("start says %v, attach %v", started, err)
		}
		return code, err
	}
	if code, err := attach(create(t, tg, Spec(tg.Layer, "sh", "-c", "exit 7"))); code != 7 || err != nil {
		t.Errorf("attach to what ends with 7: %d %v", code, err)
	}
	if code, err := attach(create(t, tg, Spec(tg.Layer, "no-such-program"))); code != -1 || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("attach to what can't start: %d %v", code, err)
	}
}

func testExec(t *testing.T, tg Target) {
	id := start(t, tg, Spec(tg.Layer, "sleep", "1000"))
	ex := func(e *v1.ExecSpec, s runtime.Streams) (int, error) {
		e.ContainerId = id
		return tg.RT.Exec(Context(t), e, s)
	}
	var out safeBuffer
	started := make(chan bool, 1)
	code, err := ex(&v1.ExecSpec{Args: []string{"echo", "hi"}}, runtime.Streams{Stdout: &out, Started: func() { started <- true }})
	if err != nil || code != 0 || out.String() != "hi\n" || len(started) != 1 {
		t.Errorf("echo: %d %q %v", code, out.String(), err)
	}
	if code, err := ex(&v1.ExecSpec{Args: []string{"sh", "-c", "exit 9"}}, runtime.Streams{}); code != 9 || err != nil {
		t.Errorf("exit 9: %d %v", code, err)
	}
	var echoed safeBuffer
	if code, err := ex(&v1.ExecSpec{Args: []string{"cat"}, Stdin: true}, runtime.Streams{Stdin: strings.NewReader("in and out"), Stdout: &echoed}); code != 0 || err != nil || echoed.String() != "in and out" {
		t.Errorf("cat: %d %q %v", code, echoed.String(), err)
	}
	if _, err := ex(&v1.ExecSpec{Args: []string{"no-such-program"}}, runtime.Streams{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no such program: %v", err)
	}
	if _, err := ex(&v1.ExecSpec{Args: []string{"sleep", "1000"}, Timeout: durationpb.New(100 * time.Millisecond)}, runtime.Streams{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("time-out: %v", err)
	}
	ctx, cancel := context.WithCancel(Context(t))
	_, err = tg.RT.Exec(ctx, &v1.ExecSpec{ContainerId: id, Args: []string{"sleep", "1000"}}, runtime.Streams{Started: cancel})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := tg.RT.Stop(Context(t), id, "KILL", 0); err != nil {
		t.Fatal(err)
	}
	if _, err := ex(&v1.ExecSpec{Args: []string{"true"}}, runtime.Streams{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in an ended one: %v", err)
	}
}
