// Package guestimage builds what a container machine boots: an uncompressed
// kernel from Debian's package and an initramfs with tandem-guest, runc and the
// kernel modules that they need.
//
//	m, err := guestimage.Build(ctx, guestimage.Options{
//		GuestBinary: "/usr/lib/tandem/tandem-guest", RuncBinary: "/usr/lib/tandem/runc",
//		CacheDir: "/var/cache/tandem", OutDir: "/var/lib/tandem/guest"})
//	m, err = guestimage.Load("/var/lib/tandem/guest") // later: the newest one built there
//
// The same inputs give the same bytes, and Version names the bytes: two images
// of one version boot alike, so templates are kept per version. A build is
// atomic: OutDir/VERSION appears complete or not at all, and OutDir/current
// points to the last one. Machines that run go on; they hold open files.
package guestimage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// Files of a built image.
const (
	kernelFile   = "vmlinux"
	initrdFile   = "initramfs"
	manifestFile = "manifest.json"
	currentLink  = "current"
)

// Options say what to build from.
type Options struct {
	// GuestBinary is tandem-guest (static); it becomes /init.
	GuestBinary string
	// RuncBinary is a static runc; it becomes /bin/runc.
	RuncBinary string
	// KernelPackage is the .deb of a Debian cloud kernel. Empty: the one that
	// linux-image-cloud-amd64 depends on is downloaded with apt-get into CacheDir.
	KernelPackage string
	// CacheDir keeps downloads. Needed if KernelPackage is empty.
	CacheDir string
	// OutDir gets a directory per version and the link "current".
	OutDir string
	// Compression of the initramfs: "lz4" (default), "zstd" or "none".
	Compression string
	// KeepSignatures leaves the modules' signatures in place. Without them (the
	// default) modules load faster; the initramfs is trusted as a whole.
	KeepSignatures bool
	// Progress, when set, is told of each step.
	Progress func(step string)
}

// Manifest describes a built image.
type Manifest struct {
	// Version names the content of kernel and initramfs: 16 hexadecimal digits.
	Version string `json:"version"`
	// Kernel and Initrd are absolute paths.
	Kernel string `json:"-"`
	Initrd string `json:"-"`
	// KernelRelease is what uname -r says in the guest.
	KernelRelease string `json:"kernel_release"`
	// KernelDigest and InitrdDigest are SHA-256, hexadecimal.
	KernelDigest string `json:"kernel_sha256"`
	InitrdDigest string `json:"initrd_sha256"`
	// KernelBytes and InitrdBytes are the files' sizes.
	KernelBytes int64 `json:"kernel_bytes"`
	InitrdBytes int64 `json:"initrd_bytes"`
	// Modules are the kernel modules on board, in an order in which they load.
	Modules []string `json:"modules"`
}

// Build makes an image, or finds it made. Errors: InvalidArgument (an input is
// missing or is not what it should be), Unavailable (no package to download).
func Build(ctx context.Context, o Options) (Manifest, error) {
	say := o.Progress
	if say == nil {
		say = func(string) {}
	}
	if o.OutDir == "" {
		return Manifest{}, fmt.Errorf("guest image: no output directory: %w", errdefs.ErrInvalidArgument)
	}
	deb := o.KernelPackage
	if deb == "" {
		say("kernel package")
		var err error
		if deb, err = download(ctx, o.CacheDir); err != nil {
			return Manifest{}, err
		}
	}
	say("kernel from " + filepath.Base(deb))
	k, err := readPackage(ctx, deb)
	if err != nil {
		return Manifest{}, fmt.Errorf("kernel package %s: %w", deb, err)
	}
	mods, err := resolve(k.modules, k.builtin)
	if err != nil {
		return Manifest{}, fmt.Errorf("kernel package %s: %w", deb, err)
	}
	vmlinux, err := extractKernel(k.vmlinuz)
	if err != nil {
		return Manifest{}, fmt.Errorf("kernel package %s: %w", deb, err)
	}
	if err := os.MkdirAll(o.OutDir, 0o755); err != nil {
		return Manifest{}, err
	}
	tmp, err := os.MkdirTemp(o.OutDir, ".build-")
	if err != nil {
		return Manifest{}, err
	}
	defer os.RemoveAll(tmp)
	say("initramfs")
	if err := writeInitramfs(filepath.Join(tmp, initrdFile), o, k.release, mods); err != nil {
		return Manifest{}, err
	}
	if err := os.WriteFile(filepath.Join(tmp, kernelFile), vmlinux, 0o644); err != nil {
		return Manifest{}, err
	}
	m := Manifest{KernelRelease: k.release}
	for _, mod := range mods.order {
		m.Modules = append(m.Modules, mod.name)
	}
	if m.KernelDigest, m.KernelBytes, err = digest(filepath.Join(tmp, kernelFile)); err != nil {
		return Manifest{}, err
	}
	if m.InitrdDigest, m.InitrdBytes, err = digest(filepath.Join(tmp, initrdFile)); err != nil {
		return Manifest{}, err
	}
	sum := sha256.Sum256([]byte(m.KernelDigest + m.InitrdDigest))
	m.Version = hex.EncodeToString(sum[:8])
	return publish(o.OutDir, tmp, m)
}

