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
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
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

// Busybox returns a layer with a static busybox, all its applets as links, /etc
// with root and nobody, and the directories that programs expect.
func Busybox() (*Layer, error) {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("busybox is missing; install busybox-static: %w", err)
	}
	if libs, err := libraries(bin); err != nil || len(libs) > 0 {
		return nil, fmt.Errorf("%s is not static; install busybox-static (%v)", bin, err)
	}
	out, err := exec.Command(bin, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's applets: %w", err)
	}
	l := &Layer{}
	if err := l.HostAs(bin, "bin/busybox"); err != nil {
		return nil, err
	}
	for _, a := range strings.Fields(string(out)) {
		if a != "busybox" && !strings.Contains(a, "/") {
			l.Link("bin/"+a, "bin/busybox")
		}
	}
	for _, d := range []string{"dev", "proc", "sys", "run", "root", "home", "usr/bin", "var/log", "etc"} {
		l.Dir(d, 0o755)
	}
	l.Dir("tmp", 0o1777)
	l.File("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	l.File("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")
	return l, nil
}

// Path is the PATH of the images made here.
const Path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// BusyboxRef is the name of BusyboxImage.
const BusyboxRef = "busybox:test"

// BusyboxImage writes the archive of an image with all of busybox, named
// "busybox:test", and returns its path.
func BusyboxImage(t testing.TB) string {
	t.Helper()
	l, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	return Archive(t, BusyboxRef, Config{Env: []string{Path}, Cmd: []string{"sh"}}, l)
}

// LddClosure writes the archive of a slim image: busybox, the host's files named
// (files, directories, symbolic links), and the shared libraries that the
// binaries among them need. Returns the archive's path.
func LddClosure(t testing.TB, ref string, c Config, files ...string) string {
	t.Helper()
	base, err := Busybox()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Closure(files...)
	if err != nil {
		t.Fatalf("make image %s: %v", ref, err)
	}
	if len(c.Env) == 0 {
		c.Env = []string{Path}
	}
	return Archive(t, ref, c, base, l)
}

// Closure returns a layer with the host's files named and the shared libraries
// that the ELF binaries among them need, at the host's paths.
func Closure(files ...string) (*Layer, error) {
	l := &Layer{}
	for _, f := range files {
		if err := l.Host(f); err != nil {
			return nil, err
		}
	}
	for name, e := range l.entries {
		if e.from == "" {
			continue
		}
		libs, err := libraries(e.from)
		if err != nil {
			return nil, fmt.Errorf("libraries of %s: %w", name, err)
		}
		for _, lib := range libs {
			if l.has(lib) {
				continue
			}
			if err := l.Host(lib); err != nil {
				return nil, err
			}
		}
	}
	return l, nil
}

// libraries asks the dynamic loader which libraries a binary needs; none when it
// is static or no ELF file.
func libraries(name string) ([]string, error) {
	f, err := elf.Open(name)
	if err != nil {
		return nil, nil
	}
	defer f.Close()
	needed, err := f.ImportedLibraries()
	if err != nil || len(needed) == 0 {
		return nil, nil //nolint:nilerr // no dynamic section
	}
	out, err := exec.Command("ldd", name).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("ldd: %w: %s", err, bytes.TrimSpace(out))
	}
	var libs []string
	for _, line := range strings.Split(string(out), "\n") {
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				libs = append(libs, word)
			}
		}
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd: %s", strings.TrimSpace(line))
		}
	}
	return libs, nil
}
