package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// image is a small file system of that kind on a loop device.
func image(t *testing.T, kind string, mib int) string {
	t.Helper()
	dir, img := t.TempDir(), filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, int64(mib)<<20); err != nil {
		t.Fatal(err)
	}
	mkfs := map[string][]string{"ext4": {"mkfs.ext4", "-q", "-m", "0"}, "xfs": {"mkfs.xfs", "-q"}, "btrfs": {"mkfs.btrfs", "-q"}}[kind]
	if out, err := exec.Command(mkfs[0], append(mkfs[1:], img)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", img, dir).CombinedOutput(); err != nil {
		t.Fatalf("this test needs root: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

// eat takes all space of a file system, and, greedy, whatever comes free until stop
// is called, at 4 MB/s; stop gives it back.
func eat(t *testing.T, dir string, greedy bool) (stop func()) {
	t.Helper()
	file := filepath.Join(dir, "eaten")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	full, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1<<20)
		fill := func(n int) {
			for err := error(nil); err == nil && ctx.Err() == nil; {
				_, err = f.Write(b[:n])
			}
		}
		fill(len(b))
		fill(4096)
		f.Sync() // what the journal still holds back, too
		fill(4096)
		close(full)
		for greedy && ctx.Err() == nil {
			if _, err := f.Write(b[:4096]); err != nil {
				f.Sync()
			}
			time.Sleep(time.Millisecond)
		}
	}()
	select {
	case <-full:
	case <-time.After(2 * time.Minute):
		t.Error("the disk does not fill up")
	}
	return sync.OnceFunc(func() {
		cancel()
		<-done
		f.Close()
		os.Remove(file)
	})
}