// publish gives the built directory its name and makes it the current one.
func publish(out, tmp string, m Manifest) (Manifest, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return Manifest{}, err
	}
	if err := os.WriteFile(filepath.Join(tmp, manifestFile), append(b, '\n'), 0o644); err != nil {
		return Manifest{}, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Manifest{}, err
	}
	dir := filepath.Join(out, m.Version)
	if have, err := loadDir(dir); err != nil || have.Version != m.Version {
		old := tmp + ".old"
		if err := os.Rename(dir, old); err == nil { // damaged: make way
			defer os.RemoveAll(old)
		}
		if err := os.Rename(tmp, dir); err != nil {
			if have, err2 := loadDir(dir); err2 != nil || have.Version != m.Version { // another build was first
				return Manifest{}, err
			}
		}
	}
	link := tmp + ".link"
	if err := os.Symlink(m.Version, link); err != nil {
		return Manifest{}, err
	}
	if err := os.Rename(link, filepath.Join(out, currentLink)); err != nil {
		os.Remove(link)
		return Manifest{}, err
	}
	return loadDir(dir)
}

// Load reads the image in dir: one version's directory, or an OutDir of Build
// (then its current one). NotFound if there is none, DataLoss if it is damaged.
func Load(dir string) (Manifest, error) {
	if target, err := os.Readlink(filepath.Join(dir, currentLink)); err == nil {
		return loadDir(filepath.Join(dir, filepath.Base(target)))
	}
	return loadDir(dir)
}

func loadDir(dir string) (Manifest, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Manifest{}, err
	}
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if os.IsNotExist(err) {
		return Manifest{}, fmt.Errorf("no guest image in %s; make one with `tandem guest build`: %w", dir, errdefs.ErrNotFound)
	}
	if err != nil {
		return Manifest{}, err
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return Manifest{}, fmt.Errorf("guest image %s: %w: %w; build it anew", dir, err, errdefs.ErrDataLoss)
	}
	m.Kernel, m.Initrd = filepath.Join(dir, kernelFile), filepath.Join(dir, initrdFile)
	for path, size := range map[string]int64{m.Kernel: m.KernelBytes, m.Initrd: m.InitrdBytes} {
		st, err := os.Stat(path)
		if err != nil || st.Size() != size {
			return Manifest{}, fmt.Errorf("guest image: %s is not what was built; build it anew: %w", path, errdefs.ErrDataLoss)
		}
	}
	return m, nil
}

// Verify reads both files and compares their digests: DataLoss if they differ.
func (m Manifest) Verify() error {
	for path, want := range map[string]string{m.Kernel: m.KernelDigest, m.Initrd: m.InitrdDigest} {
		got, _, err := digest(path)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("guest image: %s has digest %s instead of %s; build it anew: %w", path, got, want, errdefs.ErrDataLoss)
		}
	}
	return nil
}

func digest(path string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	var h hash.Hash = sha256.New()
	n, err := io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// static reads a program for the guest and checks that it is a static x86-64 ELF.
func static(path, what string) ([]byte, error) {
	if path == "" {
		return nil, fmt.Errorf("guest image: no %s given: %w", what, errdefs.ErrInvalidArgument)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("guest image: %s: %w", what, err)
	}
	if err := checkStatic(b); err != nil {
		return nil, fmt.Errorf("guest image: %s %s: %w: %w", what, path, err, errdefs.ErrInvalidArgument)
	}
	return b, nil
}

func lines(list []string) []byte {
	if len(list) == 0 {
		return nil
	}
	return []byte(strings.Join(list, "\n") + "\n")
}
