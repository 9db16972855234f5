package volume_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"tandem/internal/volume"
)

const mib = 1 << 20

var ctx = context.Background()

func open(t testing.TB, dir string) *volume.LocalStore {
	t.Helper()
	s, err := volume.Open(dir, volume.Options{Reserve: -1, LockTimeout: 20 * time.Second, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func ensure(t testing.TB, s volume.Store, id string, size int64) volume.Volume {
	t.Helper()
	v, err := s.Ensure(ctx, id, size)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// fsck wants a clean ext4 file system of the size of its file.
func fsck(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", path, err, out)
	}
	out, err := exec.Command("dumpe2fs", "-h", path).CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%d\n", st.Size()/4096); !strings.Contains(strings.ReplaceAll(string(out), " ", ""), "Blockcount:"+want) {
		t.Fatalf("file system does not fill its %d bytes:\n%s", st.Size(), out)
	}
}

func write(t testing.TB, disk, name, content string) {
	t.Helper()
	f := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(f, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("debugfs", "-w", "-R", "write "+f+" "+name, disk).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func read(t testing.TB, disk, name string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", "cat "+name, disk).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestLifeOfAVolume(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := s.Get(ctx, "data"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Fatal(err)
	}
	v := ensure(t, s, "data", 1<<30)
	if v.ID != "data" || v.SizeBytes != 1<<30 || v.UsedBytes <= 0 || v.UsedBytes > 64*mib {
		t.Fatalf("%+v", v)
	}
	fsck(t, v.Path)
	if out, _ := exec.Command("debugfs", "-R", "ls -l /", v.Path).Output(); bytes.Contains(out, []byte("lost+found")) {
		t.Errorf("not empty: %s", out)
	}
	if out, _ := exec.Command("dumpe2fs", "-h", v.Path).Output(); !bytes.Contains(out, []byte("has_journal")) {
		t.Error("no journal")
	}
	write(t, v.Path, "greeting", "hello")
	if again := ensure(t, s, "data", 1<<30); again.SizeBytes != v.SizeBytes {
		t.Errorf("%+v", again)
	}
	grown := ensure(t, s, "data", 3<<30)
	if grown.SizeBytes != 3<<30 {
		t.Errorf("%+v", grown)
	}
	fsck(t, v.Path)
	if got := read(t, v.Path, "greeting"); got != "hello" {
		t.Errorf("data after growth: %q", got)
	}
	if _, err := s.Ensure(ctx, "data", 1<<30); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("shrink: %v", err)
	}

	if err := s.Use(ctx, "data", "m-1"); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"use":    s.Use(ctx, "data", "m-2"),
		"unuse":  s.Unuse(ctx, "data", "m-2"),
		"remove": s.Remove(ctx, "data"),
		"grow":   func() error { _, err := s.Ensure(ctx, "data", 4<<30); return err }(),
	} {
		if !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "m-1") {
			t.Errorf("%s while m-1 has it: %v", name, err)
		}
	}
	s.Close()
	s = open(t, dir)
	if err := s.Use(ctx, "data", "m-1"); err != nil {
		t.Errorf("the same holder after a restart: %v", err)
	}
	if v, err := s.Get(ctx, "data"); err != nil || v.Holder != "m-1" {
		t.Fatalf("who holds it: %+v, %v", v, err)
	}
	if err := s.Use(ctx, "data", "m-2"); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("uses were lost: %v", err)
	}
	for range 2 {
		if err := s.Unuse(ctx, "data", "m-1"); err != nil {
			t.Fatal(err)
		}
	}
	ensure(t, s, "other", 64*mib)
	vs, err := s.List(ctx)
	if err != nil || len(vs) != 2 || vs[0].ID != "data" || vs[1].ID != "other" {
		t.Fatalf("%+v %v", vs, err)
	}
	for range 2 {
		if err := s.Remove(ctx, "data"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(v.Path); !os.IsNotExist(err) {
		t.Error("the file is left")
	}
}

func TestInvalid(t *testing.T) {
	s := open(t, t.TempDir())
	for _, id := range []string{"", "A", "../x", "a/b", "a.b", strings.Repeat("a", 65)} {
		if _, err := s.Ensure(ctx, id, 64*mib); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%q: %v", id, err)
		}
	}
	for _, size := range []int64{-1, 0, 1, 1 << 62} {
		if _, err := s.Ensure(ctx, "a", size); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%d: %v", size, err)
		}
	}
	if err := s.Use(ctx, "a", "m-1"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("use of nothing: %v", err)
	}
	ensure(t, s, "a", 64*mib)
	if err := s.Use(ctx, "a", "m\n1"); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("holder: %v", err)
	}
}

