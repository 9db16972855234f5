package runtimetest

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// Target is an implementation under test.
type Target struct {
	RT    runtime.Runtime
	Layer string // id of a mounted disk with BusyboxImage's content
	// Mount mounts a fresh, empty, writable ext4 disk and returns its id. Only
	// the suite for real kernels (Linux) uses it.
	Mount func(t *testing.T) string
}

// Run is the suite for every implementation. The programs it starts are the ones
// that package fake knows. Containers it made are gone when it ends.
func Run(t *testing.T, tg Target) {
	for _, c := range []struct {
		name string
		fn   func(*testing.T, Target)
	}{
		{"life", testLife}, {"exit codes", testExitCodes}, {"idempotent calls", testIdempotent}, {"errors", testErrors},
		{"events", testEvents}, {"logs", testLogs}, {"follow logs", testFollow}, {"attach", testAttach},
		{"exec", testExec}, {"pause", testPause}, {"disks in use", testDisksInUse}, {"start again", testRestart},
		{"many at once", testMany}, {"observe", testObserve},
	} {
		t.Run(c.name, func(t *testing.T) { c.fn(t, tg) })
	}
}

// create makes a container that is deleted with the test.
func create(t *testing.T, tg Target, s *v1.RuntimeSpec) string {
	t.Helper()
	if err := tg.RT.Create(Context(t), s); err != nil {
		t.Fatalf("create: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Limit)
		defer cancel()
		if err := tg.RT.Delete(ctx, s.Id, true); err != nil {
			t.Errorf("delete: %v", err)
		}
	})
	return s.Id
}

func start(t *testing.T, tg Target, s *v1.RuntimeSpec) string {
	t.Helper()
	id := create(t, tg, s)
	if err := tg.RT.Start(Context(t), id); err != nil {
		t.Fatalf("start: %v", err)
	}
	return id
}

func status(t *testing.T, tg Target, id string) *v1.RuntimeStatus {
	t.Helper()
	l, err := tg.RT.List(Context(t))
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	for _, s := range l {
		if s.Id == id {
			return s
		}
	}
	return nil
}

func wait(t *testing.T, tg Target, id string) *v1.RuntimeStatus {
	t.Helper()
	st, err := tg.RT.Wait(Context(t), id)
	if err != nil {
		t.Fatalf("wait: %v", err)
	}
	return st
}

// run creates, starts and waits; it returns the exit code and all output.
func run(t *testing.T, tg Target, s *v1.RuntimeSpec) (int, string) {
	t.Helper()
	id := start(t, tg, s)
	st := wait(t, tg, id)
	return int(st.ExitCode), output(t, tg, id)
}

func output(t *testing.T, tg Target, id string) string {
	t.Helper()
	var b strings.Builder
	err := tg.RT.Logs(Context(t), &v1.LogOptions{ContainerId: id, Tail: -1}, func(e *v1.LogEntry) error { b.Write(e.Line); return nil })
	if err != nil {
		t.Fatalf("logs: %v", err)
	}
	return b.String()
}

func isState(t *testing.T, tg Target, id string, want v1.ContainerState) {
	t.Helper()
	if s := status(t, tg, id); s.GetState() != want {
		t.Fatalf("state %v, want %v", s.GetState(), want)
	}
}

const (
	created = v1.ContainerState_CONTAINER_STATE_CREATED
	running = v1.ContainerState_CONTAINER_STATE_RUNNING
	paused  = v1.ContainerState_CONTAINER_STATE_PAUSED
	exited  = v1.ContainerState_CONTAINER_STATE_EXITED
)

func testLife(t *testing.T, tg Target) {
	s := Spec(tg.Layer, "sleep", "1000")
	s.Labels = map[string]string{"a": "b"}
	id := create(t, tg, s)
	isState(t, tg, id, created)
	if err := tg.RT.Start(Context(t), id); err != nil {
		t.Fatal(err)
	}
	st := status(t, tg, id)
	if st.State != running || st.Pid <= 0 || st.StartedAt == nil || st.Labels["a"] != "b" {
		t.Errorf("running: %v", st)
	}
	st, err := tg.RT.Stop(Context(t), id, "KILL", time.Second)
	if err != nil || st.State != exited || st.ExitCode != 137 || st.FinishedAt == nil || st.Pid != 0 {
		t.Errorf("stop: %v %v", st, err)
	}
	if err := tg.RT.Delete(Context(t), id, false); err != nil {
		t.Error(err)
	}
	if st := status(t, tg, id); st != nil {
		t.Errorf("deleted, but listed: %v", st)
	}
}

