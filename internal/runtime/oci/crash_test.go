package oci_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
	"tandem/internal/runtime/cgroup"
	"tandem/internal/runtime/oci"
	"tandem/internal/runtime/runtimetest"
)

func state(t testing.TB, rt runtime.Runtime, id string) *v1.RuntimeStatus {
	t.Helper()
	l, err := rt.List(runtimetest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l {
		if s.Id == id {
			return s
		}
	}
	return nil
}

func begin(t testing.TB, rt runtime.Runtime, s *v1.RuntimeSpec) string {
	t.Helper()
	ctx := runtimetest.Context(t)
	if err := rt.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	if err := rt.Start(ctx, s.Id); err != nil {
		t.Fatal(err)
	}
	return s.Id
}

func logText(t testing.TB, rt runtime.Runtime, id string) string {
	t.Helper()
	var b bytes.Buffer
	if err := rt.Logs(runtimetest.Context(t), &v1.LogOptions{ContainerId: id, Tail: -1}, func(e *v1.LogEntry) error { b.Write(e.Line); return nil }); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// A new runtime finds what runs, what ended meanwhile with its code and log, and
// what was only created.
func TestReopen(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	runs := begin(t, rt, runtimetest.Spec(h.layer, "sleep", "1000"))
	ends := begin(t, rt, runtimetest.Spec(h.layer, "sh", "-c", "sleep 1; echo done; exit 6"))
	frozen := begin(t, rt, runtimetest.Spec(h.layer, "sleep", "1000"))
	if err := rt.Pause(runtimetest.Context(t), frozen); err != nil {
		t.Fatal(err)
	}
	only := runtimetest.Spec(h.layer, "true")
	if err := rt.Create(runtimetest.Context(t), only); err != nil {
		t.Fatal(err)
	}
	pid := state(t, rt, runs).Pid
	rt.Close()
	time.Sleep(1500 * time.Millisecond)

	rt = h.open()
	if s := state(t, rt, runs); s.GetState() != v1.ContainerState_CONTAINER_STATE_RUNNING || s.Pid != pid {
		t.Errorf("running: %v", s)
	}
	if s := state(t, rt, frozen); s.GetState() != v1.ContainerState_CONTAINER_STATE_PAUSED {
		t.Errorf("paused: %v", s)
	}
	if s := state(t, rt, only.Id); s.GetState() != v1.ContainerState_CONTAINER_STATE_CREATED || time.Since(s.CreatedAt.AsTime()).Abs() > 10*time.Minute {
		t.Errorf("created: %v", s)
	}
	if s, err := rt.Wait(runtimetest.Context(t), ends); err != nil || s.ExitCode != 6 || logText(t, rt, ends) != "done\n" {
		t.Errorf("ended meanwhile: %v %v %q", s, err, logText(t, rt, ends))
	}
	if code, err := rt.Exec(runtimetest.Context(t), &v1.ExecSpec{ContainerId: runs, Args: []string{"true"}}, runtime.Streams{}); code != 0 || err != nil {
		t.Errorf("exec after reopening: %d %v", code, err)
	}
	if err := rt.Start(runtimetest.Context(t), only.Id); err != nil {
		t.Error(err)
	}
}

// Containers outlive their monitor, with what they print meanwhile; only the
// exit code of those that end without one is lost.
func TestMonitorKilled(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	talks := begin(t, rt, runtimetest.Spec(h.layer, "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"))
	ends := begin(t, rt, runtimetest.Spec(h.layer, "sh", "-c", "sleep 0.3; exit 9"))
	for range 3 {
		h.stopMonitor()
		time.Sleep(400 * time.Millisecond) // it prints into its pipe, nobody reads
		n := strings.Count(logText(t, rt, talks), "\n")
		runtimetest.Eventually(t, "output goes on", func() bool { return strings.Count(logText(t, rt, talks), "\n") > n+5 })
	}
	for i, line := range strings.Split(strings.TrimSpace(logText(t, rt, talks)), "\n") {
		if line != fmt.Sprint(i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
	if s := state(t, rt, talks); s.GetState() != v1.ContainerState_CONTAINER_STATE_RUNNING {
		t.Errorf("it runs: %v", s)
	}
	if s, err := rt.Wait(runtimetest.Context(t), ends); err != nil || s.ExitCode != 255 {
		t.Errorf("ended without a monitor: %v %v", s, err)
	}
	if s, err := rt.Stop(runtimetest.Context(t), talks, "KILL", 0); err != nil || s.State != v1.ContainerState_CONTAINER_STATE_EXITED {
		t.Errorf("stop: %v %v", s, err)
	}
	if err := rt.Start(runtimetest.Context(t), ends); err != nil {
		t.Error(err)
	}
	if s, err := rt.Wait(runtimetest.Context(t), ends); err != nil || s.ExitCode != 9 {
		t.Errorf("started again: %v %v", s, err)
	}
}

// runc killed at any point: the start fails or works, nothing is left over.
func TestRuncKilled(t *testing.T) {
	h := newHost(t)
	wrapper := filepath.Join(h.dir, "runc")
	script := fmt.Sprintf("#!/bin/sh\n%s \"$@\" & p=$!\nread d < %s/delay\n(sleep $d; kill -9 $p) 2>/dev/null &\nwait $p\n", h.opts.Runc, h.dir)
	if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	h.opts.Runc = wrapper
	rt := h.open()
	ctx := runtimetest.Context(t)
	s := runtimetest.Spec(h.layer, "true")
	if err := rt.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for ms := 2; ms < 500; ms += 25 {
		if err := os.WriteFile(filepath.Join(h.dir, "delay"), fmt.Appendf(nil, "%.3f\n", float64(ms)/1000), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := rt.Start(ctx, s.Id); err != nil {
			failed++
			if st := state(t, rt, s.Id).GetState(); st != v1.ContainerState_CONTAINER_STATE_CREATED && st != v1.ContainerState_CONTAINER_STATE_EXITED {
				t.Errorf("after a failed start: %v", st)
			}
			continue
		}
		if _, err := rt.Wait(ctx, s.Id); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d of 20 starts failed", failed)
	if err := os.WriteFile(filepath.Join(h.dir, "delay"), []byte("60\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := rt.Start(ctx, s.Id); err != nil {
		t.Fatalf("undisturbed: %v", err)
	}
	if st, err := rt.Wait(ctx, s.Id); err != nil || st.ExitCode != 0 {
		t.Fatal(st, err)
	}
	if err := rt.Delete(ctx, s.Id, false); err != nil {
		t.Fatal(err)
	}
	h.nothingLeft(t, rt)
}

// nothingLeft deletes all containers and checks that no trace of any remains.
func (h *host) nothingLeft(t *testing.T, rt *oci.Runtime) {
	t.Helper()
	ctx := runtimetest.Context(t)
	l, err := rt.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range l {
		if err := rt.Delete(ctx, s.Id, true); err != nil {
			t.Errorf("delete %s: %v", s.Id, err)
		}
	}
	if err := rt.Unmount(ctx, h.layer); err != nil {
		t.Error(err)
	}
	for _, d := range []string{"state/containers", "run/c", "run/d", "run/runc"} {
		es, err := os.ReadDir(filepath.Join(h.dir, d))
		if err != nil || len(es) > 0 {
			t.Errorf("%s: %v %v", d, es, err)
		}
	}
	es, _ := os.ReadDir(filepath.Join(h.dir, "m"))
	for _, e := range es {
		if e.IsDir() {
			t.Errorf("the monitor keeps %s", e.Name())
		}
	}
	lay, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	if c := lay.Children(h.opts.CgroupParent); len(c) > 0 {
		t.Errorf("cgroups: %v", c)
	}
	if out, _ := exec.Command("grep", "-F", h.dir, "/proc/self/mountinfo").Output(); len(out) > 0 {
		t.Errorf("mounts: %s", out)
	}
}

// What has been started is the container's program, not the runtime's about to
// become it: whoever looks, or pauses it, meets the program.
func TestStartedIsProgram(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	var wg sync.WaitGroup
	for range 8 {
		s := runtimetest.Spec(h.layer, "sleep", "1000")
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), runtimetest.Limit)
			defer cancel()
			err := rt.Create(ctx, s)
			if err == nil {
				err = rt.Start(ctx, s.Id)
			}
			if err != nil {
				t.Error(err)
				return
			}
			ps, err := rt.Top(ctx, s.Id)
			if err != nil || len(ps) != 1 || ps[0].Command != "sleep 1000" {
				t.Errorf("%s: %v %v", s.Id, ps, err)
			}
			if err := rt.Pause(ctx, s.Id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestKilledAnywhere kills the process that uses the runtime, and sometimes the
// monitor, at random moments while containers come and go.
func TestKilledAnywhere(t *testing.T) {
	h := newHost(t)
	rounds := 12
	for round := range rounds {
		cmd := exec.Command("/proc/self/exe", "churn")
		cmd.Env = append(os.Environ(), "TANDEM_CHURN="+h.dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(150+rand.IntN(900)) * time.Millisecond)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if round%3 == 2 {
			h.stopMonitor()
		}
	}
	rt := h.open()
	l, err := rt.List(runtimetest.Context(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d containers are left after %d kills", len(l), rounds)
	for _, s := range l {
		// Whatever it is, it works.
		ctx := runtimetest.Context(t)
		if err := rt.Start(ctx, s.Id); err != nil {
			t.Errorf("start %v: %v", s, err)
			continue
		}
		if st, err := rt.Wait(ctx, s.Id); err != nil {
			t.Errorf("%v %v", st, err)
		}
	}
	h.nothingLeft(t, rt)
}

// churn is what TestKilledAnywhere kills.
func churn(dir string) {
	t := &childT{}
	h := &host{t: t, dir: dir, image: filepath.Join(dir, "busybox.img"), layer: "sha256:" + filepath.Base(dir)}
	h.configure()
	rt := h.open()
	ctx := context.Background()
	for {
		s := runtimetest.Spec(h.layer, "sh", "-c", "sleep 0.1; exit 3")
		if err := rt.Create(ctx, s); err != nil {
			t.Fatal(err)
		}
		if err := rt.Start(ctx, s.Id); err != nil {
			t.Fatal(err)
		}
		if rand.IntN(2) == 0 {
			if _, err := rt.Wait(ctx, s.Id); err != nil {
				t.Fatal(err)
			}
		}
		if rand.IntN(3) > 0 {
			if err := rt.Delete(ctx, s.Id, true); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// childT reports a child process's trouble and ends it.
type childT struct{ testing.TB }

func (*childT) Helper()        {}
func (*childT) Cleanup(func()) {}
func (*childT) Fatal(a ...any) { fmt.Fprintln(os.Stderr, append([]any{"churn:"}, a...)...); os.Exit(3) }
func (*childT) Fatalf(f string, a ...any) {
	fmt.Fprintf(os.Stderr, "churn: "+f+"\n", a...)
	os.Exit(3)
}

// TestBoot: after a boot nothing is mounted and no monitor knows anything;
// containers are still there, ended, with their writable layers.
func TestBoot(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	id := begin(t, rt, runtimetest.Spec(h.layer, "sh", "-c", "test -e /mark && exit 4; touch /mark; sleep 1000"))
	runtimetest.Eventually(t, "the mark", func() bool {
		code, err := rt.Exec(runtimetest.Context(t), &v1.ExecSpec{ContainerId: id, Args: []string{"test", "-e", "/mark"}}, runtime.Streams{})
		return err == nil && code == 0
	})
	rt.Close()
	h.stopMonitor()
	lay, _ := cgroup.Detect()
	g := lay.Group(h.opts.CgroupParent)
	if err := g.Kill(runtimetest.Context(t)); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(runtimetest.Context(t)); err != nil {
		t.Fatal(err)
	}
	out, _ := exec.Command("sh", "-c", "grep -F \" $1/\" /proc/self/mountinfo | cut -d' ' -f5 | sort -r", "sh", h.dir).Output()
	for _, p := range splitLines(string(out)) {
		runtimetest.Eventually(t, "unmount "+p, func() bool { return unix.Unmount(p, 0) == nil })
	}
	for _, d := range []string{"run", "m"} {
		if err := os.RemoveAll(filepath.Join(h.dir, d)); err != nil {
			t.Fatal(err)
		}
	}
	rt = h.open()
	if s := state(t, rt, id); s.GetState() != v1.ContainerState_CONTAINER_STATE_EXITED || s.ExitCode != 255 {
		t.Fatalf("after a boot: %v", s)
	}
	if err := rt.Start(runtimetest.Context(t), id); err != nil {
		t.Fatal(err)
	}
	if s, err := rt.Wait(runtimetest.Context(t), id); err != nil || s.ExitCode != 4 {
		t.Errorf("the writable layer: %v %v", s, err)
	}
}

// TestManyLayers: overlay's options must fit into a page.
func TestManyLayers(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	ctx := runtimetest.Context(t)
	s := runtimetest.Spec(h.layer, "sh", "-c", "cat /layer; ls /n | wc -l")
	for i := range 60 {
		dir := filepath.Join(h.dir, "l", fmt.Sprint(i))
		if err := os.MkdirAll(filepath.Join(dir, "n"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"layer": fmt.Sprintln(i), fmt.Sprint("n/", i): ""} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		id := fmt.Sprintf("sha256:%064d", i)
		runtimetest.Ext4(t, dir+".img", 1<<20, dir)
		if _, err := rt.Mount(ctx, &v1.MountDiskRequest{Id: id, Path: dir + ".img", ReadOnly: true}); err != nil {
			t.Fatal(err)
		}
		s.Layers = append(s.Layers, id)
	}
	begin(t, rt, s)
	if st, err := rt.Wait(ctx, s.Id); err != nil || st.ExitCode != 0 || logText(t, rt, s.Id) != "59\n60\n" {
		t.Errorf("%v %v %q", st, err, logText(t, rt, s.Id))
	}
	if err := rt.Delete(ctx, s.Id, false); err != nil {
		t.Error(err)
	}
}

// A start whose caller went away is not lost and not made twice: the next one
// takes over what the monitor made of it.
func TestStartThatNobodyWaitedFor(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	cut := 0
	for i := range 12 {
		s := runtimetest.Spec(h.layer, "sleep", "1000")
		if err := rt.Create(runtimetest.Context(t), s); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(10+8*i)*time.Millisecond)
		if rt.Start(ctx, s.Id) != nil {
			cut++
		}
		cancel()
		if i%2 == 0 { // as after a restart
			rt.Close()
			rt = h.open()
		}
		if err := rt.Start(runtimetest.Context(t), s.Id); err != nil {
			t.Fatalf("start again: %v", err)
		}
		if st := state(t, rt, s.Id); st.GetState() != v1.ContainerState_CONTAINER_STATE_RUNNING {
			t.Fatalf("after the second start: %v", st)
		}
		if err := rt.Delete(runtimetest.Context(t), s.Id, true); err != nil {
			t.Fatal(err)
		}
	}
	if cut == 0 {
		t.Error("no start was cut off: the limits are too generous for this machine")
	}
}