func TestScratchComesFromATemplate(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	if _, err := s.EnsureScratch(ctx, "m-0", 10<<30); err != nil {
		t.Fatal(err)
	}
	best := time.Hour
	for i := range 5 {
		start := time.Now()
		v, err := s.EnsureScratch(ctx, fmt.Sprint("m-", i+1), 10<<30)
		if err != nil {
			t.Fatal(err)
		}
		best = min(best, time.Since(start))
		if i == 0 {
			fsck(t, v.Path)
		}
	}
	t.Logf("a scratch disk of 10 GiB: %v", best)
	if best > 50*time.Millisecond {
		t.Errorf("a scratch disk takes %v", best)
	}
	// Rubbish after a power cut is made anew, unless somebody has it.
	path := filepath.Join(dir, "disks", "m-1.img")
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	v, err := s.EnsureScratch(ctx, "m-1", 10<<30)
	if err != nil || v.SizeBytes != 10<<30 {
		t.Fatalf("%+v %v", v, err)
	}
	fsck(t, path)
	if v, err = s.EnsureScratch(ctx, "m-1", 12<<30); err != nil || v.SizeBytes != 12<<30 {
		t.Fatalf("%+v %v", v, err)
	}
	fsck(t, path)
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := volume.Open(dir, volume.Options{LockTimeout: time.Millisecond})
	if !errors.Is(err, errdefs.ErrUnavailable) {
		t.Fatal(err)
	}
	s.Close()
	open(t, dir)
}

func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := open(t, dir)
	_, err := s.Ensure(ctx, "big", 100<<30)
	if !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(err.Error(), "of 2097152 bytes free") {
		t.Fatalf("full disk: %v", err)
	}
	if vs, err := s.List(ctx); err != nil || len(vs) != 0 {
		t.Errorf("left: %v %v", vs, err)
	}
	if es, _ := os.ReadDir(filepath.Join(dir, "tmp")); len(es) != 0 {
		t.Errorf("left in tmp: %v", es)
	}
	ensure(t, s, "small", 16*mib)
	s.Close()
	s, err = volume.Open(dir, volume.Options{Reserve: 8 * mib})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Ensure(ctx, "more", 16*mib); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("reserve: %v", err)
	}
	if _, err := s.Ensure(ctx, "small", 16*mib); err != nil {
		t.Errorf("what is there needs no room: %v", err)
	}
}

