package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func open(t testing.TB, dir string) *Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s, err := Open(ctx, Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func container(project, name string) *v1.Container {
	return &v1.Container{Meta: &v1.Meta{Project: project, Name: name, Id: "id-" + project + "-" + name}, Spec: &v1.ContainerSpec{Image: "busybox"}}
}

func TestWriteReadAndReopen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	c := container("shop", "web-1")
	rev, err := s.Create(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if c.Meta.Revision != rev || s.Revision() < rev {
		t.Fatalf("revision %d, record %d, cache %d", rev, c.Meta.Revision, s.Revision())
	}
	if _, err := s.Create(ctx, container("shop", "web-1")); !errdefs.IsAlreadyExists(err) {
		t.Fatalf("second create: %v", err)
	}
	got, err := ByID[*v1.Container](s, Containers, "id-shop-web-1")
	if err != nil || got.Meta.Name != "web-1" {
		t.Fatal(got, err)
	}
	u, err := Update(ctx, s, KeyOf(c), func(c *v1.Container) error { c.Stopped = true; return nil })
	if err != nil || !u.Stopped || u.Meta.Revision <= rev {
		t.Fatal(u, err)
	}
	if _, err := s.Txn().Update(c).Create(container("shop", "web-2")).Commit(ctx); !errdefs.IsConflict(err) {
		t.Fatalf("stale update: %v", err)
	}
	if _, err := Get[*v1.Container](s, Key{Containers, "shop", "web-2"}); !errdefs.IsNotFound(err) {
		t.Fatalf("half a transaction was written: %v", err)
	}
	id := s.ClusterID()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if s.ClusterID() != id || id == "" {
		t.Fatal("another cluster id after a restart")
	}
	l := List[*v1.Container](s, "shop")
	if len(l) != 1 || !l[0].Stopped || l[0].Meta.Revision != u.Meta.Revision {
		t.Fatal(l)
	}
	if err := s.Delete(ctx, l[0]); err != nil {
		t.Fatal(err)
	}
	if len(List[*v1.Container](s, "")) != 0 {
		t.Fatal("still there")
	}
}

func TestBadNames(t *testing.T) {
	s := open(t, t.TempDir())
	for _, n := range []string{"", "a/b", "..", "_", strings.Repeat("x", 200), "a b"} {
		if _, err := s.Create(t.Context(), container("p", n)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", n, err)
		}
	}
}

func TestSecondOpenerIsRefused(t *testing.T) {
	dir := t.TempDir()
	open(t, dir)
	_, err := Open(t.Context(), Options{Dir: dir})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), fmt.Sprint("pid ", os.Getpid())) {
		t.Fatal(err)
	}
}

func TestCorruptRecordIsLeftOut(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	for _, n := range []string{"a", "b", "c"} {
		if _, err := s.Create(ctx, container("p", n)); err != nil {
			t.Fatal(err)
		}
	}
	k := Key{Containers, "p", "b"}
	res, err := s.client.Put(ctx, k.path(), "\xff\xff rubbish")
	if err != nil {
		t.Fatal(err)
	}
	check := func(s *Store) {
		t.Helper()
		if _, err := Get[*v1.Container](s, k); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "p/b") {
			t.Fatal(err)
		}
		if l := List[*v1.Container](s, "p"); len(l) != 2 {
			t.Fatal(l)
		}
		if snap := s.Snapshot(); len(s.Corrupt()) != 1 || !snap.Broken(k) || !snap.Unreadable(Volumes, Containers) || snap.Unreadable(Volumes) {
			t.Fatal(s.Corrupt(), snap.Corrupt)
		} else if last, all := LastOf[*v1.Container](snap); len(last) != 1 || !all || last[0].Meta.Id != "id-p-b" || last[0].Meta.Revision == 0 {
			t.Fatal("its last readable copy is", last)
		}
		if _, err := s.Create(ctx, container("p", "b")); !errdefs.IsDataLoss(err) {
			t.Fatal(err)
		}
	}
	s.WaitRevision(ctx, uint64(res.Header.Revision))
	check(s)
	s.Close()
	s = open(t, dir)
	check(s)
	sub := s.Subscribe(false, Containers)
	defer sub.Close()
	if err := s.Purge(ctx, k); err != nil {
		t.Fatal(err)
	}
	select {
	case <-sub.Ready(): // so that who waits for a complete state looks again
	case <-time.After(time.Minute):
		t.Fatal("nobody was told that a corrupt record went")
	}
	if _, err := s.Create(ctx, container("p", "b")); err != nil || len(s.Corrupt()) != 0 {
		t.Fatal(err, s.Corrupt())
	}
	// A record under another's name is corrupt as well.
	raw, _ := s.client.Get(ctx, Key{Containers, "p", "a"}.path())
	res, _ = s.client.Put(ctx, Key{Containers, "p", "z"}.path(), string(raw.Kvs[0].Value))
	s.WaitRevision(ctx, uint64(res.Header.Revision))
	if _, err := Get[*v1.Container](s, Key{Containers, "p", "z"}); !errdefs.IsDataLoss(err) {
		t.Fatal(err)
	}
}

