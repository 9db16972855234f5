package monitor

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/runtime/cgroup"
)

// TestMain lets the test program be the monitor, and the OCI runtime that it calls.
func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == "runc":
		if err := fakeRunc(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case len(os.Args) == 4 && os.Args[1] == "serve-monitor":
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		if err := Serve(context.Background(), Options{Dir: os.Args[2], Socket: os.Args[3], Logger: log}); err != nil {
			log.Error("monitor", "error", err)
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

// fakeRunc runs the shell program that is in a bundle, in the control group named
// there, and counts its runs. A bundle with a file "fails" does not run; one with
// "hangs" never gets there.
func fakeRunc(args []string) error {
	opts, verb := map[string]string{}, ""
	for len(args) > 1 {
		switch {
		case !strings.HasPrefix(args[0], "--"):
			verb, args = args[0], args[1:]
		case args[0] == "--detach":
			args = args[1:]
		default:
			opts[args[0]], args = args[1], args[2:]
		}
	}
	state := filepath.Join(opts["--root"], args[0])
	var argv []string
	switch verb {
	case "run":
		bundle := opts["--bundle"]
		if why, err := os.ReadFile(filepath.Join(bundle, "fails")); err == nil {
			line, _ := json.Marshal(map[string]string{"level": "error", "msg": string(why)})
			os.WriteFile(opts["--log"], line, 0o600)
			return fmt.Errorf("%s", why)
		}
		f, err := os.OpenFile(filepath.Join(bundle, "runs"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err == nil {
			_, err = f.WriteString("x")
		}
		if err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(bundle, "hangs")); err == nil {
			select {}
		}
		if err := os.MkdirAll(state, 0o700); err != nil {
			return err
		}
		group, err := os.ReadFile(filepath.Join(bundle, "cgroup"))
		if err == nil {
			err = os.WriteFile(filepath.Join(state, "cgroup"), group, 0o600)
		}
		if err != nil {
			return err
		}
		program, err := os.ReadFile(filepath.Join(bundle, "program"))
		if err != nil {
			return err
		}
		argv = []string{"/bin/sh", "-c", string(program)}
	case "exec":
		var p struct{ Args []string }
		b, err := os.ReadFile(opts["--process"])
		if err == nil {
			err = json.Unmarshal(b, &p)
		}
		if err != nil {
			return err
		}
		argv = p.Args
	}
	group, err := os.ReadFile(filepath.Join(state, "cgroup"))
	if err == nil {
		err = os.MkdirAll(string(group), 0o755)
	}
	if err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, string(group)}, argv...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	for cgroups, err := cgroup.Detect(); ; time.Sleep(time.Millisecond) { // it is in its group before anybody hears of it
		if err != nil || cgroups.Group(pathBelow(string(group))).Has(cmd.Process.Pid) || !alive(cmd.Process.Pid) {
			break
		}
	}
	return os.WriteFile(opts["--pid-file"], []byte(strconv.Itoa(cmd.Process.Pid)), 0o600)
}

// groupRoot is where the test's control groups are made.
func groupRoot() string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "/sys/fs/cgroup"
	}
	return "/sys/fs/cgroup/pids"
}

func pathBelow(dir string) string { return strings.TrimPrefix(dir, groupRoot()) }

// rig is a monitor in a process of its own.
type rig struct {
	t      *testing.T
	dir    string
	socket string
	cmd    *exec.Cmd
	*Client
}

var groups atomic.Int64

func newRig(t *testing.T) *rig {
	dir, err := os.MkdirTemp("", "monitor") // short: it is part of a socket's name
	must(t, err)
	r := &rig{t: t, dir: dir, socket: filepath.Join(dir, "s")}
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(self, filepath.Join(dir, "runc")))
	r.Client = NewClient(r.socket, nil)
	r.serve()
	t.Cleanup(func() {
		r.kill()
		if b, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("the monitor said:\n%s", b)
		}
		os.RemoveAll(dir)
	})
	return r
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ctx ends long after anything here takes, and with the test.
func (r *rig) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	r.t.Cleanup(cancel)
	return ctx
}

// serve starts a monitor; the one before must be gone.
func (r *rig) serve() {
	r.t.Helper()
	log, err := os.OpenFile(filepath.Join(r.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(r.t, err)
	defer log.Close()
	r.cmd = exec.Command("/proc/self/exe", "serve-monitor", filepath.Join(r.dir, "m"), r.socket)
	r.cmd.Stderr = log
	must(r.t, r.cmd.Start())
	if _, err := r.Ping(r.ctx()); err != nil {
		r.t.Fatal(err)
	}
}

// kill ends the monitor as kill -9 does.
func (r *rig) kill() {
	r.cmd.Process.Kill()
	r.cmd.Wait()
}

// request is a start of a container that runs a shell program.
func (r *rig) request(id, program string) StartRequest {
	r.t.Helper()
	group := filepath.Join(groupRoot(), fmt.Sprintf("tandem-monitor-test-%d-%d", os.Getpid(), groups.Add(1)))
	bundle := filepath.Join(r.dir, "b-"+id)
	must(r.t, os.MkdirAll(bundle, 0o700))
	must(r.t, os.WriteFile(filepath.Join(bundle, "program"), []byte(program), 0o600))
	must(r.t, os.WriteFile(filepath.Join(bundle, "cgroup"), []byte(group), 0o600))
	r.t.Cleanup(func() {
		cg, err := cgroup.Detect()
		must(r.t, err)
		if err := cg.Group(pathBelow(group)).Kill(r.ctx()); err != nil {
			r.t.Error(err)
		}
		if err := cg.Group(pathBelow(group)).Remove(r.ctx()); err != nil {
			r.t.Error(err)
		}
	})
	return StartRequest{ID: id, Run: 1, Runc: filepath.Join(r.dir, "runc"), Root: filepath.Join(r.dir, "root"), Bundle: bundle, Cgroup: pathBelow(group),
		LogPath: filepath.Join(r.dir, id+".log"), LogMaxSize: 64 << 20, LogMaxFiles: 2}
}

// runs is how often the OCI runtime ran a bundle.
func (r *rig) runs(s StartRequest) int {
	b, _ := os.ReadFile(filepath.Join(s.Bundle, "runs"))
	return len(b)
}

// until waits for a state of a container.
func (r *rig) until(id string, states ...string) Status {
	r.t.Helper()
	ctx, cancel := context.WithCancel(r.ctx())
	defer cancel()
	var got Status
	err := r.Watch(ctx, func(st Status) {
		if st.ID == id && slices.Contains(states, st.State) && got.ID == "" {
			got = st
			cancel()
		}
	}, nil)
	if got.ID == "" {
		r.t.Fatalf("%s does not become %v: %v", id, states, err)
	}
	return got
}

// poll asks until ok, for long enough on a loaded machine.
func (r *rig) poll(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(2 * time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatal("not in time: " + what)
		}
	}
}

func read(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(f)
	return string(b)
}
