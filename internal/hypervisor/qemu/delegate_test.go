package qemu

import (
	"os"
	"path/filepath"
	"testing"
)

// A group above ours that hands down what is needed is not written to.
func TestDelegate(t *testing.T) {
	for have, want := range map[string]string{
		"cpuset cpu io memory pids\n": "cpuset cpu io memory pids\n",
		"memory pids\n":               "+cpu",
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, "cgroup.subtree_control")
		if err := os.WriteFile(file, []byte(have), 0o600); err != nil {
			t.Fatal(err)
		}
		(&cgroups{}).delegate(dir)
		if b, err := os.ReadFile(file); err != nil || string(b) != want {
			t.Errorf("%q became %q, want %q (%v)", have, b, want, err)
		}
	}
}
