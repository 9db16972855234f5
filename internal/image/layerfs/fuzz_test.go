package layerfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// FuzzScan: what is accepted must convert, and its normalised form must be
// accepted again with no fewer limits; everything else is an invalid argument.
func FuzzScan(f *testing.F) {
	f.Add(makeTar(f, file{name: "a/b", body: "x"}, file{name: "a/c", typ: tar.TypeLink, link: "a/b"}, file{name: "a/.wh.d"}, file{name: "a/.wh..wh..opq"}))
	f.Add(makeTar(f, file{name: "l", typ: tar.TypeSymlink, link: "/d"}, file{name: "d/"}, file{name: "l/x", body: "y"}, file{name: "d/x", body: "z"}))
	f.Add(makeTar(f, file{name: "x", xattrs: map[string]string{"user.a": "1", "user.bb": "2", "security.capability": "3"}}, file{name: "dev/null", typ: tar.TypeChar, major: 1, minor: 3}))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, layer []byte) {
		lim := Limits{MaxEntries: 2000, MaxBytes: 8 << 20}
		tree, err := Scan(bytes.NewReader(layer), lim)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("refused with another class: %v", err)
			}
			return
		}
		var norm bytes.Buffer
		if err := tree.WriteTar(bytes.NewReader(layer), &norm); err != nil {
			t.Fatalf("accepted, but can't be normalised: %v", err)
		}
		tr := tar.NewReader(&norm)
		for {
			if _, err := tr.Next(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("the normalised tar is broken: %v", err)
			}
		}
		img, err := os.Create(filepath.Join(dir, "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		if _, err := tree.Ext4(bytes.NewReader(layer), img); err != nil {
			t.Fatalf("accepted, but can't be converted: %v", err)
		}
	})
}
