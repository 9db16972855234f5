package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// TestBackupAndRestore: the server's state is lost and comes back from a backup.
// Machines and containers run on meanwhile, and are its own again.
func TestBackupAndRestore(t *testing.T) {
	h := host.New(t)
	h.Launch("--no-clone")
	h.Images()
	h.Tandem("run", "-d", "--name", "inside", "-v", "data:/data", "--stop-timeout", "1", "busybox", "sh", "-c", "echo precious > /data/f; exec sleep 100000")
	h.Tandem("run", "-d", "--name", "metal", "--isolation", "metal", "--stop-timeout", "1", "busybox", "sleep", "100000")
	h.Eventually(2*time.Minute, "both run", func() error {
		return errors.Join(inMachine(h.Container("inside")), inMachine(h.Container("metal")))
	})
	before, err := h.Containers()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(h.Dir, "backup")
	h.Tandem("state", "backup", file)
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the backup: %v, %v", st, err)
	}
	// The state goes on after the backup.
	h.Tandem("run", "-d", "--name", "later", "--isolation", "metal", "--stop-timeout", "1", "busybox", "sleep", "100000")
	h.Eventually(time.Minute, "a third runs", func() error { return inMachine(h.Container("later")) })

	restore := func() error {
		_, err := h.TryFor(2*time.Minute, "", "state", "restore", file, "--state-dir", h.State(), "--run-dir", h.RunDir())
		return err
	}
	if err := restore(); err == nil || !strings.Contains(err.Error(), "another server (pid ") {
		t.Errorf("restoring under a running server: %v", err)
	}
	h.Stop()
	if err := restore(); err == nil || !strings.Contains(err.Error(), "there is a state") {
		t.Errorf("restoring over a state: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(h.State(), "server", "server")); err != nil {
		t.Fatal(err)
	}
	if err := restore(); err != nil {
		t.Fatal(err)
	}
	h.Launch("--no-clone")
	h.Eventually(2*time.Minute, "what was in the backup is known, and nothing else", func() error {
		now, err := h.Containers()
		if err != nil {
			return err
		}
		for name, c := range before {
			if err := inMachine(now[name]); err != nil {
				return err
			}
			if now[name].Status.StartedAt != c.Status.StartedAt || now[name].Assignment.IP != c.Assignment.IP {
				t.Fatalf("%s was %+v and is %+v", name, c, now[name])
			}
		}
		if len(now) != len(before) {
			return fmt.Errorf("there are %d containers", len(now))
		}
		if n := len(h.Pids("sleep", "100000")); n != 1 {
			return fmt.Errorf("%d processes on metal", n)
		}
		return nil
	})
	if out, err := h.TryFor(time.Minute, "", "exec", "inside", "cat", "/data/f"); err != nil || out != "precious\n" {
		t.Errorf("the volume: %q, %v", out, err)
	}
	h.Tandem("stop", "metal")
	h.Tandem("start", "metal")
	if out, err := h.TryFor(3*time.Minute, "", "run", "--rm", "busybox", "echo", "new"); err != nil || out != "new\n" {
		t.Errorf("something new: %q, %v", out, err)
	}
}
