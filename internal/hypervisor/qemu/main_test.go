package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/kvmprobe"
	"tandem/internal/hypervisor/qemu/testguest"
)

const (
	innerEnv = "TANDEM_TEST_IN_NETNS"
	accelEnv = "TANDEM_TEST_ACCEL"
)

// TestMain runs the tests in a network namespace of their own: taps can't meet
// anybody else's, and vanish with the process.
func TestMain(m *testing.M) {
	kvmprobe.MaybeChild()
	if dir := os.Getenv(victimEnv); dir != "" {
		victim(dir)
	}
	if os.Getenv(innerEnv) == "" && os.Geteuid() == 0 {
		if _, err := guest(); err != nil { // while there is a network to fetch it from
			fmt.Fprintln(os.Stderr, "test guest:", err)
			os.Exit(1)
		}
		c := exec.Command("/proc/self/exe", os.Args[1:]...)
		c.Env = append(os.Environ(), innerEnv+"=1", accelEnv+"="+accel())
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := c.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			fmt.Fprintln(os.Stderr, "network namespace for the tests:", err)
			os.Exit(1)
		}
		os.Exit(c.ProcessState.ExitCode())
	}
	code := m.Run()
	if warm.dir != "" {
		_ = os.RemoveAll(warm.dir)
	}
	os.Exit(code)
}

var guest = sync.OnceValues(func() (testguest.Guest, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	return testguest.Build(ctx, filepath.Join(cache, "tandem-testguest"))
})

func spec(t testing.TB, id string) hypervisor.MachineSpec {
	t.Helper()
	g, err := guest()
	if err != nil {
		t.Fatal(err)
	}
	return hypervisor.MachineSpec{ID: id, Kernel: g.Kernel, Initrd: g.Initrd, GuestVersion: g.Version}
}

// accel is probed once for all drivers of the tests.
var accel = sync.OnceValue(func() string {
	if a := os.Getenv(accelEnv); a != "" {
		return a
	}
	if kvmprobe.Probe(context.Background(), "").Usable {
		return "auto"
	}
	return "tcg"
})

func options(dir string, log *slog.Logger) Options {
	return Options{Accel: accel(), StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"), Logger: log}
}

func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(t.Output(), nil)) }

// open makes a driver in dir that is closed at the end, with all its machines gone.
func open(t testing.TB, dir string) *Driver {
	t.Helper()
	return openWith(t, options(dir, testLog(t)))
}

func openWith(t testing.TB, o Options) *Driver {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	d, err := New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		list, _ := d.List(ctx)
		for _, m := range list {
			if err := d.Delete(ctx, m.Spec.ID); err != nil {
				t.Error(err)
			}
		}
		_ = d.Close()
	})
	return d
}

// warm is a template that all tests share: it is made once.
var warm struct {
	sync.Mutex
	dir string
}

const warmName = "warm"

// useWarm puts the shared template into a driver's state directory.
func useWarm(t testing.TB, dir string) {
	t.Helper()
	warm.Lock()
	defer warm.Unlock()
	if warm.dir == "" {
		tmp, err := os.MkdirTemp("", "tandem-warm-")
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if warm.dir == "" { // it failed
				_ = os.RemoveAll(tmp)
			}
		}()
		makeTemplate(t, tmp)
		warm.dir = tmp
	}
	from := filepath.Join(warm.dir, "state", "templates", warmName)
	to := filepath.Join(dir, "state", "templates", warmName)
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"memory", "state", "manifest.json"} {
		if err := os.Link(filepath.Join(from, f), filepath.Join(to, f)); err != nil {
			t.Fatal(err)
		}
	}
}

func makeTemplate(t testing.TB, dir string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	d, err := New(ctx, options(dir, testLog(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	defer func() { _ = d.Delete(context.Background(), "seed") }()
	if err := d.Create(ctx, spec(t, "seed")); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(ctx, "seed", hypervisor.StartOptions{ForTemplate: true}); err != nil {
		t.Fatal(err)
	}
	sh := shell(ctx, t, d, "seed")
	if _, err := sh.Run(ctx, "echo warm > /tmp/warm"); err != nil {
		t.Fatal(err)
	}
	_ = sh.Close()
	if err := d.SaveTemplate(ctx, "seed", warmName); err != nil {
		t.Fatal(err)
	}
}

// shell waits for a machine's guest and talks to it.
func shell(ctx context.Context, t testing.TB, d hypervisor.Driver, id string) *testguest.Shell {
	t.Helper()
	sh, err := tryShell(ctx, d, id)
	if err != nil {
		log, _ := d.ConsoleLog(ctx, id, 3000)
		t.Fatalf("guest of %s: %v\n%s", id, err, log)
	}
	return sh
}

func tryShell(ctx context.Context, d hypervisor.Driver, id string) (*testguest.Shell, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	c, err := d.Channel(ctx, id)
	if err != nil {
		return nil, err
	}
	return testguest.NewShell(ctx, c)
}

// clone creates and starts a clone of the warm template.
func clone(ctx context.Context, t testing.TB, d *Driver, id string) {
	t.Helper()
	if err := d.Create(ctx, spec(t, id)); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(ctx, id, hypervisor.StartOptions{Template: warmName}); err != nil {
		t.Fatal(err)
	}
}

var tapNumber int

// tap makes a tap device in the test's own network namespace.
func tap(t testing.TB) string {
	t.Helper()
	tapNumber++
	name := fmt.Sprintf("tdtest%d", tapNumber)
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		t.Fatal(err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		t.Fatal(err)
	}
	return name
}

func image(t testing.TB, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "disk-")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

func echo(ctx context.Context, c net.Conn, text string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	sh, err := testguest.NewShell(ctx, c)
	if err != nil {
		return err
	}
	if out, err := sh.Run(ctx, "echo '"+text+"'"); err != nil || out != text {
		return fmt.Errorf("%q came back as %q: %w", text, out, err)
	}
	return nil
}