// TestKilledWhileItWorks kills a process that makes and grows disks, at many
// moments; the next one finds whole disks and goes on.
func TestKilledWhileItWorks(t *testing.T) {
	if dir := os.Getenv("TANDEM_TEST_VOLUME_DIR"); dir != "" {
		s := open(t, dir)
		fmt.Println("ready")
		for i := 0; ; i++ {
			id := fmt.Sprint("v", i%3)
			v, err := s.Get(ctx, id)
			switch {
			case err == nil && v.SizeBytes > 64<<30:
				if err := s.Remove(ctx, id); err != nil {
					t.Fatal(err)
				}
			case err == nil:
				ensure(t, s, id, v.SizeBytes*2)
			default:
				ensure(t, s, id, 256*mib)
			}
		}
	}
	dir := t.TempDir()
	interrupted := 0
	for round := range 20 {
		c := exec.Command(os.Args[0], "-test.run=^TestKilledWhileItWorks$")
		c.Env = append(os.Environ(), "TANDEM_TEST_VOLUME_DIR="+dir)
		c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		out.Read(make([]byte, 6))
		time.Sleep(time.Duration(20+round*37%200) * time.Millisecond)
		if round%2 == 0 { // with its tools, or without
			unix.Kill(-c.Process.Pid, unix.SIGKILL)
		}
		c.Process.Kill()
		c.Wait()
		s := open(t, dir)
		if es, _ := os.ReadDir(filepath.Join(dir, "undo")); len(es) > 0 {
			interrupted++
		}
		vs, err := s.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range vs {
			v, err = s.Ensure(ctx, v.ID, v.SizeBytes)
			if err != nil {
				t.Fatal(err)
			}
			fsck(t, v.Path)
			if got := read(t, v.Path, "greeting"); round > 0 && got != "" && got != "hello" {
				t.Fatalf("%s: %q", v.ID, got)
			} else if got == "" {
				write(t, v.Path, "greeting", "hello")
			}
		}
		if es, _ := os.ReadDir(filepath.Join(dir, "tmp")); len(es) != 0 {
			t.Errorf("left in tmp: %v", es)
		}
		s.Close()
	}
	t.Logf("%d growths were interrupted in the middle", interrupted)
}

func TestUseHasOneHolder(t *testing.T) {
	s := open(t, t.TempDir())
	ids := []string{"a", "b", "c"}
	for _, id := range ids {
		ensure(t, s, id, 16*mib)
	}
	dir := t.TempDir()
	rapid.Check(t, func(r *rapid.T) {
		d, err := os.MkdirTemp(dir, "")
		if err != nil {
			r.Fatal(err)
		}
		s := open(t, d)
		defer func() { s.Close() }()
		for _, id := range ids { // any file will do as a disk here
			if err := os.WriteFile(filepath.Join(d, "disks", id+".img"), nil, 0o600); err != nil {
				r.Fatal(err)
			}
		}
		model := map[string]string{}
		id := rapid.SampledFrom(ids)
		holder := rapid.SampledFrom([]string{"m-1", "m-2", "metal"})
		r.Repeat(map[string]func(*rapid.T){
			"use": func(r *rapid.T) {
				id, h := id.Draw(r, "id"), holder.Draw(r, "holder")
				err := s.Use(ctx, id, h)
				if ok := model[id] == "" || model[id] == h; ok != (err == nil) {
					r.Fatalf("use of %s by %s while %q has it: %v", id, h, model[id], err)
				} else if ok {
					model[id] = h
				}
			},
			"unuse": func(r *rapid.T) {
				id, h := id.Draw(r, "id"), holder.Draw(r, "holder")
				err := s.Unuse(ctx, id, h)
				if ok := model[id] == "" || model[id] == h; ok != (err == nil) {
					r.Fatalf("unuse of %s by %s while %q has it: %v", id, h, model[id], err)
				} else if ok {
					delete(model, id)
				}
			},
			"restart": func(r *rapid.T) {
				s.Close()
				s = open(t, d)
			},
		})
	})
}

func TestManyAtOnce(t *testing.T) {
	s := open(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := s.EnsureScratch(ctx, fmt.Sprint("v-", i%8), 64*mib); err != nil {
				t.Error(err)
			}
			if _, err := s.List(ctx); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	if vs, err := s.List(ctx); err != nil || len(vs) != 8 {
		t.Errorf("%v %v", vs, err)
	}
}

func TestDamagedUse(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ensure(t, s, "a", 16*mib)
	if err := os.WriteFile(filepath.Join(dir, "uses", "a"), []byte("\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Use(ctx, "a", "m-1"); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("use: %v", err)
	}
	if err := s.Remove(ctx, "a"); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("remove: %v", err)
	}
}
