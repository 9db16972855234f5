package guestimage

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pierrec/lz4/v4"

	"tandem/internal/guest/layout"
)

// bzImage wraps a payload as the kernel's build does.
func bzImage(payload []byte) []byte {
	b := make([]byte, 2*512+len(payload))
	b[0x1f1] = 1
	binary.LittleEndian.PutUint16(b[0x1fe:], 0xAA55)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint32(b[0x248:], 0)
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(len(payload)))
	copy(b[1024:], payload)
	return b
}

func TestKernelThatIsNone(t *testing.T) {
	for name, b := range map[string][]byte{
		"empty": nil, "text": bytes.Repeat([]byte("no kernel "), 1000), "unknown packing": bzImage(bytes.Repeat([]byte("x"), 100)),
		"payload outside": func() []byte {
			b := bzImage(make([]byte, 64))
			binary.LittleEndian.PutUint32(b[0x24c:], 1<<31)
			return b
		}(),
		"broken lz4": bzImage(append([]byte{2, 0x21, 0x4c, 0x18, 200, 0, 0, 0}, bytes.Repeat([]byte{0xff}, 300)...)),
		"no ELF":     bzImage(append([]byte("\x7fELF"), make([]byte, 100)...)),
	} {
		if _, err := extractKernel(b); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzKernel(f *testing.F) {
	f.Add(bzImage([]byte{2, 0x21, 0x4c, 0x18, 1, 0, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, b []byte) { extractKernel(b) })
}

func TestUnpackLZ4OfSeveralBlocks(t *testing.T) {
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB: two blocks
	var b bytes.Buffer
	z := lz4.NewWriter(&b)
	if err := z.Apply(lz4.LegacyOption(true)); err != nil {
		t.Fatal(err)
	}
	z.Write(want)
	z.Close()
	binary.Write(&b, binary.LittleEndian, uint32(len(want))) // as a kernel's payload ends
	got, err := unpack(b.Bytes())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestStripSignature(t *testing.T) {
	body, sig := []byte("module"), bytes.Repeat([]byte("s"), 300)
	trailer := append(make([]byte, 8), binary.BigEndian.AppendUint32(nil, uint32(len(sig)))...)
	signed := append(append(append(bytes.Clone(body), sig...), trailer...), "~Module signature appended~\n"...)
	if got := stripSignature(signed); !bytes.Equal(got, body) {
		t.Errorf("%q", got)
	}
	if got := stripSignature(body); !bytes.Equal(got, body) {
		t.Errorf("unsigned: %q", got)
	}
	lying := bytes.Clone(signed)
	binary.BigEndian.PutUint32(lying[len(lying)-len("~Module signature appended~\n")-4:], 1<<31)
	if got := stripSignature(lying); !bytes.Equal(got, lying) {
		t.Error("a signature longer than the file was cut off")
	}
}

func TestResolveRefusesWhatIsMissing(t *testing.T) {
	if _, err := resolve(map[string][]byte{}, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

func TestLoadTellsWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir); !errdefs.IsNotFound(err) {
		t.Errorf("empty: %v", err)
	}
	os.WriteFile(filepath.Join(dir, manifestFile), []byte("{"), 0o600)
	if _, err := Load(dir); !errdefs.IsDataLoss(err) {
		t.Errorf("broken: %v", err)
	}
}

// The same inputs give the same bytes; a damaged image is noticed and built anew.
func TestBuildTwice(t *testing.T) {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(program); checkStatic(b) != nil {
		program = staticProgram(t)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	o := Options{GuestBinary: program, RuncBinary: program, CacheDir: filepath.Join(cache, "tandem", "guesttest"), OutDir: t.TempDir()}
	a, err := Build(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := os.ReadFile(a.Initrd)
	o.OutDir = t.TempDir()
	b, err := Build(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if second, _ := os.ReadFile(b.Initrd); a.Version != b.Version || !bytes.Equal(first, second) {
		t.Errorf("versions %s and %s", a.Version, b.Version)
	}
	if err := b.Verify(); err != nil {
		t.Error(err)
	}
	if l, err := Load(o.OutDir); err != nil || l.Version != b.Version || l.Kernel != b.Kernel {
		t.Errorf("load: %v, %v", l, err)
	}
	if err := os.Truncate(b.Initrd, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(o.OutDir); !errdefs.IsDataLoss(err) {
		t.Errorf("cut short: %v", err)
	}
	if b, err = Build(ctx, o); err != nil || b.Verify() != nil {
		t.Errorf("built anew: %v", err)
	}
	if b.InitrdBytes > 20<<20 {
		t.Errorf("initramfs has %d bytes", b.InitrdBytes)
	}
	left, _ := filepath.Glob(filepath.Join(o.OutDir, ".build-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	o.GuestBinary = layout.Init + "-is-not-here"
	if _, err := Build(ctx, o); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
}

// staticProgram is any static program.
func staticProgram(t *testing.T) string {
	t.Helper()
	for _, p := range []string{"/bin/busybox", "/usr/bin/busybox"} {
		if b, err := os.ReadFile(p); err == nil && checkStatic(b) == nil {
			return p
		}
	}
	t.Fatal("no static program; install busybox-static")
	return ""
}
