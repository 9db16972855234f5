package oci_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/runtimetest"
)

// TestImageWithoutEtc runs an image that has nothing but a program.
func TestImageWithoutEtc(t *testing.T) {
	h := newHost(t)
	rt := h.open()
	ctx := runtimetest.Context(t)
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	image, layer := filepath.Join(h.dir, "scratch.img"), "sha256:scratch"
	runtimetest.Ext4(t, image, 16<<20, root)
	if _, err := rt.Mount(ctx, &v1.MountDiskRequest{Id: layer, Path: image, ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	for user, want := range map[string]string{"": "uid=0 gid=0 groups=0", "7:8": "uid=7 gid=8 groups=8"} {
		s := runtimetest.Spec(layer, "/busybox", "id")
		s.User = user
		if err := rt.Create(ctx, s); err != nil {
			t.Fatal(err)
		}
		if err := rt.Start(ctx, s.Id); err != nil {
			t.Fatal(err)
		}
		st, err := rt.Wait(ctx, s.Id)
		if err != nil || st.ExitCode != 0 {
			t.Fatal(st, err)
		}
		out := ""
		if err := rt.Logs(ctx, &v1.LogOptions{ContainerId: s.Id, Tail: -1}, func(e *v1.LogEntry) error { out += string(e.Line); return nil }); err != nil {
			t.Fatal(err)
		}
		if out != want+"\n" && out != want {
			t.Errorf("user %q: %q instead of %q", user, out, want)
		}
		if err := rt.Delete(ctx, s.Id, true); err != nil {
			t.Error(err)
		}
	}
	if err := rt.Unmount(ctx, layer); err != nil {
		t.Error(err)
	}
}
