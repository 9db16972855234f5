package remote_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
	"tandem/internal/runtime/fake"
	"tandem/internal/runtime/remote"
	"tandem/internal/runtime/runtimetest"
)

// over serves rt on one in-memory byte stream, as the agent channel does.
func over(t testing.TB, rt runtime.Runtime) runtime.Runtime {
	t.Helper()
	a, b := net.Pipe()
	mux := http.NewServeMux()
	mux.Handle(remote.NewHandler(rt))
	ctx, cancel := context.WithCancel(context.Background())
	go rpc.ServeConn(ctx, a, mux)
	c, err := rpc.ConnClient(b, 30*time.Second, 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); cancel() })
	return remote.NewClient(c.Client, rpc.BaseURL)
}

func TestSuiteOverFake(t *testing.T) {
	rt := fake.New()
	c := over(t, rt)
	if _, err := c.Mount(context.Background(), &v1.MountDiskRequest{Id: "layer", Serial: "x"}); err != nil {
		t.Fatal(err)
	}
	runtimetest.Run(t, runtimetest.Target{RT: c, Layer: "layer"})
}

// liar answers with what no honest guest says.
type liar struct {
	runtime.Runtime
	list   []*v1.RuntimeStatus
	status *v1.RuntimeStatus
	usage  *v1.Usage
	top    []*v1.Process
	entry  *v1.LogEntry
	event  *v1.RuntimeEvent
	err    error
	code   int
}

func (l *liar) List(context.Context) ([]*v1.RuntimeStatus, error)       { return l.list, l.err }
func (l *liar) Wait(context.Context, string) (*v1.RuntimeStatus, error) { return l.status, l.err }
func (l *liar) Stats(context.Context, string) (*v1.Usage, error)        { return l.usage, l.err }
func (l *liar) Top(context.Context, string) ([]*v1.Process, error)      { return l.top, l.err }
func (l *liar) Logs(_ context.Context, _ *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	return fn(l.entry)
}
func (l *liar) Exec(context.Context, *v1.ExecSpec, runtime.Streams) (int, error) {
	return l.code, l.err
}
func (l *liar) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	ch := make(chan *v1.RuntimeEvent, 2)
	ch <- &v1.RuntimeEvent{Action: "ready"}
	ch <- l.event
	context.AfterFunc(ctx, func() { close(ch) })
	return ch, nil
}

func TestLies(t *testing.T) {
	ctx := context.Background()
	l := &liar{}
	c := over(t, l)
	good := func() *v1.RuntimeStatus {
		return &v1.RuntimeStatus{Id: "c", State: v1.ContainerState_CONTAINER_STATE_RUNNING}
	}
	lie := func(name string, err error) {
		t.Helper()
		if !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*v1.RuntimeStatus){
		"id": func(s *v1.RuntimeStatus) { s.Id = "../../etc" }, "other": func(s *v1.RuntimeStatus) { s.Id = "d" },
		"state": func(s *v1.RuntimeStatus) { s.State = 99 }, "exit code": func(s *v1.RuntimeStatus) { s.ExitCode = 256 },
		"pid": func(s *v1.RuntimeStatus) { s.Pid = -1 }, "label": func(s *v1.RuntimeStatus) { s.Labels = map[string]string{"a\x00": ""} },
	} {
		s := good()
		change(s)
		l.status = s
		_, err := c.Wait(ctx, "c")
		lie(name, err)
	}
	l.status = nil
	_, err := c.Wait(ctx, "c")
	lie("nothing", err)
	l.list = []*v1.RuntimeStatus{good(), good()}
	_, err = c.List(ctx)
	lie("twice", err)
	l.usage = &v1.Usage{MemoryBytes: -1}
	_, err = c.Stats(ctx, "c")
	lie("usage", err)
	l.top = []*v1.Process{{Pid: 1, Command: strings.Repeat("x", 5000)}}
	_, err = c.Top(ctx, "c")
	lie("command", err)
	l.code = 4000
	_, err = c.Exec(ctx, &v1.ExecSpec{ContainerId: "c", Args: []string{"x"}}, runtime.Streams{})
	lie("exec", err)
	for _, e := range []*v1.LogEntry{{Stream: "x", ContainerId: "c"}, {Stream: "stdout", ContainerId: "d"}, {Stream: "stdout", ContainerId: "c", Line: make([]byte, 1<<20)}} {
		l.entry = e
		lie("entry", c.Logs(ctx, &v1.LogOptions{ContainerId: "c"}, func(*v1.LogEntry) error { return nil }))
	}
	l.event = &v1.RuntimeEvent{Action: "rm -rf", Status: good()}
	ch, err := c.Events(ctx)
	if err != nil || (<-ch).Action != "ready" {
		t.Fatal(err)
	}
	if ev, ok := <-ch; ok {
		t.Errorf("event %v", ev)
	}
	l.err = errors.New(strings.Repeat("y", 100_000))
	if _, err = c.List(ctx); err == nil || len(err.Error()) > 5000 {
		t.Errorf("long error: %d bytes", len(err.Error()))
	}
}

func TestBrokenConnection(t *testing.T) {
	a, b := net.Pipe()
	go func() { // a guest that reads and never answers, then goes
		buf := make([]byte, 1024)
		for i := 0; i < 3; i++ {
			_, _ = a.Read(buf)
		}
		a.Close()
	}()
	conn, err := rpc.ConnClient(b, time.Second, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := remote.NewClient(conn.Client, rpc.BaseURL)
	if _, err := c.List(context.Background()); err == nil {
		t.Error("an answer from nobody")
	}
	if _, err := c.Exec(context.Background(), &v1.ExecSpec{ContainerId: "c", Args: []string{"x"}}, runtime.Streams{}); err == nil {
		t.Error("an answer from nobody")
	}
}
