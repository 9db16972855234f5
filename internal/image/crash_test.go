package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"tandem/internal/image/imagetest"
)

const crashDir = "TANDEM_TEST_CRASH_DIR"

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		crashWork(dir)
		return
	}
	os.Exit(m.Run())
}

// crashWork loads, tags, leases and removes until it is killed.
func crashWork(dir string) {
	ctx := context.Background()
	s, err := Open(dir, Options{Platform: "linux/amd64"})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	archives := os.Getenv("TANDEM_TEST_CRASH_ARCHIVES")
	fmt.Println("ready")
	for i := 0; ; i++ {
		f, err := os.Open(filepath.Join(archives, fmt.Sprint(rand.IntN(4))))
		if err == nil {
			_, err = s.Load(ctx, f, nil)
			f.Close()
		}
		name := fmt.Sprintf("app:%d", rand.IntN(4))
		other := s.Tag(ctx, name, fmt.Sprintf("other:%d", i%5))
		lease := s.Lease(ctx, fmt.Sprintf("c%d", i%3), name)
		_ = s.Release(ctx, fmt.Sprintf("c%d", (i+1)%3))
		_, _, rm := s.Remove(ctx, name, i%2 == 0)
		if i%7 == 0 {
			_, _, perr := s.Prune(ctx, i%14 == 0)
			err = errors.Join(err, perr)
		}
		for _, e := range []error{other, lease, rm} {
			if e != nil && !errors.Is(e, errdefs.ErrNotFound) && !errors.Is(e, errdefs.ErrFailedPrecondition) {
				err = errors.Join(err, e)
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// appArchive is image app:i: a layer that all share, one that two share, one of
// its own.
func appArchive(t testing.TB, i int) []byte {
	base := layerTar(t, func(l *imagetest.Layer) { l.File("base", 0o644, strings.Repeat("base ", 5000)) })
	half := layerTar(t, func(l *imagetest.Layer) { l.File("half", 0o644, strings.Repeat(fmt.Sprint(i/2), 9000)) })
	own := layerTar(t, func(l *imagetest.Layer) { l.File("own", 0o644, strings.Repeat(fmt.Sprint(i), 20000)) })
	return dockerArchive(t, fmt.Sprintf("app:%d", i), base, half, own)
}

// assertSound checks that the store has all files that its images need, with the
// right content, and no others.
func assertSound(t interface {
	Helper()
	Errorf(string, ...any)
	Fatalf(string, ...any)
}, s *LocalStore, contents bool) {
	t.Helper()
	want := map[string]bool{}
	err := s.db.View(func(tx *bolt.Tx) error {
		err := eachRecord(tx, bucketImages, func(id string, rec imageRecord) error {
			if hashOf(rec.Config) != id {
				t.Errorf("image %s has another config", id)
			}
			for _, d := range rec.Layers {
				l, found, err := record[layerRecord](tx, bucketLayers, d)
				if err != nil || !found {
					return fmt.Errorf("image %s: layer %s is not recorded: %v", id, d, err)
				}
				want[s.layerPath(d)], want[s.blobPath(l.Blob)] = true, true
				if !contents {
					continue
				}
				r, err := s.openTar(s.blobPath(l.Blob), l.Compression)
				if err != nil {
					return err
				}
				sum := sha256.New()
				_, err = io.Copy(sum, r)
				r.Close()
				if err != nil || digestOf(sum) != d || !fileHasSize(s.layerPath(d), l.ImageSize) {
					t.Errorf("layer %s is damaged: %v", d, err)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, bucket := range [][]byte{bucketNames} {
			err = eachRecord(tx, bucket, func(name string, n nameRecord) error {
				if tx.Bucket(bucketImages).Get([]byte(n.ID)) == nil {
					t.Errorf("name %s points to nothing", name)
				}
				return nil
			})
		}
		if err != nil {
			return err
		}
		return eachRecord(tx, bucketLeases, func(holder string, l leaseRecord) error {
			for _, id := range l.IDs {
				if tx.Bucket(bucketImages).Get([]byte(id)) == nil {
					t.Errorf("the image that %s leases is gone", holder)
				}
			}
			return nil
		})
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	var have, need []string
	for _, d := range []string{"tmp", "blobs", "layers"} {
		_ = filepath.Walk(s.path(d), func(p string, fi os.FileInfo, err error) error {
			if err == nil && (!fi.IsDir() || strings.HasPrefix(fi.Name(), "work-")) {
				have = append(have, p)
			}
			return nil
		})
	}
	for p := range want {
		need = append(need, p)
	}
	sort.Strings(have)
	sort.Strings(need)
	if strings.Join(have, "\n") != strings.Join(need, "\n") {
		t.Errorf("files:\n%s\nneeded:\n%s", strings.Join(have, "\n"), strings.Join(need, "\n"))
	}
}

func TestKillAnywhere(t *testing.T) {
	dir, archives := t.TempDir(), t.TempDir()
	for i := range 4 {
		if err := os.WriteFile(filepath.Join(archives, fmt.Sprint(i)), appArchive(t, i), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 25 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashDir+"="+dir, "TANDEM_TEST_CRASH_ARCHIVES="+archives)
		cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
			_ = cmd.Wait()
			t.Fatalf("the child did not start: %v: %s", err, stderr.String())
		}
		time.Sleep(time.Duration(rand.IntN(120)) * time.Millisecond) // the moment is the point
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if stderr.Len() > 0 {
			t.Fatalf("round %d: %s", round, stderr.String())
		}
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		assertSound(t, s, true)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
}

func TestOpenRemovesWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	s := openAt(t, dir, Options{})
	load(t, s, imagetest.BusyboxImage(t))
	before := dataFiles(t, s)
	s.Close()
	for _, p := range []string{"tmp/work-1/x", "blobs/sha256/" + strings.Repeat("a", 64), "layers/sha256/" + strings.Repeat("b", 64) + ".ext4"} {
		p = filepath.Join(dir, p)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte("x"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s = openAt(t, dir, Options{})
	if after := dataFiles(t, s); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("files: %v, want %v", after, before)
	}
}

func TestCorruptRecordIsNamed(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, Options{})
	img := load(t, s, imagetest.BusyboxImage(t))[0]
	if err := s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketImages).Put([]byte(img.Id), []byte("{")) }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(ctx, img.Id); !errors.Is(err, errdefs.ErrDataLoss) || !strings.Contains(err.Error(), img.Id) {
		t.Errorf("get: %v", err)
	}
	if _, _, err := s.Prune(ctx, true); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("prune must not judge what it can't read: %v", err)
	}
	if len(dataFiles(t, s)) != 2 {
		t.Error("prune took files away")
	}
}

func TestDamagedBlobIsNoticed(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, Options{Platform: "linux/amd64"})
	archive := dockerArchive(t, "app:1", hello(t))
	img, err := s.Load(ctx, bytes.NewReader(archive), nil)
	if err != nil {
		t.Fatal(err)
	}
	id := img[0].Id
	l, _, err := s.layer(img[0].Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.blobPath(l.Blob), make([]byte, l.BlobSize), 0o600); err != nil {
		t.Fatalf("write over a read-only blob (this needs root): %v", err)
	}
	if err := s.Save(ctx, io.Discard, []string{"app:1"}, "docker"); err == nil {
		t.Error("a damaged layer was saved")
	}
	if err := errors.Join(os.Remove(s.layerPath(img[0].Layers[0])), s.Lease(ctx, "c", id)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Layers(ctx, id, nil); !errors.Is(err, errdefs.ErrDataLoss) {
		t.Errorf("layers of a damaged blob: %v", err)
	}
	if _, err := s.Load(ctx, bytes.NewReader(archive), nil); err != nil {
		t.Errorf("loading it again: %v", err)
	}
	if _, err := s.Layers(ctx, id, nil); err != nil {
		t.Errorf("layers after loading again: %v", err)
	}
	assertSound(t, s, true)
}

func TestDiskFull(t *testing.T) {
	ctx := context.Background()
	box := imagetest.BusyboxImage(t)
	for _, kib := range []int{600, 900, 1400, 2000, 2600, 3200, 3600, 4200, 6000} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
			t.Fatalf("mount tmpfs (this needs root): %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		s, err := Open(dir, Options{})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(box)
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Load(ctx, f, nil)
		f.Close()
		if err != nil {
			if !errors.Is(err, errdefs.ErrResourceExhausted) || !strings.Contains(err.Error(), "no space") || !strings.Contains(err.Error(), dir) {
				t.Errorf("%d KiB: %v", kib, err)
			}
			assertEmpty(t, s)
			if kib > 4500 {
				t.Errorf("%d KiB are not enough: %v", kib, err)
			}
		} else if kib < 1000 {
			t.Errorf("%d KiB were enough", kib)
		}
		if err != nil {
			small := dockerArchive(t, "small:1", hello(t))
			if _, err := s.Load(ctx, bytes.NewReader(small), nil); err != nil {
				t.Errorf("%d KiB: a small image afterwards: %v", kib, err)
			}
		}
		assertSound(t, s, true)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestReadOnlyDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount tmpfs (this needs root): %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if _, err := Open(dir, Options{}); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("open of a read-only directory: %v", err)
	}
}
