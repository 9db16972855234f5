package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tandem/internal/runtime/cgroup"

	"github.com/containerd/errdefs"
)

// Which group holds what runs is decided once a boot.
func TestWorkloads(t *testing.T) {
	d := &dirs{run: t.TempDir()}
	t.Setenv(envCgroup, "")
	group, err := d.workloads()
	if err != nil || group != "/"+d.instance() {
		t.Fatalf("%q, %v", group, err)
	}
	t.Setenv(envCgroup, "/else.slice/where.service")
	if again, err := d.workloads(); err != nil || again != group {
		t.Errorf("it moved from %q to %q, %v", group, again, err)
	}

	d = &dirs{run: t.TempDir()}
	for _, bad := range []string{"/", "a/b", "/a/../b", "/a/", "/a\nb"} {
		t.Setenv(envCgroup, bad)
		if group, err := d.workloads(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q, %v", bad, group, err)
		}
	}
	t.Setenv(envCgroup, "/no-such.slice/no-such.service")
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	group, err = d.workloads()
	if l.Unified() {
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "tandem-workloads.service") {
			t.Errorf("a group that is not there: %q, %v", group, err)
		}
	} else if err != nil || group != "/"+d.instance() {
		t.Errorf("with controllers of v1: %q, %v", group, err)
	}
	if err := os.WriteFile(d.groupFile(), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if group, err := d.workloads(); !errdefs.IsInvalidArgument(err) {
		t.Errorf("rubbish: %q, %v", group, err)
	}
}

// systemd is told when all is ready, not before, and by this process alone.
func TestNotifyReady(t *testing.T) {
	dir := t.TempDir()
	to := filepath.Join(dir, "notify")
	if usable(filepath.Join(dir, "tandem.sock"), false)(t.Context()) {
		t.Error("a server that is not there is ready")
	}
	systemd, err := net.ListenPacket("unixgram", to)
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", to)
	if got := notifySocket(); got != to || os.Getenv("NOTIFY_SOCKET") != "" {
		t.Errorf("%q; children would see %q", got, os.Getenv("NOTIFY_SOCKET"))
	}
	done := make(chan error, 1)
	var ready atomic.Bool
	go func() { done <- notifyReady(t.Context(), to, func(context.Context) bool { return ready.Load() }) }()
	buf := make([]byte, 100)
	_ = systemd.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, _, err := systemd.ReadFrom(buf); err == nil {
		t.Errorf("told %q before it is ready", buf[:n])
	}
	ready.Store(true)
	_ = systemd.SetReadDeadline(time.Now().Add(time.Minute))
	if n, _, err := systemd.ReadFrom(buf); err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("told %q, %v", buf[:n], err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := notifyReady(t.Context(), "", nil); err != nil {
		t.Error("not started by systemd:", err)
	}
}
