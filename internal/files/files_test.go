package files

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestReplace(t *testing.T) {
	for name, replace := range map[string]func(string, []byte, fs.FileMode) error{"Replace": Replace, "ReplaceDurably": ReplaceDurably} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "state")
			for _, c := range []struct {
				content string
				mode    fs.FileMode
			}{{"first", 0o600}, {"", 0o644}, {"second and longer", 0o400}, {"third", 0o600}} {
				if err := replace(path, []byte(c.content), c.mode); err != nil {
					t.Fatal(err)
				}
				b, err := os.ReadFile(path)
				if err != nil || string(b) != c.content {
					t.Errorf("content %q, %v; want %q", b, err, c.content)
				}
				if st, err := os.Stat(path); err != nil || st.Mode().Perm() != c.mode {
					t.Errorf("mode %v, %v; want %v", st.Mode(), err, c.mode)
				}
			}
			only(t, dir, "state")
		})
	}
}

func TestReplaceThatFailsLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state")
	if err := os.MkdirAll(filepath.Join(path, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := ReplaceDurably(path, []byte("x"), 0o600); err == nil {
		t.Error("a file took a directory's place")
	}
	only(t, dir, "state")
	if err := Replace(filepath.Join(dir, "none", "state"), []byte("x"), 0o600); err == nil {
		t.Error("a file was written to no directory")
	}
}

func TestReplaceLeavesALinksTargetAlone(t *testing.T) {
	dir, other := t.TempDir(), filepath.Join(t.TempDir(), "target")
	path := filepath.Join(dir, "state")
	if err := os.WriteFile(other, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, path); err != nil {
		t.Fatal(err)
	}
	if err := Replace(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(other); string(b) != "mine" {
		t.Errorf("the link's target became %q", b)
	}
	if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() {
		t.Errorf("state is %v, %v", st, err)
	}
}

func only(t *testing.T, dir, want string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil || len(list) != 1 || list[0].Name() != want {
		t.Errorf("the directory holds %v, %v; want %s alone", list, err, want)
	}
}
