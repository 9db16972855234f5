package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// TestStartCountsByRun: a start that is repeated (its answer was lost) is answered
// with what the first did, whatever became of it; the next number starts anew.
func TestStartCountsByRun(t *testing.T) {
	r := newRig(t)
	s := r.request("a", "echo hello; read x; exit 7")
	s.Stdin, s.StdinOnce = true, true
	var first Status
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range 8 {
		wg.Go(func() {
			st, err := r.Start(r.ctx(), s)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || st.State != Running || first.PID != 0 && st.PID != first.PID {
				t.Errorf("%+v, %v; before: %+v", st, err, first)
			}
			first = st
		})
	}
	wg.Wait()
	if n := r.runs(s); n != 1 {
		t.Fatalf("eight requests of one start started %d times", n)
	}
	next := s
	next.Run = 2
	if _, err := r.Start(r.ctx(), next); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("the next start while this one runs: %v", err)
	}
	if err := r.Forget(r.ctx(), "a"); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("forgetting what runs: %v", err)
	}
	if code, err := r.Attach(r.ctx(), AttachRequest{ID: "a", Stdin: true}, IO{Stdin: strings.NewReader("")}); err != nil || code != 7 {
		t.Fatal(code, err)
	}
	r.until("a", Exited)
	if st, err := r.Start(r.ctx(), s); err != nil || st.State != Exited || st.ExitCode != 7 || st.Run != 1 || r.runs(s) != 1 {
		t.Fatalf("the same start after its end: %+v, %v, %d runs", st, err, r.runs(s))
	}
	if st, err := r.Start(r.ctx(), next); err != nil || st.Run != 2 || st.State != Running && st.State != Exited || r.runs(s) != 2 {
		t.Fatalf("the next start: %+v, %v, %d runs", st, err, r.runs(s))
	}
}

// TestFailedStart: it says why, leaves nothing, and the same number may try again.
func TestFailedStart(t *testing.T) {
	r := newRig(t)
	s := r.request("a", "exit 3")
	why := filepath.Join(s.Bundle, "fails")
	must(t, os.WriteFile(why, []byte("exec: \"nosuch\": executable file not found in $PATH"), 0o600))
	if _, err := r.Start(r.ctx(), s); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "nosuch") {
		t.Fatal(err)
	}
	if st := r.until("a", Exited); !st.Failed || st.ExitCode != ExitUnknown || !strings.Contains(st.Message, "nosuch") {
		t.Fatalf("%+v", st)
	}
	for _, f := range []string{"0", "1", "2", filePID} {
		if _, err := os.Lstat(filepath.Join(r.dir, "m", "a", f)); err == nil {
			t.Errorf("%s is left", f)
		}
	}
	must(t, os.Remove(why))
	if _, err := r.Start(r.ctx(), s); err != nil {
		t.Fatal(err)
	}
	if st := r.until("a", Exited); st.Failed || st.ExitCode != 3 {
		t.Fatalf("%+v", st)
	}
	if err := r.Forget(r.ctx(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "m", "a")); !errors.Is(err, os.ErrNotExist) {
		t.Error("a forgotten container left its directory:", err)
	}
	if err := r.Forget(r.ctx(), "a"); err != nil {
		t.Error("forgetting twice:", err)
	}
}