func testExitCodes(t *testing.T, tg Target) {
	for _, c := range []struct {
		args []string
		code int
	}{{[]string{"true"}, 0}, {[]string{"false"}, 1}, {[]string{"sh", "-c", "exit 42"}, 42}} {
		if code, _ := run(t, tg, Spec(tg.Layer, c.args...)); code != c.code {
			t.Errorf("%v: exit code %d, want %d", c.args, code, c.code)
		}
	}
}

func testIdempotent(t *testing.T, tg Target) {
	s := Spec(tg.Layer, "sleep", "1000")
	id := start(t, tg, s)
	pid := status(t, tg, id).Pid
	if err := tg.RT.Create(Context(t), s); !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	if err := tg.RT.Start(Context(t), id); err != nil || status(t, tg, id).Pid != pid {
		t.Errorf("second start: %v", err)
	}
	for range 2 {
		if st, err := tg.RT.Stop(Context(t), id, "KILL", 0); err != nil || st.GetState() != exited {
			t.Errorf("stop: %v %v", st, err)
		}
	}
	for range 2 {
		if err := tg.RT.Delete(Context(t), id, false); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if _, err := tg.RT.Stop(Context(t), id, "", 0); err != nil {
		t.Errorf("stop of what is gone: %v", err)
	}
}

func testErrors(t *testing.T, tg Target) {
	ctx := Context(t)
	none := Unique("none")
	for name, err := range map[string]error{
		"start": tg.RT.Start(ctx, none), "kill": tg.RT.Kill(ctx, none, "TERM", false), "pause": tg.RT.Pause(ctx, none),
		"resume": tg.RT.Resume(ctx, none), "update": tg.RT.Update(ctx, none, &v1.Resources{}),
		"attach": tg.RT.Attach(ctx, &v1.AttachSpec{ContainerId: none}, runtime.Streams{}),
		"logs":   tg.RT.Logs(ctx, &v1.LogOptions{ContainerId: none}, func(*v1.LogEntry) error { return nil }),
		"wait":   second(tg.RT.Wait(ctx, none)), "stats": second(tg.RT.Stats(ctx, none)), "top": second(tg.RT.Top(ctx, none)),
		"exec": second(tg.RT.Exec(ctx, &v1.ExecSpec{ContainerId: none, Args: []string{"true"}}, runtime.Streams{})),
	} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("%s of an unknown container: %v", name, err)
		}
	}
	bad := Spec(tg.Layer, "true")
	bad.Id = "../x"
	if err := tg.RT.Create(ctx, bad); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad id: %v", err)
	}
	if err := tg.RT.Create(ctx, Spec(tg.Layer)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command: %v", err)
	}
	if err := tg.RT.Create(ctx, Spec("sha256:absent", "true")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("layer that is not mounted: %v", err)
	}
	id := create(t, tg, Spec(tg.Layer, "no-such-program"))
	if err := tg.RT.Start(ctx, id); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("no such program: %v", err)
	}
	isState(t, tg, id, created)
	if err := tg.RT.Kill(ctx, id, "TERM", false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("kill of one that does not run: %v", err)
	}
	id = start(t, tg, Spec(tg.Layer, "sleep", "1000"))
	if err := tg.RT.Kill(ctx, id, "NOPE", false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown signal: %v", err)
	}
	if err := tg.RT.Delete(ctx, id, false); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running one: %v", err)
	}
	wctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := tg.RT.Wait(wctx, id); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait with a deadline: %v", err)
	}
	if err := tg.RT.Delete(ctx, id, true); err != nil {
		t.Errorf("forced delete: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func testEvents(t *testing.T, tg Target) {
	ctx, cancel := context.WithCancel(Context(t))
	defer cancel()
	ch, err := tg.RT.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if ev := <-ch; ev.GetAction() != "ready" {
		t.Fatalf("first event: %v", ev)
	}
	id := start(t, tg, Spec(tg.Layer, "sh", "-c", "exit 7"))
	wait(t, tg, id)
	if err := tg.RT.Delete(Context(t), id, false); err != nil {
		t.Fatal(err)
	}
	want := []string{"create", "start", "exit", "delete"}
	for len(want) > 0 {
		select {
		case ev, ok := <-ch:
			if !ok {
				t.Fatal("stream ended")
			}
			if ev.Id != id {
				continue
			}
			if ev.Action != want[0] || ev.Status.GetId() != id || ev.At == nil {
				t.Fatalf("event %v, want %s", ev, want[0])
			}
			if ev.Action == "exit" && (ev.Status.ExitCode != 7 || ev.Status.State != exited) {
				t.Errorf("exit event: %v", ev.Status)
			}
			want = want[1:]
		case <-time.After(Limit):
			t.Fatalf("no event %s", want[0])
		}
	}
	cancel()
	Eventually(t, "the stream closes with its context", func() bool {
		select {
		case _, ok := <-ch:
			return !ok
		default:
			return false
		}
	})
}

func testPause(t *testing.T, tg Target) {
	id := start(t, tg, Spec(tg.Layer, "sleep", "1000"))
	for range 2 {
		if err := tg.RT.Pause(Context(t), id); err != nil {
			t.Fatal(err)
		}
	}
	isState(t, tg, id, paused)
	if _, err := tg.RT.Exec(Context(t), &v1.ExecSpec{ContainerId: id, Args: []string{"true"}}, runtime.Streams{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in a paused one: %v", err)
	}
	if err := tg.RT.Resume(Context(t), id); err != nil {
		t.Fatal(err)
	}
	isState(t, tg, id, running)
	if err := tg.RT.Pause(Context(t), id); err != nil {
		t.Fatal(err)
	}
	if st, err := tg.RT.Stop(Context(t), id, "KILL", time.Second); err != nil || st.State != exited {
		t.Errorf("stop of a paused one: %v %v", st, err)
	}
}

func testDisksInUse(t *testing.T, tg Target) {
	id := create(t, tg, Spec(tg.Layer, "true"))
	if err := tg.RT.Unmount(Context(t), tg.Layer); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unmount of a used layer: %v", err)
	}
	if err := tg.RT.Delete(Context(t), id, false); err != nil {
		t.Fatal(err)
	}
	if err := tg.RT.Unmount(Context(t), Unique("none")); err != nil {
		t.Errorf("unmount of nothing: %v", err)
	}
}

func testRestart(t *testing.T, tg Target) {
	id := create(t, tg, Spec(tg.Layer, "echo", "again"))
	for range 3 {
		if err := tg.RT.Start(Context(t), id); err != nil {
			t.Fatal(err)
		}
		if st := wait(t, tg, id); st.ExitCode != 0 {
			t.Fatal(st)
		}
	}
	if out := output(t, tg, id); out != strings.Repeat("again\n", 3) {
		t.Errorf("logs of all runs: %q", out)
	}
}

func testMany(t *testing.T, tg Target) {
	var wg sync.WaitGroup
	for range 6 {
		s := Spec(tg.Layer, "true")
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), Limit)
			defer cancel()
			err := tg.RT.Create(ctx, s)
			if err == nil {
				err = tg.RT.Start(ctx, s.Id)
			}
			if err == nil {
				_, err = tg.RT.Wait(ctx, s.Id)
			}
			if derr := tg.RT.Delete(ctx, s.Id, true); err != nil || derr != nil {
				t.Errorf("%s: %v %v", s.Id, err, derr)
			}
		})
	}
	wg.Wait()
}

func testObserve(t *testing.T, tg Target) {
	id := start(t, tg, Spec(tg.Layer, "sleep", "1000"))
	ps, err := tg.RT.Top(Context(t), id)
	if err != nil || len(ps) != 1 || !strings.HasPrefix(ps[0].Command, "sleep 1000") || ps[0].User != "root" {
		t.Errorf("top: %v %v", ps, err)
	}
	u, err := tg.RT.Stats(Context(t), id)
	if err != nil || u.Pids != 1 || u.MemoryBytes <= 0 || u.At == nil {
		t.Errorf("stats: %v %v", u, err)
	}
	if err := tg.RT.Update(Context(t), id, &v1.Resources{CpuMilliLimit: 500, MemoryBytesLimit: 64 << 20, PidsLimit: 50}); err != nil {
		t.Errorf("update: %v", err)
	}
}
