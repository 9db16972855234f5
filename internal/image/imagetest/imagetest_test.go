package imagetest

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"tandem/internal/image"
)

// runIn loads an archive, mounts its layers as an overlay and runs a command in it.
func runIn(t *testing.T, archive, ref string, argv ...string) string {
	t.Helper()
	ctx := context.Background()
	s, err := image.Open(t.TempDir(), image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := s.Load(ctx, f, nil); err != nil {
		t.Fatal(err)
	}
	if err := s.Lease(ctx, "test", ref); err != nil {
		t.Fatal(err)
	}
	layers, err := s.Layers(ctx, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	var lower []string
	unmount := func(dir string) {
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	for _, l := range layers {
		dir := t.TempDir()
		if out, err := exec.Command("mount", "-t", l.FSType, "-o", "loop,ro", l.Path, dir).CombinedOutput(); err != nil {
			t.Fatalf("mount: %v: %s", err, out)
		}
		unmount(dir)
		lower = append([]string{dir}, lower...)
	}
	root := lower[0]
	if len(lower) > 1 {
		root = t.TempDir()
		if err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
			t.Fatal(err)
		}
		unmount(root)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &unix.SysProcAttr{Chroot: root}
	cmd.Dir, cmd.Path, cmd.Err = "/", argv[0], nil
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", argv, err, out)
	}
	return string(out)
}

func TestBusyboxImageRuns(t *testing.T) {
	out := runIn(t, BusyboxImage(t), BusyboxRef, "/bin/sh", "-c", "echo hello | tr a-z A-Z; ls -d / /lost+found 2>&1; id -un")
	if !strings.Contains(out, "HELLO") || !strings.Contains(out, "root") || !strings.Contains(out, "/lost+found: No such file") {
		t.Errorf("output: %s", out)
	}
}

func TestLddClosureRuns(t *testing.T) {
	archive := LddClosure(t, "slim:test", Config{Cmd: []string{"/usr/bin/sort"}}, "/usr/bin/sort", "/etc/debian_version")
	want, err := os.ReadFile("/etc/debian_version")
	if err != nil {
		t.Fatal(err)
	}
	if out := runIn(t, archive, "slim:test", "/usr/bin/sort", "/etc/debian_version"); out != string(want) {
		t.Errorf("output: %q, want %q", out, want)
	}
}