// TestRequestsAreChecked: nothing is run for a request that can't be meant.
func TestRequestsAreChecked(t *testing.T) {
	r := newRig(t)
	for _, change := range []func(*StartRequest){
		func(s *StartRequest) { s.ID = "../x" }, func(s *StartRequest) { s.ID = "" }, func(s *StartRequest) { s.ID = strings.Repeat("x", 129) },
		func(s *StartRequest) { s.Runc = "runc" }, func(s *StartRequest) { s.Bundle = "b" }, func(s *StartRequest) { s.Root = "" },
		func(s *StartRequest) { s.LogPath = "log" }, func(s *StartRequest) { s.Cgroup = "/" }, func(s *StartRequest) { s.Cgroup = "x/y" },
	} {
		s := r.request("a", "exit 0")
		change(&s)
		if _, err := r.Start(r.ctx(), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", s, err)
		}
		if r.runs(s) != 0 {
			t.Errorf("%+v was run", s)
		}
	}
	if _, err := r.Exec(r.ctx(), ExecRequest{ID: "nobody"}, IO{}); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	if _, err := r.Attach(r.ctx(), AttachRequest{ID: "../x"}, IO{}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if err := r.Forget(r.ctx(), "../.."); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

// TestOneMonitor: a second one on the same directory gives up.
func TestOneMonitor(t *testing.T) {
	r := newRig(t)
	err := Serve(t.Context(), Options{Dir: filepath.Join(r.dir, "m"), Socket: filepath.Join(r.dir, "other")})
	if !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
}

// TestAdoptAfterKill: containers run on without a monitor, and the next one takes
// them over with their output; only exit codes of the time between are lost.
func TestAdoptAfterKill(t *testing.T) {
	r := newRig(t)
	live := r.request("live", "echo one; while [ ! -e \"$PWD/never\" ] && ! grep -q go "+r.dir+"/signal; do echo tick; sleep 0.02; done; echo last; exit 5")
	must(t, os.WriteFile(filepath.Join(r.dir, "signal"), nil, 0o600))
	ended := r.request("ended", "exit 7")
	between := r.request("between", "read x < "+r.dir+"/fifo; exit 9")
	must(t, unix.Mkfifo(filepath.Join(r.dir, "fifo"), 0o600))
	stuck := r.request("stuck", "exit 0")
	must(t, os.WriteFile(filepath.Join(stuck.Bundle, "hangs"), nil, 0o600))
	pid := map[string]int{}
	for _, s := range []StartRequest{live, ended, between} {
		st, err := r.Start(r.ctx(), s)
		must(t, err)
		pid[s.ID] = st.PID
	}
	r.until("ended", Exited)
	hctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	go r.Start(hctx, stuck) // never answered
	r.poll("the stuck start is under way", func() bool { return r.runs(stuck) == 1 })

	r.kill()
	f, err := os.OpenFile(filepath.Join(r.dir, "fifo"), os.O_WRONLY, 0)
	must(t, err)
	f.Close()
	r.poll("it ended without a monitor", func() bool { return !alive(pid["between"]) })
	r.serve()

	// The log goes on: what was written before, without a monitor and since.
	logged := func(what string) int { return strings.Count(read(live.LogPath), what) }
	was := logged("tick")
	r.poll("output arrives again", func() bool { return logged("tick") > was+3 })
	if st := r.until("live", Running, Exited); st.State != Running || st.PID != pid["live"] || st.Run != 1 {
		t.Errorf("what ran on: %+v", st)
	}
	if st, err := r.Start(r.ctx(), live); err != nil || st.PID != pid["live"] || r.runs(live) != 1 {
		t.Errorf("a repeated start of what was taken over: %+v, %v, %d runs", st, err, r.runs(live))
	}
	if st := r.until("ended", Exited); st.ExitCode != 7 {
		t.Errorf("an exit code that was known is lost: %+v", st)
	}
	if st := r.until("between", Exited); st.ExitCode != ExitUnknown || st.Failed || st.Message == "" {
		t.Errorf("what ended between: %+v", st)
	}
	if st := r.until("stuck", Exited); !st.Failed {
		t.Errorf("what was being started: %+v", st)
	}
	must(t, os.WriteFile(filepath.Join(r.dir, "signal"), []byte("go"), 0o600))
	if st := r.until("live", Exited); st.ExitCode != ExitUnknown || st.Message == "" {
		t.Errorf("its exit code can't be known: %+v", st)
	}
	if logged("one") != 1 || logged("last") != 1 {
		t.Errorf("the log lacks its beginning or end:\n%s", read(live.LogPath))
	}
	must(t, os.Remove(filepath.Join(stuck.Bundle, "hangs")))
	if st, err := r.Start(r.ctx(), stuck); err != nil || st.Run != 1 || r.runs(stuck) != 2 {
		t.Errorf("what never began can be started: %+v, %v", st, err)
	}
}

// TestAdoptRubbish: leftovers that can't be read keep nothing from being served.
func TestAdoptRubbish(t *testing.T) {
	r := newRig(t)
	s := r.request("good", "exec sleep 1000")
	st, err := r.Start(r.ctx(), s)
	must(t, err)
	r.kill()
	for id, content := range map[string]string{"torn": `{"id":"torn","ru`, "other": `{"id":"another"}`, "empty": ""} {
		must(t, os.MkdirAll(filepath.Join(r.dir, "m", id), 0o700))
		must(t, os.WriteFile(filepath.Join(r.dir, "m", id, fileStart), []byte(content), 0o600))
	}
	must(t, os.WriteFile(filepath.Join(r.dir, "m", "good", fileExit), []byte(`{"id":"good","st`), 0o600)) // torn by the kill
	r.serve()
	if now := r.until("good", Running, Exited); now.State != Running || now.PID != st.PID {
		t.Errorf("%+v", now)
	}
	for _, id := range []string{"torn", "other", "empty"} {
		if _, err := os.Stat(filepath.Join(r.dir, "m", id)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", id, err)
		}
	}
}

func argvOf(argv ...string) json.RawMessage {
	b, err := json.Marshal(map[string]any{"args": argv})
	if err != nil {
		panic(err)
	}
	return b
}

// TestExec: streams and exit code; too long means killed; without its client it is
// killed too, unless it is detached.
func TestExec(t *testing.T) {
	r := newRig(t)
	s := r.request("a", "exec sleep 1000")
	_, err := r.Start(r.ctx(), s)
	must(t, err)
	var out, errs bytes.Buffer
	code, err := r.Exec(r.ctx(), ExecRequest{ID: "a", Stdin: true, Process: argvOf("/bin/sh", "-c", "cat; echo oops >&2; exit 4")}, IO{Stdin: strings.NewReader("input"), Stdout: &out, Stderr: &errs})
	if err != nil || code != 4 || out.String() != "input" || errs.String() != "oops\n" {
		t.Fatalf("code %d, %v, out %q, err %q", code, err, &out, &errs)
	}

	pid := func(name string) (n int) {
		r.poll(name+" runs", func() bool { _, err := fmt.Sscan(read(filepath.Join(r.dir, name)), &n); return err == nil })
		return n
	}
	sleeper := func(name string) json.RawMessage {
		return argvOf("/bin/sh", "-c", "echo $$ > "+r.dir+"/"+name+"; exec sleep 1000")
	}
	code, err = r.Exec(r.ctx(), ExecRequest{ID: "a", Process: sleeper("late"), Timeout: 1}, IO{})
	if !errors.Is(err, context.DeadlineExceeded) || code != 137 {
		t.Fatalf("code %d, %v", code, err)
	}
	for _, detach := range []bool{false, true} {
		name := fmt.Sprint("detach", detach)
		ctx, cancel := context.WithCancel(r.ctx())
		done := make(chan error, 1)
		go func() {
			_, err := r.Exec(ctx, ExecRequest{ID: "a", Process: sleeper(name), Detach: detach}, IO{})
			done <- err
		}()
		n := pid(name)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if !detach {
			r.poll("it is killed", func() bool { return !alive(n) })
			continue
		}
		// The monitor has seen its client go when it has let another one do all this.
		if _, err := r.Exec(r.ctx(), ExecRequest{ID: "a", Process: argvOf("/bin/true")}, IO{}); err != nil || !alive(n) {
			t.Errorf("detached: %v, alive %v", err, alive(n))
		}
		must(t, unix.Kill(n, unix.SIGKILL))
	}
	r.poll("nothing of them is left", func() bool {
		left, _ := filepath.Glob(filepath.Join(r.dir, "m", "a", "exec-*"))
		return len(left) == 0
	})
}
