package qemu

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"
	"time"

	"tandem/internal/hypervisor"
)

// A VMM has no right beyond its descriptors.
func TestConfinement(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	seen := map[string]bool{}
	for _, id := range []string{"a", "b"} {
		clone(ctx, t, d, id)
		st, err := d.Inspect(ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", st.PID))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, l := range strings.Split(string(b), "\n") {
			k, v, _ := strings.Cut(l, ":")
			got[k] = strings.TrimSpace(v)
		}
		for k, want := range map[string]string{
			"NoNewPrivs": "1", "Seccomp": "2", "Groups": "", "NSsid": got["Pid"],
			"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapInh": "0000000000000000",
			"CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
		} {
			if got[k] != want {
				t.Errorf("%s: %s is %q, want %q", id, k, got[k], want)
			}
		}
		if uid := strings.Fields(got["Uid"]); uid[0] == "0" || uid[1] == "0" || seen[uid[0]] {
			t.Errorf("%s: uid %v is root's or another machine's", id, uid)
		} else {
			seen[uid[0]] = true
		}
		groups, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", st.PID))
		for _, w := range wantedControllers {
			if d.groups != nil && d.groups.v1[w] != "" && !strings.Contains(string(groups), ":"+w+":/"+d.opt.CgroupParent+"/"+id) {
				t.Errorf("%s is not in its %s group: %s", id, w, groups)
			}
		}
		limits, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", st.PID))
		if !strings.Contains(string(limits), "Max core file size        0 ") {
			t.Errorf("%s may dump its guest's memory:\n%s", id, limits)
		}
	}
}

// Whatever clones do, their template stays what it was.
func TestTemplateIsSealed(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	clone(ctx, t, d, "a")
	hash := func() string {
		h := sha256.New()
		if _, err := io.Copy(h, io.NewSectionReader(d.templates[warmName].memory, 0, baseMemory)); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%x", h.Sum(nil))
	}
	before := hash()
	sh := shell(ctx, t, d, "a")
	if out, err := sh.Run(ctx, "cat /tmp/warm && dd if=/dev/urandom of=/tmp/f bs=1M count=60 && rm /tmp/f && echo changed > /tmp/warm"); err != nil || !strings.Contains(out, "warm") {
		t.Fatal(out, err)
	}
	st, _ := d.Inspect(ctx, "a")
	// What a VMM that was taken over would do, with more rights than it has.
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", st.PID))
	found := false
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); !strings.HasPrefix(to, "/memfd:tandem-template-") {
			continue
		}
		found = true
		f, err := os.OpenFile(fd, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Error("the template can be written")
		}
		if err := f.Truncate(0); err == nil {
			t.Error("the template can be truncated")
		}
		_ = f.Close()
	}
	if !found {
		t.Error("the template's memory is not among the clone's descriptors")
	}
	if after := hash(); after != before {
		t.Error("the template has changed")
	}
	clone(ctx, t, d, "b")
	if out, err := shell(ctx, t, d, "b").Run(ctx, "cat /tmp/warm"); err != nil || out != "warm" {
		t.Errorf("second clone: %q, %v", out, err)
	}
}

