package agent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// On a disk where nothing is left the agent's records are written all the same, and
// with space again their reserve is whole again.
func TestRecordsOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tandem-agent-test", dir, "tmpfs", 0, "size=32m"); err != nil {
		t.Fatal("this test needs root:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s, err := openState(filepath.Join(dir, "agent"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { s.close() }()
	eat := func() {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(dir, "eater"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for {
			if _, err := f.Write(make([]byte, 4096)); errors.Is(err, unix.ENOSPC) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	eat()
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte("x"), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the disk is not full: %v", err)
	}
	spec := bytes.Repeat([]byte("spec"), 50<<10/4)
	for i := range 8 { // somebody takes whatever is freed
		for j := range 20 {
			if err := s.write(fmt.Sprintf("containers/c%d.json", j), spec, j%2 == 0); err != nil && i == 0 && j < 10 {
				t.Fatalf("round %d, record %d: %v", i, j, err)
			}
		}
		eat()
		if i == 2 { // as after a kill
			s.close()
			if s, err = openState(filepath.Join(dir, "agent")); err != nil {
				t.Fatal(err)
			}
		}
	}
	for j := range 20 { // those that are there can be written over
		if err := s.write(fmt.Sprintf("containers/c%d.json", j), spec[:100], true); err != nil {
			t.Fatalf("record %d: %v", j, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "eater")); err != nil {
		t.Fatal(err)
	}
	if err := s.write("containers/c.json", spec, true); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(s.path("ballast")); err != nil || st.Size() != ballastSize {
		t.Errorf("the reserve is not whole again: %v, %v", st, err)
	}
}
