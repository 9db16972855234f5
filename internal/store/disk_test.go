package store

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// disk is a small file system of its own.
func disk(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tandem-store-test", dir, "tmpfs", 0, options); err != nil {
		t.Fatal("this test needs root:", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestSmallDiskIsRefusedAtStart(t *testing.T) {
	dir := disk(t, "size=8m")
	_, err := Open(t.Context(), Options{Dir: filepath.Join(dir, "s")})
	if !errdefs.IsResourceExhausted(err) {
		t.Fatal(err)
	}
}

func TestReadOnlyDiskIsRefusedAtStart(t *testing.T) {
	dir := disk(t, "size=64m")
	if err := os.Mkdir(filepath.Join(dir, "s"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), Options{Dir: filepath.Join(dir, "s")})
	if !errdefs.IsFailedPrecondition(err) {
		t.Fatal(err)
	}
}

// TestDiskFillsUp: writes fail with a clear error, the process goes on, and after
// space was made everything that was acknowledged is there.
func TestDiskFillsUp(t *testing.T) {
	if dir := os.Getenv("STORE_TEST_FILL"); dir != "" {
		fill(t, dir)
		return
	}
	dir := disk(t, "size=80m")
	// A member that gave up holds its files until its process ends, as a server's
	// then does: so it is a process of its own here.
	cmd := exec.Command(os.Args[0], "-test.run=^TestDiskFillsUp$", "-test.v")
	cmd.Env = append(os.Environ(), "STORE_TEST_FILL="+dir)
	out, err := cmd.CombinedOutput()
	m := regexp.MustCompile(`acknowledged (\d+)`).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%v: %s", err, out)
	}
	acked, _ := strconv.Atoi(string(m[1]))
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=400m"); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if n := len(List[*v1.Container](s, "")); n < acked || acked < 10 {
		t.Fatalf("%d were acknowledged, %d are there", acked, n)
	}
	if _, err := s.Create(t.Context(), container("p", "after")); err != nil {
		t.Fatal(err)
	}
}

func fill(t *testing.T, dir string) {
	s := open(t, dir)
	blob := make([]byte, 256<<10)
	for acked := range 2000 {
		rand.Read(blob)
		c := container("p", fmt.Sprint("c", acked))
		c.Spec.Image = fmt.Sprintf("%x", blob)
		_, err := s.Create(t.Context(), c)
		if errdefs.IsResourceExhausted(err) {
			t.Log("acknowledged", acked)
			return
		}
		if err != nil {
			t.Fatal(acked, err)
		}
	}
	t.Fatal("the disk does not fill up")
}

// TestBrokenDataBase: rubbish in place of the log is an error that names the
// directory, and no end of the process.
func TestBrokenDataBase(t *testing.T) {
	dir, err := os.MkdirTemp("", "tandem-broken-")
	if err != nil {
		t.Fatal(err)
	}
	// etcd gives up with a panic and leaves the goroutine that makes its next log
	// file: it may make one while the directory is being removed.
	t.Cleanup(func() {
		for end := time.Now().Add(time.Minute); os.RemoveAll(dir) != nil; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("%s can't be removed", dir)
				return
			}
		}
	})
	s := open(t, dir)
	s.Create(t.Context(), container("p", "a"))
	s.Close()
	logs, err := filepath.Glob(filepath.Join(dir, "etcd/member/wal/*.wal"))
	if err != nil || len(logs) == 0 {
		t.Fatal(logs, err)
	}
	for _, f := range logs {
		if err := os.WriteFile(f, bytes.Repeat([]byte{0xff}, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(t.Context(), Options{Dir: dir}); err == nil || errdefs.IsUnavailable(err) && !errdefs.IsDataLoss(err) {
		t.Fatal(err)
	} else {
		t.Log(err)
	}
}
