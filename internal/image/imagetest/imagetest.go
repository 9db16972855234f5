// Package imagetest makes small container images out of this machine's own
// files, for tests and demonstrations: no registry, no network.
//
//	archive := imagetest.BusyboxImage(t)                       // docker-archive, about 2 MB
//	archive := imagetest.LddClosure(t, "apache:test",           // slim: binaries and their libraries
//	        imagetest.Config{Cmd: ...}, "/usr/sbin/apache2", "/etc/mime.types", ...)
//
// The results are docker-archives that image.Store.Load reads. The same files
// give the same bytes, and so the same image id.
package imagetest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"testing"
	"time"
)

// Config is what an image says of the process to run, in Docker's words.
type Config struct {
	User         string              `json:"User,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	Volumes      map[string]struct{} `json:"Volumes,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	Labels       map[string]string   `json:"Labels,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
}

// Layer collects the files of one layer. The zero value is ready for use.
type Layer struct {
	entries map[string]*entry
}

type entry struct {
	hdr  tar.Header
	body []byte
	from string // host file, read when the layer is written
}

const goarch = runtime.GOARCH

var epoch = time.Unix(1700000000, 0) // all files have this time, so that layers repeat

func (l *Layer) put(name string, e *entry) {
	name = strings.Trim(path.Clean("/"+name), "/")
	if l.entries == nil {
		l.entries = map[string]*entry{}
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if l.entries[dir] == nil {
			l.entries[dir] = &entry{hdr: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}}
		}
	}
	l.entries[name] = e
}

// Dir adds a directory.
func (l *Layer) Dir(name string, mode int64) {
	l.put(name, &entry{hdr: tar.Header{Typeflag: tar.TypeDir, Mode: mode}})
}

// File adds a file with this content.
func (l *Layer) File(name string, mode int64, content string) {
	l.put(name, &entry{hdr: tar.Header{Typeflag: tar.TypeReg, Mode: mode}, body: []byte(content)})
}

// Symlink adds a symbolic link.
func (l *Layer) Symlink(name, target string) {
	l.put(name, &entry{hdr: tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: target}})
}

// Link adds a hard link to a file of the layer.
func (l *Layer) Link(name, target string) {
	l.put(name, &entry{hdr: tar.Header{Typeflag: tar.TypeLink, Linkname: strings.Trim(target, "/")}})
}

// Whiteout hides a file or directory of the layers below.
func (l *Layer) Whiteout(name string) {
	l.File(path.Join(path.Dir(name), ".wh."+path.Base(name)), 0o600, "")
}

// Entry adds any tar entry: for tests of what a store must refuse. The name is
// written as it is.
func (l *Layer) Entry(hdr tar.Header, content string) {
	if l.entries == nil {
		l.entries = map[string]*entry{}
	}
	l.entries[hdr.Name] = &entry{hdr: hdr, body: []byte(content)}
}

// Host adds a file, symbolic link or whole directory of this host at the same
// path. Symbolic links bring what they point to.
func (l *Layer) Host(name string) error {
	return l.HostAs(name, name)
}

// HostAs adds a file or directory of this host at another path.
func (l *Layer) HostAs(from, to string) error {
	st, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch {
	case st.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		l.Symlink(to, target)
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(from), target)
		}
		if _, err := os.Lstat(target); err != nil {
			return nil // it dangles here too
		}
		if l.has(target) {
			return nil
		}
		return l.Host(target)
	case st.IsDir():
		l.Dir(to, int64(st.Mode().Perm()))
		list, err := os.ReadDir(from)
		if err != nil {
			return err
		}
		for _, e := range list {
			if err := l.HostAs(filepath.Join(from, e.Name()), path.Join(to, e.Name())); err != nil {
				return err
			}
		}
		return nil
	case st.Mode().IsRegular():
		l.put(to, &entry{hdr: tar.Header{Typeflag: tar.TypeReg, Mode: int64(st.Mode().Perm()), Size: st.Size()}, from: from})
		return nil
	}
	return nil
}

func (l *Layer) has(name string) bool {
	_, ok := l.entries[strings.Trim(path.Clean("/"+name), "/")]
	return ok
}

// Tar writes the layer: directories first, then by name.
func (l *Layer) Tar() ([]byte, error) {
	names := make([]string, 0, len(l.entries))
	for n := range l.entries {
		names = append(names, n)
	}
	sort.Slice(names, func(i, j int) bool {
		a, b := l.entries[names[i]].hdr.Typeflag == tar.TypeLink, l.entries[names[j]].hdr.Typeflag == tar.TypeLink
		if a != b {
			return b // hard links last
		}
		return names[i] < names[j]
	})
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, n := range names {
		e := l.entries[n]
		h := e.hdr
		h.Name, h.Format = n, tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = epoch
		}
		body := e.body
		if e.from != "" {
			var err error
			if body, err = os.ReadFile(e.from); err != nil {
				return nil, err
			}
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(body))
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("%s: %w", n, err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(body); err != nil {
				return nil, fmt.Errorf("%s: %w", n, err)
			}
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// WriteArchive writes a docker-archive of one image to w. layers are
// uncompressed tars, lowest first.
func WriteArchive(w io.Writer, ref string, c Config, layers ...[]byte) error {
	type rootfs struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	root := rootfs{Type: "layers"}
	var files []string
	tw := tar.NewWriter(w)
	add := func(name string, b []byte) error {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(b)), Mode: 0o644, ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err := tw.Write(b)
		return err
	}
	written := map[string]bool{}
	for _, l := range layers {
		hex := digest(l)
		root.DiffIDs = append(root.DiffIDs, "sha256:"+hex)
		files = append(files, hex+"/layer.tar")
		if written[hex] {
			continue
		}
		written[hex] = true
		if err := add(hex+"/layer.tar", l); err != nil {
			return err
		}
	}
	config, err := json.Marshal(map[string]any{
		"created": epoch.UTC(), "architecture": goarch, "os": "linux", "config": c, "rootfs": root,
	})
	if err != nil {
		return err
	}
	var tags []string
	if ref != "" {
		tags = []string{ref}
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": digest(config) + ".json", "RepoTags": tags, "Layers": files}})
	if err != nil {
		return err
	}
	return errors.Join(add(digest(config)+".json", config), add("manifest.json", manifest), tw.Close())
}

func digest(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// Archive writes a docker-archive into a temporary file and returns its path.
func Archive(t testing.TB, ref string, c Config, layers ...*Layer) string {
	t.Helper()
	var tars [][]byte
	for _, l := range layers {
		b, err := l.Tar()
		if err != nil {
			t.Fatalf("make image %s: %v", ref, err)
		}
		tars = append(tars, b)
	}
	f, err := os.CreateTemp(t.TempDir(), "image-*.tar")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(WriteArchive(f, ref, c, tars...), f.Close()); err != nil {
		t.Fatalf("make image %s: %v", ref, err)
	}
	return f.Name()
}