func TestSecretsAreSealed(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ctx := t.Context()
	const secret = "correct horse battery staple"
	c := container("p", "a")
	c.Spec.Files = []*v1.File{{Target: "/run/secrets/x", Content: []byte(secret), Secret: true}, {Target: "/empty"}}
	if _, err := s.Create(ctx, c); err != nil {
		t.Fatal(err)
	}
	if string(c.Spec.Files[0].Content) != secret {
		t.Fatal("the caller's record was changed")
	}
	raw, err := s.client.Get(ctx, KeyOf(c).path())
	if err != nil || bytes.Contains(raw.Kvs[0].Value, []byte(secret)) {
		t.Fatal("secret lies in the clear", err)
	}
	s.Close()
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if b, _ := os.ReadFile(p); bytes.Contains(b, []byte(secret)) {
			t.Errorf("secret lies in the clear in %s", p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "secret.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
	s = open(t, dir)
	got, err := Get[*v1.Container](s, KeyOf(c))
	if err != nil || string(got.Spec.Files[0].Content) != secret {
		t.Fatal(got, err)
	}
	s.Close()
	os.WriteFile(filepath.Join(dir, "secret.key"), bytes.Repeat([]byte{7}, 32), 0o600)
	s = open(t, dir)
	if _, err := Get[*v1.Container](s, KeyOf(c)); !errdefs.IsDataLoss(err) {
		t.Fatal(err)
	}
}

func TestSubscribeCoalesces(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	s.Create(ctx, container("p", "before"))
	sub := s.Subscribe(true, Containers)
	defer sub.Close()
	if got := sub.Take(); len(got) != 1 || got[0].Old != nil {
		t.Fatal(got)
	}
	c := container("p", "a")
	s.Create(ctx, c)
	Update(ctx, s, KeyOf(c), func(c *v1.Container) error { c.Stopped = true; return nil })
	s.Create(ctx, &v1.Project{Meta: &v1.Meta{Name: "p"}})
	d := container("p", "short")
	s.Create(ctx, d)
	s.Delete(ctx, d)
	got := sub.Take()
	if len(got) != 1 || got[0].Old != nil || !got[0].New.(*v1.Container).Stopped {
		t.Fatal(got)
	}
}

func TestWatchFromRevision(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	from := s.Revision()
	a := container("p", "a")
	s.Create(ctx, a)
	s.Create(ctx, &v1.Project{Meta: &v1.Meta{Name: "p"}})
	s.Delete(ctx, a)
	ch, _ := s.Watch(ctx, from, Containers)
	c := <-ch
	if c.New == nil || c.Key.Name != "a" {
		t.Fatal(c)
	}
	if c = <-ch; c.New != nil || c.Key.Name != "a" {
		t.Fatal(c)
	}
	if _, err := s.client.Compact(ctx, int64(s.Revision())); err != nil {
		t.Fatal(err)
	}
	ch, errs := s.Watch(ctx, from)
	for range ch {
	}
	if err := <-errs; !errdefs.IsOutOfRange(err) {
		t.Fatal(err)
	}
}

func TestReadOnlyDirectory(t *testing.T) {
	// Root writes through permissions: a path below a file is refused to everyone.
	f := filepath.Join(t.TempDir(), "file")
	os.WriteFile(f, nil, 0o600)
	if _, err := Open(t.Context(), Options{Dir: filepath.Join(f, "x")}); err == nil || !strings.Contains(err.Error(), "state directory") {
		t.Fatal(err)
	}
	if got := diskClass(&fs.PathError{Err: errors.New("x")}); got != errdefs.ErrUnavailable {
		t.Fatal(got)
	}
}

// TestKill writes in a child that is killed at a random moment: whatever the
// child said was written is there afterwards.
func TestKill(t *testing.T) {
	if dir := os.Getenv("STORE_TEST_CHILD"); dir != "" {
		s := open(t, dir)
		n := len(List[*v1.Container](s, ""))
		for i := n; ; i++ {
			if _, err := s.Create(t.Context(), container("p", fmt.Sprint("c", i))); err != nil {
				t.Fatal(err)
			}
			os.Stdout.WriteString("w")
		}
	}
	dir := t.TempDir()
	acked := 0
	for round := range 4 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
		cmd.Env = append(os.Environ(), "STORE_TEST_CHILD="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		for i := 0; i < 5+round*7; i++ {
			if _, err := out.Read(b); err != nil {
				t.Fatal(err)
			}
			acked++
		}
		cmd.Process.Kill()
		rest := new(bytes.Buffer)
		rest.ReadFrom(out)
		acked += rest.Len()
		cmd.Wait()
	}
	s := open(t, dir)
	if n := len(List[*v1.Container](s, "")); n < acked {
		t.Fatalf("%d writes were acknowledged, %d are there", acked, n)
	}
}

// TestResync: a cache that lost its watch catches up by reading everything.
func TestResync(t *testing.T) {
	s := open(t, t.TempDir())
	ctx := t.Context()
	s.Create(ctx, container("p", "a"))
	s.Create(ctx, container("p", "b"))
	sub := s.Subscribe(false)
	defer sub.Close()
	s.cache.mu.Lock()
	delete(s.cache.kinds[Containers], Key{Containers, "p", "a"})
	s.cache.kinds[Containers][Key{Containers, "p", "ghost"}] = container("p", "ghost")
	s.cache.mu.Unlock()
	if _, err := s.load(ctx); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range List[*v1.Container](s, "") {
		names = append(names, c.Meta.Name)
	}
	if strings.Join(names, " ") != "a b" || len(sub.Take()) != 2 {
		t.Fatal(names)
	}
}

func TestFatalEndsTheStoreNotTheProcess(t *testing.T) {
	s := open(t, t.TempDir())
	s.fail(classOfFatal("/x", "write: no space left on device"))
	<-s.Failed()
	if _, err := s.Create(t.Context(), container("p", "a")); !errdefs.IsResourceExhausted(err) {
		t.Fatal(err)
	}
}

func BenchmarkList1000(b *testing.B) {
	s := open(b, b.TempDir())
	for i := range 10 {
		tx := s.Txn()
		for j := range 100 {
			tx.Create(container("p", fmt.Sprint("c", i, "-", j)))
		}
		if _, err := tx.Commit(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if n := len(List[*v1.Container](s, "")); n != 1000 {
			b.Fatal(n)
		}
	}
}