// What a guest sees of devices, and how its ends are told apart.
func TestGuestView(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	clone(ctx, t, d, "g")
	sh := shell(ctx, t, d, "g")
	see := func(what, script string) {
		t.Helper()
		line := fmt.Sprintf("i=0; until %s; do i=$((i+1)); [ $i -gt 300 ] && exit 1; usleep 200000; done", script)
		line = "(" + line + ")"
		if out, err := sh.Run(ctx, line); err != nil {
			t.Errorf("the guest does not see %s: %s", what, out)
		}
	}
	disk := image(t, 16<<20)
	if out, err := exec.Command("mkfs.ext4", "-q", disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(d.AttachDisk(ctx, "g", hypervisor.Disk{ID: "vol", Path: disk, Serial: "serial-of-vol"}))
	must(d.AttachDisk(ctx, "g", hypervisor.Disk{ID: "ro", Path: image(t, 1<<20), Serial: "serial-of-ro", ReadOnly: true}))
	see("the disks", "[ -b /dev/sda ] && [ -b /dev/sdb ]")
	see("the serial", "grep -qa serial-of-vol /sys/block/sd*/device/vpd_pg80")
	see("that the second is read-only", "[ $(cat /sys/block/sdb/ro) = 1 ]")
	see("what it writes", "mount -t ext4 /dev/sda /mnt && echo data > /mnt/f && umount /mnt")
	must(d.DetachDisk(ctx, "g", "vol"))
	see("that the disk is gone", "[ ! -b /dev/sda ]")
	must(d.AttachDisk(ctx, "g", hypervisor.Disk{ID: "vol", Path: disk}))
	see("its data again", "mount -t ext4 /dev/sda /mnt 2>/dev/null || mount -t ext4 /dev/sdc /mnt && grep -q data /mnt/f && umount /mnt")

	must(d.AttachNIC(ctx, "g", hypervisor.NIC{ID: "n", Tap: tap(t), MAC: "52:54:00:aa:bb:cc", MTU: 1450}))
	see("the NIC", "[ \"$(cat /sys/class/net/eth0/address)\" = 52:54:00:aa:bb:cc ] && [ $(cat /sys/class/net/eth0/mtu) = 1450 ]")
	must(d.DetachNIC(ctx, "g", "n"))
	see("that the NIC is gone", "[ ! -e /sys/class/net/eth0 ]")

	if _, err := d.Resize(ctx, "g", hypervisor.Size{CPUs: 2, Memory: 768 << 20}); err != nil {
		t.Fatal(err)
	}
	see("the second CPU", "[ $(nproc) = 2 ]")
	see("the memory", "[ $(grep MemTotal /proc/meminfo | tr -dc 0-9) -gt 600000 ]")
	// A guest that uses its memory keeps it. (How much it can spare is for the
	// caller to ask: one that is left without room for its own pages panics.)
	if out, err := sh.Run(ctx, "mount -o remount,size=700m /tmp && dd if=/dev/zero of=/tmp/f bs=1M count=450"); err != nil {
		t.Fatal(out, err)
	}
	got, err := d.Resize(ctx, "g", hypervisor.Size{Memory: 640 << 20})
	if err != nil || got.Memory < 640<<20 || got.Memory > 768<<20 {
		t.Errorf("shrunk while most is used: %+v, %v", got, err)
	}
	see("its file", "[ $(wc -c < /tmp/f) = 471859200 ] && rm /tmp/f")
	got, err = d.Resize(ctx, "g", hypervisor.Size{CPUs: 1, Memory: 256 << 20})
	if err != nil || got.Memory != 256<<20 {
		t.Errorf("shrunk: %+v, %v", got, err)
	}

	events := d.Watch(ctx)
	_, _ = sh.Run(ctx, "poweroff -f")
	waitFor(ctx, t, events, hypervisor.EventExited)
	if st, _ := d.Inspect(ctx, "g"); st.State != hypervisor.Stopped {
		t.Errorf("powered off: %+v", st)
	}
	must(d.Start(ctx, "g", hypervisor.StartOptions{Template: warmName}))
	sh = shell(ctx, t, d, "g")
	_, _ = sh.Run(ctx, "echo c > /proc/sysrq-trigger")
	waitFor(ctx, t, events, hypervisor.EventPanic)
	waitFor(ctx, t, events, hypervisor.EventExited)
	if st, _ := d.Inspect(ctx, "g"); st.State != hypervisor.Crashed || !strings.Contains(st.Message, "panic") {
		t.Errorf("panicked: %+v", st)
	}
}

func waitFor(ctx context.Context, t *testing.T, events <-chan hypervisor.Event, kind hypervisor.EventKind) {
	t.Helper()
	for {
		select {
		case e := <-events:
			if e.Kind == kind {
				return
			}
		case <-ctx.Done():
			t.Fatalf("no event %s", kind)
		}
	}
}

// Thirty machines on this host, all at once.
func TestThirtyClones(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	const n = 30
	var mu sync.Mutex
	var took []time.Duration
	var wg sync.WaitGroup
	start := time.Now()
	for i := range n {
		id := fmt.Sprintf("m%d", i)
		if err := d.Create(ctx, spec(t, id)); err != nil {
			t.Fatal(err)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := d.Start(ctx, id, hypervisor.StartOptions{Template: warmName}); err != nil {
				t.Error(err)
				return
			}
			sh, err := tryShell(ctx, d, id)
			if err == nil {
				_, err = sh.Run(ctx, "echo "+id+" > /tmp/warm")
				_ = sh.Close()
			}
			if err != nil {
				t.Errorf("%s: %v", id, err)
			}
			mu.Lock()
			defer mu.Unlock()
			took = append(took, time.Since(start))
		}()
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	var sum int64
	for i := range n {
		use, err := d.MemoryUse(ctx, fmt.Sprintf("m%d", i))
		if err != nil {
			t.Error(err)
		}
		sum += use
	}
	sort.Slice(took, func(i, j int) bool { return took[i] < took[j] })
	t.Logf("%d clones answer after: first %v, median %v, last %v; together %d MiB, %d each", n, took[0], took[n/2], took[n-1], sum>>20, sum>>20/n)
	if each := sum / n; each > 64*mib {
		t.Errorf("%d MiB for each clone", each/mib)
	}
}
