package image

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/image/imagetest"
)

func openStore(t testing.TB, o Options) *LocalStore {
	t.Helper()
	return openAt(t, t.TempDir(), o)
}

func openAt(t testing.TB, dir string, o Options) *LocalStore {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func load(t testing.TB, s *LocalStore, path string) []*v1.Image {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	images, err := s.Load(context.Background(), f, nil)
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return images
}

// assertEmpty fails when the store has any file but its own.
func assertEmpty(t testing.TB, s *LocalStore) {
	t.Helper()
	if f := dataFiles(t, s); len(f) > 0 {
		t.Errorf("left behind: %v", f)
	}
}

func dataFiles(t testing.TB, s *LocalStore) []string {
	t.Helper()
	var out []string
	for _, d := range []string{"tmp", "blobs", "layers"} {
		err := filepath.Walk(s.path(d), func(p string, fi os.FileInfo, err error) error {
			if err == nil && (!fi.IsDir() || strings.HasPrefix(fi.Name(), "work-")) {
				out = append(out, strings.TrimPrefix(p, s.dir+"/"))
			}
			return err
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return out
}

func TestLoadBusyboxAndUseIt(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, Options{})
	var steps []string
	f, err := os.Open(imagetest.BusyboxImage(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	images, err := s.Load(ctx, f, func(p *v1.Progress) { steps = append(steps, p.Action) })
	if err != nil || len(images) != 1 {
		t.Fatalf("load: %v, %v", images, err)
	}
	img := images[0]
	if img.Names[0] != "docker.io/library/busybox:test" || img.Os != "linux" || len(img.Layers) != 1 || img.SizeBytes < 1<<20 || img.Config.Command[0] != "sh" {
		t.Errorf("image: %v", img)
	}
	if got := strings.Join(steps, " "); !strings.Contains(got, "reading") || !strings.HasSuffix(got, "ready loaded") {
		t.Errorf("progress: %s", got)
	}
	for _, ref := range []string{"busybox:test", "docker.io/library/busybox:test", img.Id, img.Id[7:15], img.Id[:20]} {
		if got, err := s.Get(ctx, ref); err != nil || got.Id != img.Id {
			t.Errorf("get %s: %v, %v", ref, got, err)
		}
	}
	if _, err := s.Get(ctx, "busybox"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("another tag: %v", err)
	}
	if _, err := s.Layers(ctx, img.Id, nil); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("layers without a lease: %v", err)
	}
	if err := s.Lease(ctx, "c1", img.Id); err != nil {
		t.Fatal(err)
	}
	layers, err := s.Layers(ctx, img.Id, nil)
	if err != nil || len(layers) != 1 || layers[0].FSType != "ext4" || layers[0].DiffID != img.Layers[0] {
		t.Fatalf("layers: %v, %v", layers, err)
	}
	st, err := os.Stat(layers[0].Path)
	if err != nil || st.Size() != layers[0].Size || st.Mode().Perm() != 0o444 {
		t.Errorf("block image: %v, %v", st, err)
	}
	if err := os.Remove(layers[0].Path); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Layers(ctx, img.Id, nil); err != nil || again[0].Size != st.Size() {
		t.Errorf("lost block image was not made again: %v, %v", again, err)
	}
	if _, _, err := s.Remove(ctx, "busybox:test", false); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "c1") {
		t.Errorf("remove in use: %v", err)
	}
	if err := s.Release(ctx, "c1"); err != nil {
		t.Fatal(err)
	}
	untagged, deleted, err := s.Remove(ctx, "busybox:test", false)
	if err != nil || len(untagged) != 1 || len(deleted) != 2 || deleted[0] != img.Id {
		t.Errorf("remove: %v, %v, %v", untagged, deleted, err)
	}
	assertEmpty(t, s)
}

func TestOneProcessAtATime(t *testing.T) {
	dir := t.TempDir()
	s := openAt(t, dir, Options{})
	if _, err := Open(dir, Options{}); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), dir) {
		t.Errorf("second open: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openAt(t, dir, Options{})
	if _, err := s.List(context.Background()); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("list after close: %v", err)
	}
}

func TestDamagedMetadataIsNamed(t *testing.T) {
	dir := t.TempDir()
	openAt(t, dir, Options{}).Close()
	if err := os.WriteFile(filepath.Join(dir, "meta.db"), make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, errdefs.ErrDataLoss) || !strings.Contains(err.Error(), "meta.db") {
		t.Errorf("open: %v", err)
	}
}

func TestImport(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, Options{})
	l, err := imagetest.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	tarball, err := l.Tar()
	if err != nil {
		t.Fatal(err)
	}
	o := ImportOptions{Changes: []string{`CMD ["sh", "-c", "echo hi"]`, "ENV A=1 B='two words'", "EXPOSE 80", "WORKDIR /srv", "WORKDIR www"}}
	img, err := s.Import(ctx, strings.NewReader(string(tarball)), "my/base:1", o)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Import(ctx, io.MultiReader(strings.NewReader(string(tarball))), "my/base:2", o)
	if err != nil || again.Id != img.Id || len(again.Names) != 2 {
		t.Errorf("second import: %v, %v", again, err)
	}
	if c := img.Config; c.Command[2] != "echo hi" || c.Env[1] != "B=two words" || c.ExposedPorts[0] != "80/tcp" || c.WorkingDir != "/srv/www" {
		t.Errorf("config: %v", c)
	}
}

// A lease that is on its way to the disk counts already.
func TestLeaseSoon(t *testing.T) {
	s := openStore(t, Options{})
	ctx := context.Background()
	f, err := os.Open(imagetest.BusyboxImage(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	images, err := s.Load(ctx, f, nil)
	if err != nil {
		t.Fatal(err)
	}
	img := images[0]
	tx, err := s.db.Begin(true) // nobody else writes until it ends
	if err != nil {
		t.Fatal(err)
	}
	kept, err := s.LeaseSoon(ctx, "c1", img.Id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Layers(ctx, img.Id, nil); err != nil {
		t.Errorf("layers: %v", err)
	}
	if got, err := s.Get(ctx, img.Id); err != nil || !got.InUse {
		t.Errorf("not in use: %v, %v", got, err)
	}
	removed := make(chan error)
	go func() {
		_, _, err := s.Remove(ctx, "busybox:test", false)
		removed <- err
	}()
	if err := tx.Rollback(); err != nil {
		t.Fatal(err)
	}
	if err := <-removed; !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), "c1") {
		t.Errorf("remove in use: %v", err)
	}
	for range 2 {
		if err := kept(); err != nil {
			t.Fatal(err)
		}
	}
	if l, err := s.Leases(ctx); err != nil || len(l["c1"]) != 1 || len(s.soon) != 0 {
		t.Errorf("leases: %v %v, %d on their way", l, err, len(s.soon))
	}
	if _, err := s.LeaseSoon(ctx, "c1", "nothing"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("lease of no image: %v", err)
	}
}
