package debian

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tandem/test/host"

	"golang.org/x/sys/unix"
)

// limit is how long all may take, on a loaded computer.
const limit = 14 * time.Minute

// TestSystemd is the promise that nothing systemd does to the service ends what runs,
// on a host as Debian makes it.
func TestSystemd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	dir := t.TempDir()
	lib := host.LibDir(t)
	cache := filepath.Join(lib, "debian") // a minute's work, and always the same
	command(t, ctx, "image/build", cache)

	root := filepath.Join(dir, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, ctx, "tar", "-C", root, "-xf", filepath.Join(cache, "root.tar"))
	// As users install it, but what is built already is not built again.
	command(t, ctx, "make", "-s", "-C", "../..", "-o", "guest", "install", "BIN="+lib, "DESTDIR="+root)
	busybox := filepath.Join(dir, "busybox")
	host.BusyboxTree(t, busybox)
	command(t, ctx, "tar", "-C", busybox, "--owner=0", "--group=0", "-cf", filepath.Join(root, "root/busybox.tar"), ".")
	command(t, ctx, "install", "-m", "755", "check", filepath.Join(root, "root/check"))
	host.Write(t, root, "etc/hostname", "debian\n")
	host.Write(t, root, "etc/fstab", "LABEL=root / ext4 defaults 0 1\n")
	host.Write(t, root, "etc/systemd/system/check.service", unit)
	wants := filepath.Join(root, "etc/systemd/system/multi-user.target.wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../check.service", filepath.Join(wants, "check.service")); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(dir, "disk")
	for try := 1; ; try++ {
		_ = os.Remove(disk)
		command(t, ctx, "truncate", "-s", "16G", disk)
		command(t, ctx, "mkfs.ext4", "-q", "-L", "root", "-d", root, disk)
		v := boot(t, ctx, dir, one(t, root, "boot/vmlinuz-*"), one(t, root, "boot/initrd.img-*"), disk)
		hangs := v.read(t, ctx)
		v.stop()
		if !hangs {
			return
		}
		qemu, _ := os.ReadFile(v.said)
		if try == 2 {
			t.Fatal("the virtual machine hung again")
		}
		t.Logf("the virtual machine hangs, and not only what runs in it: once more with a new one. Its processors, twice:\n%s", qemu[:min(len(qemu), 8000)])
	}
}

// unit runs the script when the system has come up.
const unit = `[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/root/check /root/busybox.tar
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS1
`

// vm is a virtual machine that runs.
type vm struct {
	lines, console, said string // files
	monitor              io.Writer
	stop                 func()
	ended                chan error
}

// processor is what Tandem's own machines have when they are translated, and says that it
// can virtualize: slowly, but enough for machines in it to run by KVM, which translated
// twice don't boot within minutes. With all that QEMU 7.2 can imitate ("max": AVX2 and
// more) it is slower, and Linux and KVM in it fail now and then.
const processor = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+aes,+pclmulqdq,+svm,+npt"

// boot starts a machine as one can buy it, but for its speed.
func boot(t *testing.T, ctx context.Context, dir, kernel, initrd, disk string) *vm {
	t.Helper()
	v := &vm{lines: filepath.Join(dir, "lines"), console: filepath.Join(dir, "console"), said: filepath.Join(dir, "said"), ended: make(chan error, 1)}
	if err := os.WriteFile(v.lines, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	said, err := os.Create(v.said)
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	c := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi,tb-size=512", "-machine", "q35", "-cpu", processor, "-smp", "2", "-m", "3072",
		"-nodefaults", "-no-user-config", "-display", "none",
		"-kernel", kernel, "-initrd", initrd, "-append", "root=/dev/vda rw console=ttyS0 panic=-1 net.ifnames=0",
		"-drive", "file="+disk+",format=raw,if=virtio,cache=unsafe", "-device", "virtio-rng-pci",
		"-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0",
		"-serial", "file:"+v.console, "-serial", "file:"+v.lines, "-monitor", "stdio")
	if v.monitor, err = c.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	c.Stdout, c.Stderr = said, said
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	c.WaitDelay = 10 * time.Second
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { v.ended <- c.Wait() }()
	v.stop = sync.OnceFunc(func() {
		_ = c.Process.Kill()
		<-v.ended
	})
	t.Cleanup(func() {
		v.stop()
		if t.Failed() {
			b, _ := os.ReadFile(v.console)
			qemu, _ := os.ReadFile(v.said)
			t.Logf("console:\n%s\nQEMU: %s", b[max(0, len(b)-2000):], qemu[:min(len(qemu), 8000)])
		}
	})
	return v
}

// silence is how long a machine that runs may write nothing: the script's beat goes on
// whatever hangs beside it, and a reboot is quicker.
const silence = 2 * time.Minute

// read passes the script's lines on until its end. It says that the machine hangs if it
// is silent: QEMU 7.2 may go on with its translation of an instruction that the other
// processor has changed in memory, and both then spin for ever (seen with the breakpoint
// that Linux puts into its scheduler while it turns CPU limits on).
func (v *vm) read(t *testing.T, ctx context.Context) (hangs bool) {
	t.Helper()
	checked, from := 0, 0
	var size int64
	heard := time.Now()
	for {
		ended := false
		select {
		case <-ctx.Done():
			t.Fatalf("the checks did not end: %v", ctx.Err())
		case err := <-v.ended:
			ended = true
			v.ended <- err
		case <-time.After(200 * time.Millisecond):
		}
		if n := length(v.lines) + length(v.console); n != size {
			size, heard = n, time.Now()
		} else if time.Since(heard) > silence {
			// A processor that is where it was a second ago shows it.
			for range 2 {
				fmt.Fprintln(v.monitor, "info registers -a")
				time.Sleep(time.Second)
			}
			return true
		}
		b, err := os.ReadFile(v.lines)
		if err != nil {
			t.Fatal(err)
		}
		for {
			line, _, whole := bytes.Cut(b[from:], []byte("\n"))
			if !whole {
				break
			}
			from += len(line) + 1
			text := strings.TrimRight(string(line), "\r")
			switch {
			case text == "end":
				if checked < 40 {
					t.Errorf("only %d checks were made", checked)
				}
				return false
			case text == "beat":
			case strings.HasPrefix(text, "FAIL "):
				checked++
				t.Error(text)
			default:
				if strings.HasPrefix(text, "ok ") {
					checked++
				}
				t.Log(text)
			}
		}
		if ended {
			t.Fatal("the virtual machine ended before the checks did")
		}
	}
}

func length(file string) int64 {
	st, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return st.Size()
}

func command(t *testing.T, ctx context.Context, name string, args ...string) {
	t.Helper()
	c := exec.CommandContext(ctx, name, args...)
	c.WaitDelay = 10 * time.Second
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// one is the single file that pattern means.
func one(t *testing.T, root, pattern string) string {
	t.Helper()
	m, err := filepath.Glob(filepath.Join(root, pattern))
	if err != nil || len(m) != 1 {
		t.Fatalf("%s: %v, %v", pattern, m, err)
	}
	return m[0]
}
