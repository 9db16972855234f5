package runtimetest

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func testReadOnly(t *testing.T, tg Target) {
	s := sh(tg, `touch /x 2>/dev/null || echo ro; touch /scratch/x && echo rw`)
	s.ReadOnly = true
	s.Mounts = []*v1.RuntimeMount{{Type: v1.RuntimeMount_TYPE_TMPFS, Target: "/scratch"}}
	contains(t, tg, s, "ro", "rw")
}

func testFiles(t *testing.T, tg Target) {
	s := sh(tg, `cat /run/secrets/key; stat -c '%a %u %g' /run/secrets/key; stat -c %a /etc/app.conf; echo x 2>/dev/null >> /etc/app.conf || echo ro`)
	s.Files = []*v1.File{
		{Target: "/run/secrets/key", Content: []byte("s3cret\n"), Mode: 0o400, Uid: 1000, Gid: 1000, Secret: true},
		{Target: "/etc/app.conf", Content: []byte("a=b\n")},
	}
	s.CapDrop = nil
	contains(t, tg, s, "s3cret", "400 1000 1000", "444", "ro")
}

func testVolume(t *testing.T, tg Target) {
	disk := tg.Mount(t)
	vol := func(script string) *v1.RuntimeSpec {
		s := sh(tg, script)
		s.Mounts = []*v1.RuntimeMount{{Type: v1.RuntimeMount_TYPE_DISK, Source: disk, Target: "/data", CopyUp: true}}
		return s
	}
	out := contains(t, tg, vol(`ls -A /data; cat /data/hello /data/link /data/sub/deep; stat -c '%a %u' /data /data/hello; echo mine > /data/hello`),
		"from the image", "deep", "750 1000", "644 1000")
	if strings.Contains(out, "lost+found") || strings.Contains(out, "tandem") {
		t.Errorf("volume:\n%s", out)
	}
	contains(t, tg, vol(`cat /data/hello; rm -r /data/*`), "mine")
	ro := vol(`touch /data/x 2>/dev/null || echo ro`)
	ro.Mounts[0].ReadOnly = true
	contains(t, tg, ro, "ro")
}

func testSubpath(t *testing.T, tg Target) {
	disk := tg.Mount(t)
	s := sh(tg, `mkdir -p /v/a/b; echo inner > /v/a/b/f; ln -s / /v/out; ln -s a/b /v/in`)
	s.Mounts = []*v1.RuntimeMount{{Type: v1.RuntimeMount_TYPE_DISK, Source: disk, Target: "/v"}}
	contains(t, tg, s)
	at := func(sub string) *v1.RuntimeSpec {
		s := sh(tg, `ls -A /v; cat /v/f`)
		s.Mounts = []*v1.RuntimeMount{{Type: v1.RuntimeMount_TYPE_DISK, Source: disk, Target: "/v", Subpath: sub}}
		return s
	}
	contains(t, tg, at("a/b"), "inner")
	contains(t, tg, at("in"), "inner")
	s = at("out") // a link to / stays inside the volume
	s.Args[2] = "ls -A /v"
	if _, out := run(t, tg, s); strings.Contains(out, "bin") {
		t.Errorf("a subpath leads out of its volume:\n%s", out)
	}
	if err := tg.RT.Create(Context(t), at("../x")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("..: %v", err)
	}
	if err := tg.RT.Create(Context(t), at("missing")); !errdefs.IsNotFound(err) {
		t.Errorf("missing: %v", err)
	}
}

func testTmpfsDevices(t *testing.T, tg Target) {
	s := sh(tg, `df -k /t | tail -1 | awk '{print $2}'; stat -c %a /t; stat -c '%t:%T' /dev/mynull; echo x > /dev/mynull && echo usable; ls /dev/stdin /dev/fd >/dev/null && echo links`)
	s.Mounts = []*v1.RuntimeMount{{Type: v1.RuntimeMount_TYPE_TMPFS, Target: "/t", SizeBytes: 4 << 20, Mode: 0o700}}
	s.Devices = []*v1.Device{{PathOnHost: "/dev/zero", PathInContainer: "/dev/mynull", Permissions: "rwm"}}
	contains(t, tg, s, "4096", "700", "1:5", "usable", "links")
	// /dev/kmsg exists everywhere and is not let through.
	s = sh(tg, `mknod /tmp/kmsg c 1 11 && { cat /tmp/kmsg >/dev/null 2>&1 & p=$!; sleep 0.2; kill $p 2>/dev/null && echo open || echo denied; }`)
	contains(t, tg, s, "denied")
}

