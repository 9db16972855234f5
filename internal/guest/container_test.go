package guest_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
	"tandem/internal/runtime/remote"
)

// layer makes a disk with busybox and attaches it.
func layer(t *testing.T, v *vm, serial string) {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"bin", "etc", "proc", "sys", "dev", "tmp"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("install busybox-static: %v", err)
	}
	if err := os.WriteFile(root+"/bin/busybox", b, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/passwd", []byte("root:x:0:0::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(root+"/etc/group", []byte("root:x:0:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("busybox", root+"/bin/sh"); err != nil {
		t.Fatal(err)
	}
	path := v.file(serial + ".img")
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-d", root, path, "16M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	v.qmp("blockdev-add", map[string]any{"driver": "raw", "node-name": serial, "read-only": true, "file": map[string]any{"driver": "file", "filename": path, "read-only": true}})
	v.qmp("device_add", map[string]any{"driver": "scsi-hd", "id": serial, "drive": serial, "bus": "scsi0.0", "serial": serial})
}

func spec(id string, args ...string) *v1.RuntimeSpec {
	return &v1.RuntimeSpec{Id: id, Name: id, Args: args, Env: []string{"PATH=/bin"}, Cwd: "/", Layers: []string{"base"},
		Network: &v1.RuntimeNetwork{Mode: "none"}}
}

func logsOf(ctx context.Context, rt runtime.Runtime, id string) string {
	var out bytes.Buffer
	rt.Logs(ctx, &v1.LogOptions{ContainerId: id, Tail: -1}, func(e *v1.LogEntry) error {
		out.Write(e.Line)
		return nil
	})
	return out.String()
}

func TestContainersOutliveTheAgent(t *testing.T) {
	v := bootTest(t)
	a := v.connect()
	in := v.inside()
	scratch(t, v, "scratch0", 128<<20)
	req := configuration("m-1")
	req.ScratchSerial = "scratch0"
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	rt := remote.NewClient(a.http, rpc.BaseURL)
	if _, err := rt.List(ctx); err == nil {
		t.Error("containers before Configure")
	}
	call(t, a.Configure, req)
	layer(t, v, "base")
	if _, err := rt.Mount(ctx, &v1.MountDiskRequest{Id: "base", Serial: "base", ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	run := func(id string, args ...string) {
		t.Helper()
		if err := rt.Create(ctx, spec(id, args...)); err != nil {
			t.Fatal(err)
		}
		if err := rt.Start(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	run("once", "/bin/busybox", "sh", "-c", "echo hello; exit 3")
	st, err := rt.Wait(ctx, "once")
	if err != nil || st.ExitCode != 3 {
		t.Fatalf("%v, %v", st, err)
	}
	t.Logf("create to exit: %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	run("again", "/bin/busybox", "true")
	if _, err := rt.Wait(ctx, "again"); err != nil {
		t.Fatal(err)
	}
	t.Logf("and the second time: %v", time.Since(began).Round(time.Millisecond))
	if got := logsOf(ctx, rt, "once"); got != "hello\n" {
		t.Errorf("log: %q", got)
	}
	run("long", "/bin/busybox", "sh", "-c", "while :; do echo tick; busybox sleep 0.2; done")
	run("brief", "/bin/busybox", "sh", "-c", "busybox sleep 1; exit 5")

	pid := in.do("agent")
	in.do("kill 9 %s", pid)
	a = v.connect()
	rt = remote.NewClient(a.http, rpc.BaseURL)
	eventually(t, "containers are found again", func() bool {
		l, err := rt.List(ctx)
		return err == nil && len(l) == 4
	})
	if st, err = rt.Wait(ctx, "brief"); err != nil || st.ExitCode != 5 {
		t.Errorf("exit code of one that ended meanwhile: %v, %v", st, err)
	}
	before := len(logsOf(ctx, rt, "long"))
	eventually(t, "the log goes on", func() bool { return len(logsOf(ctx, rt, "long")) > before })
	var out bytes.Buffer
	code, err := rt.Exec(ctx, &v1.ExecSpec{ContainerId: "long", Args: []string{"/bin/busybox", "echo", "inside"}}, runtime.Streams{Stdout: &out})
	if err != nil || code != 0 || out.String() != "inside\n" {
		t.Errorf("exec: %d, %v, %q", code, err, out.String())
	}
	res := call(t, a.Resources, &v1.GuestResourcesRequest{})
	t.Logf("overhead %d MiB of %d MiB used", res.OverheadBytes>>20, res.Usage.MemoryBytes>>20)
	call(t, a.Shutdown, &v1.ShutdownRequest{})
	select {
	case <-v.exited:
	case <-time.After(patience):
		t.Error("the machine is still there")
	}
}
