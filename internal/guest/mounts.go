package guest

import (
	"bufio"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"tandem/internal/guest/layout"
)

const hardened = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV

func mount(src, dst, fs string, flags uintptr, data string) error {
	if err := os.MkdirAll(dst, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(src, dst, fs, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", fs, dst, err)
	}
	return nil
}

// mountEarly mounts what loading modules and logging need.
func mountEarly() {
	for _, m := range []struct {
		fs, dst string
		flags   uintptr
	}{{"proc", "/proc", hardened}, {"sysfs", "/sys", hardened}, {"devtmpfs", "/dev", unix.MS_NOSUID}} {
		if err := mount(m.fs, m.dst, m.fs, m.flags, ""); err != nil {
			fmt.Println("tandem-init:", err) // there is no log yet
		}
	}
}

// moveRoot makes the root a mount that has a parent: pivot_root, by which runc
// gives a container its root, refuses to work on the kernel's own rootfs. A bind
// mount of the same (tmpfs) does, without copying a byte.
func moveRoot() error {
	const stage = "/mnt"
	if err := unix.Mount("/", stage, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind the root: %w", err)
	}
	if err := unix.Chdir(stage); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return unix.Chdir("/")
}

// mountAll mounts the rest of what programs expect.
func mountAll(log *slog.Logger) {
	for _, m := range []struct {
		fs, dst string
		flags   uintptr
		data    string
	}{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", hardened, ""},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
		{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", hardened, "nsdelegate,memory_recursiveprot"},
		{"bpf", "/sys/fs/bpf", hardened, "mode=0700"},
	} {
		if err := mount(m.fs, m.dst, m.fs, m.flags, m.data); err != nil {
			log.Error("mount", "error", err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !os.IsExist(err) {
			log.Error("link", "error", err)
		}
	}
	for _, d := range []string{layout.RunDir, layout.StateDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			log.Error("directory", "error", err)
		}
	}
}

// remountReadOnly brings every disk into a clean state.
func remountReadOnly() {
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		p := strings.Fields(s.Text())
		if len(p) >= 2 && strings.HasPrefix(p[0], "/dev/") {
			unix.Mount("", unescape(p[1]), "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
	}
}

// unescape undoes the octal escapes of /proc/mounts.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