func testLimits(t *testing.T, tg Target) {
	s := sh(tg, `sleep 1000 & sleep 1000 & wait`)
	s.Resources = &v1.Resources{CpuMilliLimit: 250, MemoryBytesLimit: 32 << 20, PidsLimit: 20, CpuShares: 512}
	id := start(t, tg, s)
	limit := func() int64 {
		u, err := tg.RT.Stats(Context(t), id)
		if err != nil {
			t.Fatal(err)
		}
		return u.MemoryLimitBytes
	}
	if got := limit(); got != 32<<20 {
		t.Errorf("memory limit %d", got)
	}
	if err := tg.RT.Update(Context(t), id, &v1.Resources{MemoryBytesLimit: 96 << 20, CpuMilliLimit: 1500}); err != nil {
		t.Error(err)
	}
	if got := limit(); got != 96<<20 {
		t.Errorf("memory limit after update %d", got)
	}
	if err := tg.RT.Update(Context(t), id, &v1.Resources{}); err != nil {
		t.Error(err)
	}
	if got := limit(); got != 0 {
		t.Errorf("memory limit after removing it %d", got)
	}
	if err := tg.RT.Update(Context(t), id, &v1.Resources{MemoryBytesLimit: 1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one byte: %v", err)
	}
	Eventually(t, "three processes", func() bool { ps, _ := tg.RT.Top(Context(t), id); return len(ps) == 3 })
	// Limits that change before the first start count from then on.
	s.Id = Unique("c")
	id = create(t, tg, s)
	if err := tg.RT.Update(Context(t), id, &v1.Resources{MemoryBytesLimit: 48 << 20}); err != nil {
		t.Error(err)
	}
	if err := tg.RT.Start(Context(t), id); err != nil {
		t.Fatal(err)
	}
	if got := limit(); got != 48<<20 {
		t.Errorf("memory limit set before the start %d", got)
	}
	s = sh(tg, `for i in 1 2 3 4 5 6 7 8 9 10; do sleep 1 & done; wait`)
	s.Resources = &v1.Resources{PidsLimit: 4}
	if _, out := run(t, tg, s); !strings.Contains(out, "fork") {
		t.Errorf("pids limit: %s", out)
	}
}

func testOOM(t *testing.T, tg Target) {
	s := Spec(tg.Layer, "sh", "-c", "exec tail /dev/zero")
	s.Resources = &v1.Resources{MemoryBytesLimit: 16 << 20, MemorySwapBytes: 16 << 20}
	id := start(t, tg, s)
	if st := wait(t, tg, id); !st.OomKilled || st.ExitCode != 137 {
		t.Errorf("killed for memory: %v", st)
	}
	// A child is killed, the container lives.
	s = Spec(tg.Layer, "sh", "-c", "tail /dev/zero; exec sleep 1000")
	s.Resources = &v1.Resources{MemoryBytesLimit: 16 << 20, MemorySwapBytes: 16 << 20}
	id = start(t, tg, s)
	Eventually(t, "the kill of a child is seen", func() bool { return status(t, tg, id).OomKilled })
	isState(t, tg, id, running)
}

func testStop(t *testing.T, tg Target) {
	s := sh(tg, `trap 'echo bye; exit 5' USR1; echo up; while :; do sleep 0.1; done`)
	s.StopSignal = "SIGUSR1"
	id := start(t, tg, s)
	Eventually(t, "it is up", func() bool { return strings.Contains(output(t, tg, id), "up") })
	st, err := tg.RT.Stop(Context(t), id, "", time.Minute)
	if err != nil || st.ExitCode != 5 || !strings.Contains(output(t, tg, id), "bye") {
		t.Errorf("graceful: %v %v", st, err)
	}
	id = start(t, tg, sh(tg, `trap '' TERM; echo up; while :; do sleep 0.1; done`))
	Eventually(t, "it is up", func() bool { return strings.Contains(output(t, tg, id), "up") })
	begin := time.Now()
	st, err = tg.RT.Stop(Context(t), id, "", 300*time.Millisecond)
	if err != nil || st.ExitCode != 137 || time.Since(begin) < 300*time.Millisecond {
		t.Errorf("after the grace: %v %v", st, err)
	}
}

func testWritableLayer(t *testing.T, tg Target) {
	id := create(t, tg, sh(tg, `cat /mark 2>/dev/null; echo kept > /mark; rm /data/hello; mv /data/sub /data/moved`))
	for range 2 {
		if err := tg.RT.Start(Context(t), id); err != nil {
			t.Fatal(err)
		}
		wait(t, tg, id)
	}
	if out := output(t, tg, id); !strings.Contains(out, "kept\n") { // beside errors, in any order
		t.Errorf("the second run: %q", out)
	}
	contains(t, tg, sh(tg, `ls /data; test ! -e /mark`), "hello", "sub")
}

func testUlimits(t *testing.T, tg Target) {
	s := sh(tg, `ulimit -n; ulimit -Hn; ulimit -c`)
	s.Ulimits = []*v1.Ulimit{{Name: "nofile", Soft: 512, Hard: 512}, {Name: "core", Soft: 0, Hard: 0}}
	contains(t, tg, s, "512", "0")
	s = sh(tg, `ulimit -Hn`)
	s.Ulimits = []*v1.Ulimit{{Name: "nofile", Soft: 1 << 30, Hard: 1 << 30}} // more than there is
	if code, _ := run(t, tg, s); code != 0 {
		t.Errorf("exit code %d", code)
	}
}
