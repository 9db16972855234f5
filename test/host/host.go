package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Host is one simulated server with Tandem on it.
type Host struct {
	t     testing.TB
	Dir   string // everything of it lies below
	Bin   string // tandem, runc, guest/
	init  *exec.Cmd
	state string // State, if it is not the usual one
	serve **exec.Cmd
	log   *os.File
}

// LibDir is where tandem, tandemd, runc and guest/ lie.
func LibDir(t testing.TB) string {
	d := os.Getenv("TANDEM_LIB_DIR")
	if d == "" {
		_, file, _, _ := runtime.Caller(0)
		d = filepath.Join(filepath.Dir(file), "../../bin")
	}
	d, err := filepath.Abs(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(d, "tandem")); err != nil {
		t.Fatalf("%v: build first with: make guest", err)
	}
	return d
}

// New makes namespaces and a state directory; Launch runs Tandem in them.
func New(t testing.TB) *Host {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "te-") // short: unix sockets' paths are
	if err != nil {
		t.Fatal(err)
	}
	h := &Host{t: t, Dir: dir, Bin: LibDir(t), serve: new(*exec.Cmd)}
	h.Boot()
	h.log, err = os.Create(filepath.Join(dir, "serve.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	return h
}

// Boot makes the namespaces: by New, and after a Crash, with the directories as they
// were left.
func (h *Host) Boot() {
	h.t.Helper()
	h.init = exec.Command("/proc/self/exe")
	h.init.Env = append(os.Environ(), envInit+"="+cgroupMounts())
	h.init.Stderr = os.Stderr
	h.init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
	}
	out, err := h.init.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.init.Start(); err != nil {
		h.t.Fatalf("make namespaces (this needs root): %v", err)
	}
	line := make([]byte, 6)
	if _, err := io.ReadFull(out, line); err != nil {
		h.t.Fatalf("host init: %v", err)
	}
}

// close ends the host. With all its processes gone the kernel takes mounts,
// links and namespaces back; what could remain is looked for.
func (h *Host) close() {
	if h.t.Failed() {
		b, _ := os.ReadFile(h.log.Name())
		if len(b) > 20000 {
			b = b[len(b)-20000:]
		}
		h.t.Logf("serve.log:\n%s", b)
	}
	if *h.serve != nil {
		h.Kill9()
	}
	out, err := h.Try("reset", "--yes", "--state-dir", h.State(), "--run-dir", h.RunDir())
	if err != nil {
		h.t.Errorf("reset: %v\n%s", err, out)
	}
	if left := h.Processes("qemu-system", "tandem"); len(left) > 0 {
		h.t.Errorf("left behind after reset: %v", left)
	}
	h.init.Process.Kill()
	h.init.Wait()
	if left := h.cgroupsLeft(); len(left) > 0 {
		h.t.Errorf("control groups left behind: %v", left)
	}
	h.log.Close()
	os.RemoveAll(h.Dir)
}

// State is its state directory.
func (h *Host) State() string {
	if h.state != "" {
		return h.state
	}
	return filepath.Join(h.Dir, "s")
}

// RunDir is where its sockets are.
func (h *Host) RunDir() string { return filepath.Join(h.Dir, "r") }

// cgroupsLeft lists groups of this host's that still exist.
func (h *Host) cgroupsLeft() []string {
	sum := sha256.Sum256([]byte(h.RunDir()))
	var left []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/tandem-", "/sys/fs/cgroup/tandem-"} {
		m, _ := filepath.Glob(pattern + hex.EncodeToString(sum[:4]) + "*/*")
		left = append(left, m...)
	}
	return left
}

// Inside is a command in the host's namespaces.
func (h *Host) Inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	pid := strconv.Itoa(h.init.Process.Pid)
	c := exec.CommandContext(ctx, "nsenter", append([]string{"-t", pid, "-n", "-m", "-p", "-u", "-i", "--", name}, args...)...)
	c.Env = append(os.Environ(), "TANDEM_HOST=unix://"+h.RunDir()+"/tandem.sock", "COMPOSE_PROJECT_NAME=")
	// nsenter's child would live on, and hold the pipes: both go.
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return unix.Kill(-c.Process.Pid, unix.SIGKILL) }
	c.WaitDelay = 10 * time.Second
	return c
}

// Launch starts `tandem serve` and waits until it answers.
func (h *Host) Launch(flags ...string) {
	h.t.Helper()
	args := append([]string{"serve", "--state-dir", h.State(), "--run-dir", h.RunDir(), "--lib-dir", h.Bin}, flags...)
	c := h.Inside(context.Background(), filepath.Join(h.Bin, "tandem"), args...)
	c.Stdout, c.Stderr = h.log, h.log
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	*h.serve = c
	h.Eventually(60*time.Second, "tandem serve answers", func() error {
		out, err := h.Try("host", "ls", "--format", "json")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		var hosts []struct {
			Connected bool `json:"connected"`
		}
		if err := json.Unmarshal([]byte(out), &hosts); err != nil {
			return err
		}
		if len(hosts) != 1 || !hosts[0].Connected {
			return errors.New("the agent is not connected")
		}
		return nil
	})
}

