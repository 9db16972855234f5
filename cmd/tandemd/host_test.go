package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestServerGoneWaitsForTheLock: the lock of a server that was killed a moment
// ago comes free by itself; that of one that runs does not, and its pid is told.
func TestServerGoneWaitsForTheLock(t *testing.T) {
	d := &dirs{state: t.TempDir()}
	if err := d.serverGone(t.Context(), 0); err != nil {
		t.Fatal("nothing is there yet:", err)
	}
	lock := filepath.Join(d.state, "server/server/lock")
	if err := os.MkdirAll(filepath.Dir(lock), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(lock, []byte("4711\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	hold := func() *os.File {
		f, err := os.Open(lock)
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	f := hold()
	begin := time.Now()
	err := d.serverGone(t.Context(), 50*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "a server runs on "+d.state+" (pid 4711)") {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < 50*time.Millisecond {
		t.Errorf("refused after %s", took)
	}
	time.AfterFunc(100*time.Millisecond, func() { f.Close() })
	if err := d.serverGone(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
}
