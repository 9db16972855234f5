// Package testguest makes the small guest that the tests of the QEMU driver
// boot: Debian's cloud kernel, the modules that a machine's devices need, and
// busybox. It is not the product's guest; it only obeys a line protocol on the
// agent port (see Shell).
//
// The kernel package comes from apt ("apt-get download") once, and is kept below
// the user's cache directory.
package testguest

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"
)

// Guest is a kernel and an initramfs to boot.
type Guest struct {
	Kernel  string // uncompressed vmlinux
	Initrd  string
	Version string
}

// modules that are loaded at boot; what they depend on goes first.
var modules = []string{"virtio_pci", "virtio_console", "virtio_scsi", "sd_mod", "virtio_mem", "virtio_balloon", "virtio_net", "button"}

const initScript = `#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for m in $(cat /modules/list); do insmod /modules/$m || echo "module $m failed"; done
echo online_movable > /sys/devices/system/memory/auto_online_blocks
(while :; do
  for c in /sys/devices/system/cpu/cpu*/online; do
    [ -e $c ] && read on < $c && [ "$on" = 0 ] && echo 1 > $c
  done
  sleep 1
done) 2>/dev/null &
while :; do
  for n in /sys/class/virtio-ports/*/name; do
    [ "$(cat $n 2>/dev/null)" = tandem.agent.0 ] && port=/dev/$(basename $(dirname $n))
  done
  [ -c "$port" ] && break
  usleep 10000
done
echo GUEST READY
while :; do
  exec 3<>$port
  while read -r line <&3; do
    eval "$line" >/tmp/out 2>&1 </dev/null; rc=$?
    (cat /tmp/out; printf '\n\001%d\n' $rc) >&3
  done
  exec 3>&-
  usleep 300000
done
`

// Build returns the guest, building it below dir (its cache) if it is not there.
func Build(ctx context.Context, dir string) (Guest, error) {
	pkg, err := kernelPackage(ctx)
	if err != nil {
		return Guest{}, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Guest{}, err
	}
	// Several test binaries may come at once.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return Guest{}, err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return Guest{}, err
	}
	root := filepath.Join(dir, pkg)
	g := Guest{Kernel: filepath.Join(root, "vmlinux"), Initrd: filepath.Join(root, "initrd"), Version: "test-" + pkg}
	if _, err := os.Stat(g.Kernel); err != nil {
		if err := fetchKernel(ctx, pkg, root); err != nil {
			return Guest{}, fmt.Errorf("test guest: %w", err)
		}
	}
	return g, writeInitrd(root, g.Initrd)
}

// kernelPackage is the package that Debian's cloud kernel is in today.
func kernelPackage(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", "linux-image-cloud-amd64").Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends linux-image-cloud-amd64 (is apt's index there? apt-get update): %w", err)
	}
	for _, f := range strings.Fields(string(out)) {
		if strings.HasPrefix(f, "linux-image-6") {
			return f, nil
		}
	}
	return "", fmt.Errorf("no kernel among the dependencies of linux-image-cloud-amd64: %q", out)
}

func fetchKernel(ctx context.Context, pkg, root string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(root), "tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	for _, argv := range [][]string{
		{"apt-get", "download", "-o", "APT::Sandbox::User=root", pkg},
		{"sh", "-c", "exec dpkg-deb -x ./*.deb x"},
	} {
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		c.Dir = tmp
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, out)
		}
	}
	images, _ := filepath.Glob(filepath.Join(tmp, "x/boot/vmlinuz-*"))
	if len(images) != 1 {
		return fmt.Errorf("package %s has %d kernels", pkg, len(images))
	}
	if err := extract(images[0], filepath.Join(tmp, "vmlinux")); err != nil {
		return err
	}
	return os.Rename(tmp, root)
}

// extract unpacks the LZ4 stream within a bzImage.
func extract(image, to string) error {
	b, err := os.ReadFile(image)
	if err != nil {
		return err
	}
	magic := []byte{0x02, 0x21, 0x4c, 0x18}
	for off := bytes.Index(b, magic); off >= 0 && off < len(b); {
		var out bytes.Buffer
		_, err := io.Copy(&out, lz4.NewReader(bytes.NewReader(b[off:])))
		if bytes.HasPrefix(out.Bytes(), []byte("\x7fELF")) { // the tail of the stream is the image's next part
			_ = err
			return os.WriteFile(to, out.Bytes(), 0o644)
		}
		next := bytes.Index(b[off+1:], magic)
		if next < 0 {
			break
		}
		off += 1 + next
	}
	return errors.New("no LZ4 compressed kernel in " + image)
}

func writeInitrd(root, to string) error {
	files := map[string]string{}
	err := filepath.WalkDir(filepath.Join(root, "x/lib/modules"), func(p string, d os.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(p, ".ko") {
			files[strings.ReplaceAll(strings.TrimSuffix(d.Name(), ".ko"), "-", "_")] = p
		}
		return err
	})
	if err != nil {
		return err
	}
	var order []string
	seen := map[string]bool{}
	var add func(string) error
	add = func(m string) error {
		if seen[m] || files[m] == "" { // not a file: built in
			return nil
		}
		seen[m] = true
		deps, err := dependencies(files[m])
		if err != nil {
			return fmt.Errorf("module %s: %w", m, err)
		}
		for _, d := range deps {
			if err := add(d); err != nil {
				return err
			}
		}
		order = append(order, m)
		return nil
	}
	for _, m := range modules {
		if err := add(m); err != nil {
			return err
		}
	}
	var recs []cpio.Record
	for _, d := range []string{"bin", "dev", "proc", "sys", "tmp", "mnt", "modules"} {
		recs = append(recs, cpio.Directory(d, 0o755))
	}
	recs = append(recs, cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("init", initScript, 0o755), cpio.Symlink("bin/sh", "busybox"))
	bb, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("busybox-static is needed: %w", err)
	}
	recs = append(recs, cpio.StaticFile("bin/busybox", string(bb), 0o755))
	var list strings.Builder
	for _, m := range order {
		b, err := os.ReadFile(files[m])
		if err != nil {
			return err
		}
		recs = append(recs, cpio.StaticFile("modules/"+m+".ko", string(b), 0o644))
		fmt.Fprintln(&list, m+".ko")
	}
	recs = append(recs, cpio.StaticFile("modules/list", list.String(), 0o644))
	f, err := os.CreateTemp(filepath.Dir(to), "initrd-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	w := cpio.Newc.Writer(f)
	if err = cpio.WriteRecords(w, recs); err == nil {
		err = cpio.WriteTrailer(w)
	}
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), to)
}

// dependencies are the modules that a module names in its .modinfo section.
func dependencies(file string) ([]string, error) {
	f, err := elf.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s := f.Section(".modinfo")
	if s == nil {
		return nil, nil
	}
	b, err := s.Data()
	if err != nil {
		return nil, err
	}
	for _, kv := range strings.Split(string(b), "\x00") {
		if d, ok := strings.CutPrefix(kv, "depends="); ok && d != "" {
			return strings.Split(strings.ReplaceAll(d, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
