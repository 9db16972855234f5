package store

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// small is a backup file whose data base is a few bytes.
func small(t testing.TB) []byte {
	t.Helper()
	db := []byte("no data base, but its place")
	h := BackupHeader{Format: 1, Cluster: "0123456789abcdef0123456789abcdef", Revision: 4711, Version: "0.1.0", Time: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		DBBytes: int64(len(db)), SecretKey: bytes.Repeat([]byte{7}, 32)}
	var b bytes.Buffer
	if err := writeBackup(&b, h, func(w io.Writer) (int64, error) { n, err := w.Write(db); return int64(n), err }); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestBackupFormat: what is written today can be read by what comes, and what was
// written at first can be read today.
func TestBackupFormat(t *testing.T) {
	golden := filepath.Join("testdata", "backup-1.golden")
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(golden, small(t), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got := small(t); !bytes.Equal(got, want) {
		t.Errorf("the format has changed:\n%q\n%q", got, want)
	}
	var db bytes.Buffer
	h, err := readBackup(bytes.NewReader(want), &db)
	if err != nil || h.Revision != 4711 || h.Cluster != "0123456789abcdef0123456789abcdef" || h.Version != "0.1.0" || db.String() != "no data base, but its place" || len(h.SecretKey) != 32 {
		t.Fatal(h, err, db.String())
	}
	for n := range want { // cut off anywhere
		if _, err := readBackup(bytes.NewReader(want[:n]), io.Discard); !errdefs.IsDataLoss(err) {
			t.Fatalf("the first %d of %d bytes: %v", n, len(want), err)
		}
	}
	for n := range want { // damaged anywhere
		b := bytes.Clone(want)
		b[n] ^= 0x40
		if _, err := readBackup(bytes.NewReader(b), io.Discard); err == nil {
			t.Fatalf("damage at byte %d is not seen", n)
		}
	}
	if _, err := readBackup(bytes.NewReader(append(bytes.Clone(want), 'x')), io.Discard); !errdefs.IsDataLoss(err) {
		t.Fatal(err)
	}
	next := bytes.Replace(want, []byte(`{"format":1`), []byte(`{"format":2`), 1)
	if _, err := readBackup(bytes.NewReader(next), io.Discard); !errdefs.IsFailedPrecondition(err) {
		t.Fatal("of a later version:", err)
	}
}

func FuzzReadBackup(f *testing.F) {
	whole := small(f)
	f.Add(whole)
	f.Add(whole[:30])
	f.Add([]byte(backupMagic + "\xff\xff\x00\x00{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var db bytes.Buffer
		h, err := readBackup(bytes.NewReader(b), &db)
		if (h == nil) == (err == nil) {
			t.Fatal(h, err)
		}
		if db.Len() > len(b) {
			t.Fatal("more comes out than went in")
		}
		if err == nil && int64(db.Len()) != h.DBBytes {
			t.Fatal(db.Len(), h.DBBytes)
		}
	})
}

// TestBackupAndRestore: all of one moment comes back, secrets and the cluster's id
// too, revisions go on beyond what they were, and it can be written to.
func TestBackupAndRestore(t *testing.T) {
	ctx := t.Context()
	s := open(t, t.TempDir())
	for i := range 40 {
		c := container("p", fmt.Sprint("c", i))
		c.Spec.Files = []*v1.File{{Target: "/run/secrets/x", Content: fmt.Append(nil, "secret ", i), Secret: true}}
		if _, err := s.Create(ctx, c); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		c, err := Get[*v1.Container](s, Key{Containers, "p", fmt.Sprint("c", i)})
		if err == nil {
			err = s.Delete(ctx, c)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	want := List[*v1.Container](s, "")
	file := new(bytes.Buffer)
	done := make(chan error, 1)
	go func() { // it is used meanwhile
		for i := range 50 {
			if _, err := s.Create(ctx, container("q", fmt.Sprint("later", i))); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	if err := s.Backup(ctx, file, "test"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(file.Bytes(), []byte("secret 11")) {
		t.Error("a secret lies in the clear")
	}
	dir := filepath.Join(t.TempDir(), "new", "state")
	h, err := Restore(ctx, dir, bytes.NewReader(file.Bytes()), nil)
	if err != nil {
		t.Fatal(err)
	}
	names := func() (out []string) {
		l, _ := os.ReadDir(dir)
		for _, e := range l {
			out = append(out, e.Name())
		}
		return out
	}
	if got := names(); !slices.Equal(got, []string{"etcd", "lock", "secret.key"}) {
		t.Errorf("in the restored directory are %v", got)
	}
	r := open(t, dir)
	if r.ClusterID() != s.ClusterID() || h.Cluster != s.ClusterID() || h.Version != "test" || time.Since(h.Time) > time.Hour {
		t.Error(h, r.ClusterID(), s.ClusterID())
	}
	if r.Revision() <= s.Revision() {
		t.Errorf("revision %d after %d: hosts would take it for an old one", r.Revision(), s.Revision())
	}
	got := List[*v1.Container](r, "p")
	if len(got) != len(want) || len(r.Corrupt()) != 0 {
		t.Fatalf("%d records instead of %d; %v", len(got), len(want), r.Corrupt())
	}
	for i := range got {
		if !proto.Equal(got[i], want[i]) {
			t.Errorf("%v instead of %v", got[i], want[i])
		}
	}
	// Its revisions are still good for a transaction; new things work, also after a restart.
	if _, err := Update(ctx, r, KeyOf(got[0]), func(c *v1.Container) error { c.Stopped = true; return nil }); err != nil {
		t.Error(err)
	}
	if _, err := r.Create(ctx, container("p", "new")); err != nil {
		t.Error(err)
	}
	if _, err := r.client.Compact(ctx, int64(r.Revision())-1); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir)
	if n := len(List[*v1.Container](r, "p")); n != len(want)+1 {
		t.Errorf("%d records after a restart", n)
	}

	// A directory in use, or with a state, is left alone.
	for _, state := range []string{"used", "stopped"} {
		if _, err := Restore(ctx, dir, bytes.NewReader(file.Bytes()), nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("restoring to a directory that is %s: %v", state, err)
		}
		if state == "used" {
			r.Close()
		}
	}
	// Of what is no whole backup nothing stays behind.
	whole := file.Bytes()
	flipped := bytes.Clone(whole)
	flipped[len(flipped)/2] ^= 1
	fake := new(bytes.Buffer)
	fh := *h
	fh.DBBytes = 3
	writeBackup(fake, fh, func(w io.Writer) (int64, error) { return io.Copy(w, bytes.NewReader([]byte("abc"))) })
	for name, b := range map[string][]byte{"cut": whole[:len(whole)-1], "damaged": flipped, "foreign": []byte("PK\x03\x04 something else"), "empty": nil, "no data base": fake.Bytes()} {
		parent := t.TempDir()
		for _, made := range []bool{false, true} {
			dir := filepath.Join(parent, "x")
			if made {
				os.Mkdir(dir, 0o700)
			}
			if _, err := Restore(ctx, dir, bytes.NewReader(b), nil); !errdefs.IsDataLoss(err) {
				t.Errorf("%s: %v", name, err)
			}
			l, err := os.ReadDir(dir)
			if made && (err != nil || len(l) > 0) || !made && !os.IsNotExist(err) {
				t.Errorf("%s: left behind: %v, %v", name, l, err)
			}
		}
	}
}