// TestPromisedBlocksAreThere: what the reserve is built on. Blocks beyond the end
// of a file that fallocate gave stay its own while it grows on a full disk; without
// them there is no space.
func TestPromisedBlocksAreThere(t *testing.T) {
	kinds := map[string]func() string{
		"ext4":  func() string { return image(t, "ext4", 64) },
		"tmpfs": func() string { return disk(t, "size=64m") },
	}
	if _, err := exec.LookPath("mkfs.xfs"); err == nil {
		kinds["xfs"] = func() string { return image(t, "xfs", 320) }
	}
	for kind, dir := range kinds {
		dir := dir()
		for _, promised := range []bool{true, false} {
			file := filepath.Join(dir, fmt.Sprint("f", promised))
			if err := os.WriteFile(file, make([]byte, 8192), 0o600); err != nil {
				t.Fatal(err)
			}
			if promised {
				if err := promise(file, 8<<20); err != nil {
					t.Fatal(err)
				}
				if st, err := os.Stat(file); err != nil || st.Size() != 8192 || blocks(st) < 8<<20 {
					t.Fatal(st, err)
				}
			}
			stop := eat(t, dir, true)
			f, err := os.OpenFile(file, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			for size := int64(1 << 20); size <= 8<<20 && err == nil; size += 1 << 20 { // as a data base grows
				if err = f.Truncate(size); err == nil {
					_, err = f.WriteAt(make([]byte, 1<<20), size-1<<20)
				}
				err = errors.Join(err, f.Sync())
			}
			f.Close()
			stop()
			if promised && err != nil {
				t.Errorf("%s: a write to promised blocks: %v", kind, err)
			}
			if !promised && !errors.Is(err, unix.ENOSPC) {
				t.Errorf("%s: a write without them on a full disk: %v", kind, err)
			}
		}
	}
}

// TestFullDisk: somebody takes all space there is and, greedy, what comes free. What
// makes the state grow is refused with words that help; statuses and removals go on,
// beyond a segment of the log unless somebody takes what that lets go; then they are
// refused too, and the store lives. With space all works, by itself, and nothing is
// lost.
func TestFullDisk(t *testing.T) {
	for kind, dir := range map[string]func() string{
		"ext4":  func() string { return image(t, "ext4", 220) },
		"tmpfs": func() string { return disk(t, "size=220m") },
	} {
		t.Run(kind, func(t *testing.T) { fullDisk(t, dir(), false) })
		t.Run(kind+", greedy", func(t *testing.T) { fullDisk(t, dir(), true) })
	}
}

func fullDisk(t *testing.T, disk string, greedy bool) {
	ctx := t.Context()
	dir := filepath.Join(disk, "state")
	s := open(t, dir)
	const workers = 24
	recs := make([]*v1.Container, workers)
	for i := range recs {
		recs[i] = container("p", fmt.Sprint("c", i))
		if _, err := s.Create(Growing(ctx), recs[i]); err != nil {
			t.Fatal(err)
		}
	}
	doomed := container("p", "doomed")
	s.Create(ctx, doomed)
	space, moved := s.Space()
	if space.Short || space.Dir != dir {
		t.Fatal(space)
	}
	stop := eat(t, disk, greedy)
	defer stop()
	select {
	case <-moved:
	case <-time.After(time.Minute):
		t.Fatal("nobody says that the disk is full")
	}
	if space, moved = s.Space(); !space.Short {
		t.Fatal(space)
	}
	_, err := s.Create(Growing(ctx), container("p", "more"))
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no space left") || !strings.Contains(err.Error(), dir) {
		t.Fatal(err)
	}
	if err := s.Delete(Growing(ctx), doomed); err != nil {
		t.Fatal("a removal:", err)
	}

	// Everybody writes as much as is let through.
	var refused atomic.Value
	var written, last atomic.Int64
	var wg sync.WaitGroup
	deadline := time.Now().Add(3 * time.Minute)
	pad := strings.Repeat("what an agent saw; ", 100)
	for i := range recs {
		wg.Go(func() {
			for n := 0; time.Now().Before(deadline); n++ {
				_, err := Update(ctx, s, KeyOf(recs[i]), func(c *v1.Container) error {
					c.Status = &v1.ContainerStatus{Message: fmt.Sprint(n, pad)}
					return nil
				})
				if errdefs.IsResourceExhausted(err) {
					refused.Store(err.Error())
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				written.Add(1)
				last.Store(time.Now().UnixNano())
			}
		})
	}
	wg.Wait()
	t.Logf("%d statuses were written on a full disk, then: %v", written.Load(), refused.Load())
	if n := written.Load(); n < 2000 || !greedy && n*int64(len(pad)) < segmentBytes {
		t.Error("those are few")
	}
	if s.Err() != nil {
		t.Fatalf("the store failed: %v", s.Err())
	}
	if got := List[*v1.Container](s, ""); len(got) != workers {
		t.Fatalf("%d records can be read", len(got))
	}

	stop()
	select {
	case <-moved:
	case <-time.After(time.Minute):
		t.Fatal("nobody says that there is space again")
	}
	for i := range recs {
		if _, err := s.Create(Growing(ctx), container("p", fmt.Sprint("new", i))); err != nil {
			t.Fatal(err)
		}
	}
	want := List[*v1.Container](s, "")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	have := List[*v1.Container](s, "")
	if len(have) != len(want) {
		t.Fatalf("%d records, there were %d", len(have), len(want))
	}
	for i := range have {
		if have[i].Meta.Revision != want[i].Meta.Revision || have[i].Status.GetMessage() != want[i].Status.GetMessage() {
			t.Errorf("%s is another than before", have[i].Meta.Name)
		}
	}
	s.Close()
}

// TestFullDiskAcrossSnapshots: etcd writes a snapshot's file every few thousand
// entries; on a full disk there is space for it. Where somebody takes that at once,
// writes are refused before it is needed.
func TestFullDiskAcrossSnapshots(t *testing.T) {
	t.Run("full", func(t *testing.T) { acrossSnapshots(t, false) })
	t.Run("fuller", func(t *testing.T) { acrossSnapshots(t, true) })
}

func acrossSnapshots(t *testing.T, greedy bool) {
	disk := image(t, "ext4", 220)
	ctx := t.Context()
	s := open(t, filepath.Join(disk, "state"))
	stop := eat(t, disk, greedy)
	defer stop()
	first := s.reserve.snapshotIndex()
	keys := make([]Key, 40)
	for i := range keys {
		c := container("p", fmt.Sprint("c", i))
		keys[i] = KeyOf(c)
		if _, err := s.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	var refused atomic.Value
	var written atomic.Int64
	for i, k := range keys {
		wg.Go(func() {
			for n := range 2 * snapEvery / len(keys) {
				if _, err := Update(ctx, s, k, func(c *v1.Container) error { c.RestartGeneration = uint64(n + 1); return nil }); err != nil {
					refused.Store(fmt.Sprint(i, ": ", err))
					return
				}
				written.Add(1)
			}
		})
	}
	wg.Wait()
	if s.Err() != nil {
		t.Fatal("the store failed:", s.Err())
	}
	t.Logf("%d small writes, snapshot at %d, then %d; %v", written.Load(), first, s.reserve.snapshotIndex(), refused.Load())
	if s.reserve.snapshotIndex() == first && (refused.Load() == nil || !greedy) {
		t.Error("no snapshot was written")
	}
	if refused.Load() != nil && !greedy {
		t.Error("refused with space for a snapshot")
	}
	stop()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := s.Create(Growing(ctx), container("p", "after")); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	s.Close()
}

// TestStartOnAFullDisk: a server that is killed while the disk is full starts again
// on what it kept, or says clearly that somebody was quicker to take what the log
// lets go for a moment when it is opened. Nothing is lost.
func TestStartOnAFullDisk(t *testing.T) {
	if dir := os.Getenv("STORE_TEST_FULL"); dir != "" {
		s, err := Open(t.Context(), Options{Dir: dir})
		if err == nil && len(List[*v1.Container](s, "")) == 0 {
			_, err = s.Create(t.Context(), container("p", "a"))
		}
		fmt.Printf("opened: %v\n", err)
		select {} // until it is killed, as a server may be
	}
	disk := image(t, "ext4", 220)
	dir := filepath.Join(disk, "state")
	serve := func() string {
		cmd := exec.Command(os.Args[0], "-test.run=^TestStartOnAFullDisk$")
		cmd.Env = append(os.Environ(), "STORE_TEST_FULL="+dir)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		defer cmd.Wait()
		defer cmd.Process.Kill()
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(line, err)
		}
		return line
	}
	if line := serve(); line != "opened: <nil>\n" {
		t.Fatal(line)
	}
	stop := eat(t, disk, true)
	defer stop()
	line := serve()
	t.Log(line)
	if line != "opened: <nil>\n" && (!strings.Contains(line, "is full") || !strings.Contains(line, dir)) {
		t.Error("an error that does not help")
	}
	stop()
	s := open(t, dir)
	defer s.Close()
	if n := len(List[*v1.Container](s, "")); n != 1 {
		t.Fatalf("%d records", n)
	}
}

// BenchmarkLook is what watching the disk costs, once a second.
func BenchmarkLook(b *testing.B) {
	s := open(b, b.TempDir())
	for b.Loop() {
		s.reserve.mu.Lock()
		s.reserve.look()
		s.reserve.mu.Unlock()
	}
}
