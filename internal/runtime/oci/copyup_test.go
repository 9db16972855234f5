package oci

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What a volume was filled with is on its disk: a copy of the disk made at that
// moment, which is what a machine that crashes leaves, holds all of it.
func TestFilledVolumeOutlivesACrash(t *testing.T) {
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	mount := func(disk, at string) string {
		t.Helper()
		at = filepath.Join(dir, at)
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		run("mount", "-o", "loop", disk, at)
		t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
		return at
	}
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, "data/sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"a": "small\n", "sub/b": strings.Repeat("large ", 200_000)}
	for name, content := range want {
		if err := os.WriteFile(filepath.Join(root, "data", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	disk, crashed := filepath.Join(dir, "disk"), filepath.Join(dir, "crashed")
	run("truncate", "-s", "32M", disk)
	run("mkfs.ext4", "-q", disk)
	volume := mount(disk, "volume")
	if err := copyUp(t.Context(), root, "/data", volume); err != nil {
		t.Fatal(err)
	}
	run("cp", disk, crashed)

	after := mount(crashed, "after")
	// Which of its three places it is in depends on what the journal has of the names.
	found := ""
	for _, place := range []string{"", copied, copying} {
		if _, err := os.Stat(filepath.Join(after, place, "a")); err == nil {
			found = filepath.Join(after, place)
		}
	}
	if found == "" {
		t.Fatal("nothing of it is on the disk")
	}
	for name, content := range want {
		if b, err := os.ReadFile(filepath.Join(found, name)); err != nil || string(b) != content {
			t.Errorf("%s has %d bytes of %d after the crash, %v", name, len(b), len(content), err)
		}
	}
}
