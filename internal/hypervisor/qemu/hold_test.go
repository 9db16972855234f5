package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
)

// A host without space pauses the machine that writes, says so, and lets it go on
// when there is some: the guest sees no error, and its data is there.
func TestFullHostDiskHoldsTheMachine(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	small := t.TempDir()
	if err := unix.Mount("tandem-hold-test", small, "tmpfs", 0, "size=8m,mode=0755"); err != nil {
		t.Fatal("this test needs root:", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	disk := filepath.Join(small, "disk")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	f.Close()

	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	clone(ctx, t, d, "full")
	sh := shell(ctx, t, d, "full")
	if err := d.AttachDisk(ctx, "full", hypervisor.Disk{ID: "vol", Path: disk}); err != nil {
		t.Fatal(err)
	}
	events := d.Watch(ctx)
	wrote := make(chan error, 1)
	go func() {
		_, err := sh.Run(ctx, "i=0; until [ -b /dev/sda ]; do i=$((i+1)); [ $i -gt 300 ] && exit 1; usleep 200000; done; "+
			"dd if=/dev/urandom of=/tmp/f bs=1M count=20 && dd if=/tmp/f of=/dev/sda bs=1M conv=fsync && "+
			"echo 3 > /proc/sys/vm/drop_caches && dd if=/dev/sda bs=1M count=20 | cmp - /tmp/f")
		wrote <- err
	}()
	waitFor(ctx, t, events, hypervisor.EventHeld)
	held := func() bool {
		st, err := d.Inspect(ctx, "full")
		return err == nil && st.State == hypervisor.Paused && strings.Contains(st.Message, "no space left") && strings.Contains(st.Message, "vol")
	}
	for !held() { // between two tries it runs for a moment
		if ctx.Err() != nil {
			t.Fatal("its status does not say what it waits for")
		}
		time.Sleep(20 * time.Millisecond)
	}

	// Another driver, as after a restart, knows it too.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = open(t, dir)
	for st, err := d.Inspect(ctx, "full"); st.State != hypervisor.Paused || st.Message == ""; st, err = d.Inspect(ctx, "full") {
		if ctx.Err() != nil {
			t.Fatalf("after a restart: %+v, %v", st, err)
		}
		time.Sleep(20 * time.Millisecond)
	}

	if err := unix.Mount("", small, "", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	for {
		st, err := d.Inspect(ctx, "full")
		if err == nil && st.State == hypervisor.Running && st.Message == "" {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("with space again: %+v, %v", st, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// The first shell went with the first driver; the file tells.
	sh = shell(ctx, t, d, "full")
	if out, err := sh.Run(ctx, "i=0; until [ $(wc -c < /tmp/f) = 20971520 ] && dd if=/dev/sda bs=1M count=20 2>/dev/null | cmp - /tmp/f; do i=$((i+1)); [ $i -gt 300 ] && exit 1; usleep 200000; done"); err != nil {
		t.Errorf("what it wrote is not on the disk: %s, %v", out, err)
	}
}