// Kill9 kills `tandem serve` (nsenter's child too).
func (h *Host) Kill9() {
	pids := h.Server()
	for _, p := range pids {
		unix.Kill(p, unix.SIGKILL)
	}
	(*h.serve).Process.Kill()
	(*h.serve).Wait()
	*h.serve = nil
	// nsenter is gone; the server itself may still be letting go of its files.
	h.Eventually(time.Minute, "the killed server is gone", func() error {
		for _, p := range pids {
			// A zombie may have threads that still end, and with them its files.
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
			threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", p))
			if err == nil && (!strings.Contains(string(stat), ") Z ") || len(threads) > 1) {
				return fmt.Errorf("process %d with %d threads: %s", p, len(threads), stat)
			}
		}
		return nil
	})
}

// Try runs tandem in the host and returns what it printed on standard output;
// an error holds what it printed on standard error.
func (h *Host) Try(args ...string) (string, error) {
	return h.TryFor(10*time.Minute, "", args...)
}

// Stop ends `tandem serve` as a service manager does.
func (h *Host) Stop() {
	h.t.Helper()
	for _, p := range h.Server() {
		unix.Kill(p, unix.SIGTERM)
	}
	done := make(chan error, 1)
	c := *h.serve
	go func() { done <- c.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			h.t.Errorf("tandem serve ended with %v after SIGTERM", err)
		}
	case <-time.After(60 * time.Second):
		h.t.Errorf("tandem serve does not end on SIGTERM")
		h.Kill9()
	}
	*h.serve = nil
}

// SmallState puts the state directory on an ext4 file system of its own, of so
// many MiB, and returns where that is mounted (in the host only). Call it before
// Launch.
func (h *Host) SmallState(mib int) string {
	h.t.Helper()
	img, dir := filepath.Join(h.Dir, "disk.img"), filepath.Join(h.Dir, "disk")
	run(h.t, "truncate", "-s", strconv.Itoa(mib)+"M", img)
	run(h.t, "mkfs.ext4", "-q", "-m", "0", img)
	if err := os.Mkdir(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	h.Do("mount", "-o", "loop", img, dir)
	h.state = filepath.Join(dir, "s")
	h.Do("mkdir", h.state)
	return dir
}

// Do runs a program in the host, which must succeed, and returns what it printed.
func (h *Host) Do(name string, args ...string) string {
	h.t.Helper()
	out, err := h.Inside(context.Background(), name, args...).CombinedOutput()
	if err != nil {
		h.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Alive says whether `tandem serve` runs; if it ended by itself, that is noted.
func (h *Host) Alive() bool {
	if len(h.Server()) > 0 {
		return true
	}
	if *h.serve != nil {
		(*h.serve).Wait()
		*h.serve = nil
	}
	return false
}

// Log is what `tandem serve` has logged.
func (h *Host) Log() string {
	b, err := os.ReadFile(h.log.Name())
	if err != nil {
		h.t.Error(err)
	}
	return string(b)
}

// TryFor is Try with a limit of time and something on standard input.
func (h *Host) TryFor(d time.Duration, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	c := h.Inside(ctx, filepath.Join(h.Bin, "tandem"), args...)
	var out, errb bytes.Buffer
	c.Stdin, c.Stdout, c.Stderr = strings.NewReader(stdin), &out, &errb
	err := c.Run()
	if err != nil {
		err = fmt.Errorf("tandem %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errb.String()))
	}
	return out.String(), err
}

// Tandem is Try that must succeed.
func (h *Host) Tandem(args ...string) string {
	h.t.Helper()
	out, err := h.Try(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// Curl gets a page from inside the host.
func (h *Host) Curl(url string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := h.Inside(ctx, "curl", "-sS", "--max-time", "20", url).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("curl %s: %w: %s", url, err, out)
	}
	return string(out), nil
}

// Eventually polls until f answers nil; the deadline is generous, since machines
// may be emulated.
func (h *Host) Eventually(d time.Duration, what string, f func() error) {
	h.t.Helper()
	deadline := time.Now().Add(d)
	var err error
	for {
		if err = f(); err == nil {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s: not within %s: %v", what, d, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Server is the process of `tandem serve`, or of `tandem agent` in a host that joined.
func (h *Host) Server() []int {
	var out []int
	for _, p := range h.Find("tandemd") {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
		if a := strings.Split(string(b), "\x00"); len(a) > 1 && filepath.Base(a[0]) == "tandemd" && (a[1] == "serve" || a[1] == "agent") {
			out = append(out, p)
		}
	}
	return out
}

// In is the same host for a subtest.
func (h *Host) In(t testing.TB) *Host {
	sub := *h
	sub.t = t
	return &sub
}
