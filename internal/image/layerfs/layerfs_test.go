package layerfs

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// file is one tar entry of a test layer.
type file struct {
	name, body, link string
	typ              byte
	mode             int64
	uid, gid         int
	mtime            time.Time
	xattrs           map[string]string
	major, minor     int64
}

func makeTar(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{
			Name: f.name, Typeflag: f.typ, Linkname: f.link, Mode: f.mode, Uid: f.uid, Gid: f.gid, ModTime: f.mtime,
			Devmajor: f.major, Devminor: f.minor, Format: tar.FormatPAX, PAXRecords: map[string]string{},
		}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if strings.HasSuffix(f.name, "/") {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Typeflag == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1700000000, 0)
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(f.body))
		}
		for k, v := range f.xattrs {
			h.PAXRecords[paxXattr+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte(f.body)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func convert(t testing.TB, layer []byte) string {
	t.Helper()
	tree, err := Scan(bytes.NewReader(layer), Limits{})
	if err != nil {
		t.Fatalf("scan: %v", err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "layer.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := tree.Ext4(bytes.NewReader(layer), f)
	if err != nil {
		t.Fatalf("ext4: %v", err)
	}
	if st, _ := f.Stat(); st.Size() != size || size%block != 0 {
		t.Fatalf("size %d, file has %d", size, st.Size())
	}
	return f.Name()
}

// mount attaches the image read-only by loop, as metal does.
func mount(t testing.TB, image string) string {
	t.Helper()
	dir := t.TempDir()
	out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,ro", image, dir).CombinedOutput()
	if err != nil {
		t.Fatalf("mount (this needs root): %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// fsck finds nothing to put right.
func fsck(t testing.TB, image string) {
	t.Helper()
	if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}

func stat(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st
}

func xattr(t testing.TB, path, name string) string {
	t.Helper()
	b := make([]byte, 5000)
	n, err := unix.Lgetxattr(path, name, b)
	if err != nil {
		t.Fatalf("%s: attribute %s: %v", path, name, err)
	}
	return string(b[:n])
}

func TestImageHasWhatTheLayerHas(t *testing.T) {
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl := string(binary.LittleEndian.AppendUint32(nil, 2)) +
		"\x01\x00\x06\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x04\x00\xff\xff\xff\xff" + "\x10\x00\x04\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	many := map[string]string{"user.z": "1", "user.longer-name": strings.Repeat("v", 900), "trusted.t": strings.Repeat("t", 600),
		"security.capability": capability, "user.b": strings.Repeat("b", 300)}
	old, late, far := time.Unix(-86400*365, 5), time.Unix(2208988800, 7), time.Unix(1<<33+5, 0)
	big := strings.Repeat("0123456789abcdef", 5<<16)
	layer := makeTar(t,
		file{name: "./", mode: 0o711, uid: 3, gid: 4},
		file{name: "bin/", mode: 0o755}, file{name: "bin/su", mode: 0o4755, body: "suid"},
		file{name: "uid32", uid: 4294967290, gid: 2147483650, body: "x"},
		file{name: "sticky/", mode: 0o1777}, file{name: "caps", xattrs: many, body: "c"},
		file{name: "acl", mode: 0o640, xattrs: map[string]string{"system.posix_acl_access": acl}, body: "acl"},
		file{name: "steer", xattrs: map[string]string{"trusted.overlay.redirect": "/etc", "user.ok": "1"}, body: ""},
		file{name: "hl/a", body: "linked", uid: 7}, file{name: "hl/b", typ: tar.TypeLink, link: "hl/a"},
		file{name: "hl/c", typ: tar.TypeLink, link: "./hl/a"}, file{name: "hl/d", typ: tar.TypeLink, link: "/hl/b"},
		file{name: "dup", body: "first", mode: 0o600}, file{name: "dup", body: "second wins"},
		file{name: "linked-old", body: "kept"}, file{name: "linked-name", typ: tar.TypeLink, link: "linked-old"}, file{name: "linked-old", body: "new"},
		file{name: "was-file", body: "x"}, file{name: "was-file/"}, file{name: "was-file/in", body: "in"},
		file{name: "was-dir/"}, file{name: "was-dir/in", body: "gone"}, file{name: "was-dir", body: "file now"},
		file{name: "usr/lib/"}, file{name: "lib", typ: tar.TypeSymlink, link: "usr/lib"}, file{name: "lib/x.so", body: "via link"},
		file{name: "run/"}, file{name: "var/run", typ: tar.TypeSymlink, link: "/run"}, file{name: "var/run/pid", body: "1"},
		file{name: "sym-long", typ: tar.TypeSymlink, link: "/" + strings.Repeat("l", 200) + "/x"},
		file{name: "fifo", typ: tar.TypeFifo}, file{name: "dev/null", typ: tar.TypeChar, major: 1, minor: 3, mode: 0o666},
		file{name: "old", mtime: old}, file{name: "late", mtime: late}, file{name: "far", mtime: far},
		file{name: "big", body: big}, file{name: "holes", body: strings.Repeat("\x00", 1<<20) + "end"},
		file{name: strings.Repeat("n", 255), body: "long name"}, file{name: "utf8-é-日本", body: "u"},
	)
	image := convert(t, layer)
	fsck(t, image)
	root := mount(t, image)
	read := func(name, want string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(root, name))
		if err != nil || string(b) != want {
			t.Errorf("%s: %.40q %v, want %.40q", name, b, err, want)
		}
	}
	if st := stat(t, root); st.Mode&0o7777 != 0o711 || st.Uid != 3 || st.Gid != 4 {
		t.Errorf("root: %o %d:%d", st.Mode, st.Uid, st.Gid)
	}
	if _, err := os.Lstat(filepath.Join(root, "lost+found")); !os.IsNotExist(err) {
		t.Errorf("lost+found: %v", err)
	}
	if st := stat(t, root+"/bin/su"); st.Mode&0o7777 != 0o4755 {
		t.Errorf("suid: %o", st.Mode)
	}
	if st := stat(t, root+"/uid32"); st.Uid != 4294967290 || st.Gid != 2147483650 {
		t.Errorf("owner: %d:%d", st.Uid, st.Gid)
	}
	for k, v := range many {
		if got := xattr(t, root+"/caps", k); got != v {
			t.Errorf("attribute %s: %d bytes, want %d", k, len(got), len(v))
		}
	}
	if got := xattr(t, root+"/acl", "system.posix_acl_access"); got != acl {
		t.Errorf("acl: %q", got)
	}
	if _, err := unix.Lgetxattr(root+"/steer", "trusted.overlay.redirect", make([]byte, 10)); !errors.Is(err, unix.ENODATA) {
		t.Errorf("overlay attribute of the layer was kept: %v", err)
	}
	a := stat(t, root+"/hl/a")
	for _, n := range []string{"b", "c", "d"} {
		if st := stat(t, root+"/hl/"+n); st.Ino != a.Ino || st.Nlink != 4 || st.Uid != 7 {
			t.Errorf("hl/%s: inode %d, %d links", n, st.Ino, st.Nlink)
		}
	}
	if st := stat(t, root+"/hl"); st.Mode&0o7777 != 0o755 {
		t.Errorf("made directory: %o", st.Mode)
	}
	read("dup", "second wins")
	read("linked-old", "new")
	read("linked-name", "kept")
	read("was-file/in", "in")
	read("was-dir", "file now")
	read("usr/lib/x.so", "via link")
	read("run/pid", "1")
	read("big", big)
	read("holes", strings.Repeat("\x00", 1<<20)+"end")
	read(strings.Repeat("n", 255), "long name")
	read("utf8-é-日本", "u")
	for name, want := range map[string]time.Time{"old": old, "late": late, "far": far} {
		if st := stat(t, filepath.Join(root, name)); st.Mtim.Sec != want.Unix() || st.Mtim.Nsec != int64(want.Nanosecond()) {
			t.Errorf("%s: time %d.%d, want %d.%d", name, st.Mtim.Sec, st.Mtim.Nsec, want.Unix(), want.Nanosecond())
		}
	}
	if st := stat(t, root+"/dev/null"); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("dev/null: %o %x", st.Mode, st.Rdev)
	}
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil || st.Blocks*512 >= st.Size {
		t.Errorf("image is not sparse: %d of %d bytes, %v", st.Blocks*512, st.Size, err)
	}
	if !bytes.Equal(must(os.ReadFile(image)), must(os.ReadFile(convert(t, layer)))) {
		t.Error("two conversions differ")
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func TestOverlayOfTwoLayers(t *testing.T) {
	lower := makeTar(t,
		file{name: "dir/"}, file{name: "dir/gone", body: "x"}, file{name: "dir/kept", body: "kept"},
		file{name: "opq/"}, file{name: "opq/hidden", body: "x"}, file{name: "opq2/"}, file{name: "opq2/hidden", body: "x"},
		file{name: "gonedir/"}, file{name: "gonedir/x", body: "x"}, file{name: "again/"}, file{name: "again/hidden", body: "x"},
		file{name: "both", body: "lower"}, file{name: "native", body: "x"})
	upper := makeTar(t,
		file{name: "dir/.wh.gone"}, file{name: "dir/new", body: "new"},
		file{name: "opq/", mode: 0o750, mtime: time.Unix(-500, 0)}, file{name: "opq/.wh..wh..opq"}, file{name: "opq/visible", body: "v"},
		file{name: "opq2/.wh..wh..opq"}, file{name: "opq2/visible", body: "v"}, file{name: "opq2/", mode: 0o700},
		file{name: ".wh.gonedir"}, file{name: ".wh..wh.plnk"},
		file{name: ".wh.again"}, file{name: "again/new", body: "new"},
		file{name: "both", body: "upper"}, file{name: ".wh.both"},
		file{name: "native", typ: tar.TypeChar})
	li, ui := convert(t, lower), convert(t, upper)
	fsck(t, li)
	fsck(t, ui)
	l, u, merged := mount(t, li), mount(t, ui), t.TempDir()
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+u+":"+l); err != nil {
		t.Fatalf("mount overlay: %v", err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	var got []string
	err := filepath.Walk(merged, func(p string, fi os.FileInfo, err error) error {
		if err == nil && p != merged {
			got = append(got, strings.TrimPrefix(p, merged+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "again again/new both dir dir/kept dir/new opq opq/visible opq2 opq2/visible"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("merged tree:\n got %s\nwant %s", s, want)
	}
	if b := must(os.ReadFile(merged + "/both")); string(b) != "upper" {
		t.Errorf("both: %q", b)
	}
	if st := stat(t, merged+"/opq"); st.Mode&0o7777 != 0o750 || st.Mtim.Sec != -500 {
		t.Errorf("opaque directory: %o %d", st.Mode, st.Mtim.Sec)
	}
	if st := stat(t, merged+"/opq2"); st.Mode&0o7777 != 0o700 {
		t.Errorf("opaque directory: %o", st.Mode)
	}
}

func TestHostileLayersAreRefused(t *testing.T) {
	deep := strings.Repeat("d/", 2100) + "f"
	links := []file{{name: "l0/"}}
	for i := range 45 {
		links = append(links, file{name: fmt.Sprintf("l%d", i+1), typ: tar.TypeSymlink, link: fmt.Sprintf("l%d", i)})
	}
	sized := func(size int64) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: "huge", Typeflag: tar.TypeReg, Size: size, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	cases := map[string]struct {
		layer []byte
		want  string
	}{
		"dotdot":           {makeTar(t, file{name: "a/../../etc/passwd"}), `".."`},
		"link dotdot":      {makeTar(t, file{name: "x", typ: tar.TypeLink, link: "../../etc/shadow"}), `".."`},
		"link outside":     {makeTar(t, file{name: "x", typ: tar.TypeLink, link: "/etc/shadow"}), "not in the layer"},
		"link to dir":      {makeTar(t, file{name: "d/"}, file{name: "x", typ: tar.TypeLink, link: "d"}), "directory"},
		"link to whiteout": {makeTar(t, file{name: ".wh.w"}, file{name: "x", typ: tar.TypeLink, link: "w"}), "does not hold"},
		"symlink out":      {makeTar(t, file{name: "out", typ: tar.TypeSymlink, link: "../../etc"}, file{name: "out/passwd"}), "out of the layer"},
		"symlink loop":     {makeTar(t, file{name: "a", typ: tar.TypeSymlink, link: "b"}, file{name: "b", typ: tar.TypeSymlink, link: "a"}, file{name: "a/x"}), "symbolic links"},
		"symlink chain":    {makeTar(t, append(links, file{name: "l45/x"})...), "symbolic links"},
		"file as parent":   {makeTar(t, file{name: "f", body: "x"}, file{name: "f/x"}), "not a directory"},
		"block device":     {makeTar(t, file{name: "sda", typ: tar.TypeBlock, major: 8}), "block device 8:0"},
		"mem device":       {makeTar(t, file{name: "mem", typ: tar.TypeChar, major: 1, minor: 1}), "character device 1:1"},
		"whiteout dotdot":  {makeTar(t, file{name: "d/.wh..."}), "whiteout"},
		"whiteout dot":     {makeTar(t, file{name: "d/.wh.."}), "whiteout"},
		"whiteout empty":   {makeTar(t, file{name: "d/.wh."}), "whiteout"},
		"long name":        {makeTar(t, file{name: strings.Repeat("n", 256)}), "file name"},
		"long path":        {makeTar(t, file{name: deep}), "path of"},
		"big attribute":    {makeTar(t, file{name: "x", xattrs: map[string]string{"user.a": strings.Repeat("v", 4000)}}), "attributes"},
		"bad acl":          {makeTar(t, file{name: "x", xattrs: map[string]string{"system.posix_acl_access": "rubbish"}}), "ACL"},
		"root as file":     {makeTar(t, file{name: ".", body: "x"}), "root"},
		"huge file":        {sized(1 << 40), "size of"},
		"truncated":        {makeTar(t, file{name: "x", body: strings.Repeat("y", 9000)})[:4000], "truncated"},
		"rubbish":          {bytes.Repeat([]byte("rubbish!"), 1000), "broken"},
		"unknown type":     {makeTar(t, file{name: "x", typ: 'Z'}), "unknown entry type"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			tree, err := Scan(bytes.NewReader(c.layer), Limits{})
			if err == nil {
				t.Fatalf("accepted: %d entries", tree.Entries())
			}
			if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %q, want an invalid argument with %q", err, c.want)
			}
		})
	}
}

func TestDeepPathsHaveABudget(t *testing.T) {
	deep := strings.Repeat("d/", 1000)
	var files []file
	for i := range 40 {
		files = append(files, file{name: fmt.Sprintf("%sf%d", deep, i)})
	}
	_, err := Scan(bytes.NewReader(makeTar(t, files...)), Limits{MaxEntries: 1100})
	if err != nil {
		t.Errorf("an ordinary sum of depths: %v", err)
	}
	for i := range 100 {
		files = append(files, file{name: fmt.Sprintf("%sg%d", deep, i)})
	}
	if _, err := Scan(bytes.NewReader(makeTar(t, files...)), Limits{MaxEntries: 1300}); err == nil || !strings.Contains(err.Error(), "too deep") {
		t.Errorf("a sum of depths over the budget: %v", err)
	}
}

func TestLimits(t *testing.T) {
	layer := makeTar(t, file{name: "a/b/c/d", body: "12345"}, file{name: "e", body: "67890"})
	for name, l := range map[string]Limits{
		"entries": {MaxEntries: 3}, "bytes": {MaxBytes: 9}, "file": {MaxFileBytes: 4}, "path": {MaxPath: 4},
	} {
		if _, err := Scan(bytes.NewReader(layer), l); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Scan(bytes.NewReader(layer), Limits{MaxEntries: 5, MaxBytes: 10, MaxFileBytes: 5, MaxPath: 8}); err != nil {
		t.Error(err)
	}
}
