package oci_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/cgroup"
	"tandem/internal/runtime/monitor"
	"tandem/internal/runtime/oci"
	"tandem/internal/runtime/runtimetest"
	"tandem/internal/spawn"
)

// The test binary is the monitor too, as `tandem monitor` is on metal.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "serve-monitor" {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		if err := monitor.Serve(context.Background(), monitor.Options{Dir: os.Args[2], Socket: os.Args[3], Logger: log}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if dir := os.Getenv("TANDEM_CHURN"); dir != "" && len(os.Args) == 2 && os.Args[1] == "churn" {
		churn(dir)
	}
	os.Exit(m.Run())
}

// host is one metal host's runtime, in directories and a cgroup of its own.
type host struct {
	t       testing.TB
	dir     string
	opts    oci.Options
	client  *monitor.Client
	image   string
	layer   string
	spawned func() error
}

func newHost(t testing.TB) *host {
	t.Helper()
	dir, err := os.MkdirTemp("", "toci")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir, image: filepath.Join(dir, "busybox.img"), layer: "sha256:" + filepath.Base(dir)}
	runtimetest.BusyboxImage(t, h.image)
	h.configure()
	t.Cleanup(h.clean)
	return h
}

func (h *host) configure() {
	dir := h.dir
	sock := filepath.Join(dir, "m.sock")
	h.spawned = spawn.Session([]string{"/proc/self/exe", "serve-monitor", filepath.Join(dir, "m"), sock}, filepath.Join(dir, "monitor.log"))
	h.client = monitor.NewClient(sock, h.spawned)
	h.opts = oci.Options{
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"), Runc: runtimetest.Runc(h.t),
		Monitor: h.client, Metal: true, CgroupParent: "/tandem-" + filepath.Base(dir),
		Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	}
}

func (h *host) open() *oci.Runtime {
	h.t.Helper()
	rt, err := oci.New(runtimetest.Context(h.t), h.opts)
	if err != nil {
		b, _ := os.ReadFile(filepath.Join(h.dir, "monitor.log"))
		h.t.Fatalf("open: %v\nmonitor: %s", err, b)
	}
	h.t.Cleanup(func() { rt.Close() })
	if _, err := rt.Mount(runtimetest.Context(h.t), &v1.MountDiskRequest{Id: h.layer, Path: h.image, ReadOnly: true}); err != nil {
		h.t.Fatal(err)
	}
	return rt
}

// clean removes everything whatever the test did.
func (h *host) clean() {
	if h.t.Failed() {
		b, _ := os.ReadFile(filepath.Join(h.dir, "monitor.log"))
		h.t.Logf("monitor's log:\n%s", b)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if l, err := cgroup.Detect(); err == nil {
		g := l.Group(h.opts.CgroupParent)
		if err := g.Kill(ctx); err != nil {
			h.t.Error(err)
		}
		h.stopMonitor()
		if err := g.Remove(ctx); err != nil {
			h.t.Error(err)
		}
	}
	for try := 0; try < 50; try++ {
		out, _ := exec.Command("sh", "-c", "grep -F \" $1/\" /proc/self/mountinfo | cut -d' ' -f5 | sort -r", "sh", h.dir).Output()
		if len(out) == 0 {
			break
		}
		for _, p := range splitLines(string(out)) {
			_ = unix.Unmount(p, 0)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := os.RemoveAll(h.dir); err != nil {
		h.t.Error(err)
	}
}

func splitLines(s string) (out []string) {
	for len(s) > 0 {
		i := 0
		for i < len(s) && s[i] != '\n' {
			i++
		}
		if i > 0 {
			out = append(out, s[:i])
		}
		s = s[min(i+1, len(s)):]
	}
	return out
}

// stopMonitor kills the monitor, hard, and waits until it is gone.
func (h *host) stopMonitor() {
	pid, err := monitor.NewClient(filepath.Join(h.dir, "m.sock"), nil).Ping(shortContext(h.t))
	if err != nil {
		return
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	runtimetest.Eventually(h.t, "the monitor is gone", func() bool { return unix.Kill(pid, 0) != nil })
}

func shortContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestSmoke(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	ctx := runtimetest.Context(t)
	s := runtimetest.Spec(h.layer, "sh", "-c", "id; pwd; env; cat /etc/hosts; ls -la / /run; exit 3")
	if err := rt.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := rt.Start(ctx, s.Id); err != nil {
		t.Fatal(err)
	}
	st, err := rt.Wait(ctx, s.Id)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(time.Since(begin), st)
	if st.ExitCode != 3 {
		t.Error(st)
	}
	if err := rt.Logs(ctx, &v1.LogOptions{ContainerId: s.Id, Tail: -1}, func(e *v1.LogEntry) error { t.Logf("%s", e.Line); return nil }); err != nil {
		t.Error(err)
	}
	if err := rt.Delete(ctx, s.Id, false); err != nil {
		t.Error(err)
	}
	if err := rt.Unmount(ctx, h.layer); err != nil {
		t.Error(err)
	}
}
