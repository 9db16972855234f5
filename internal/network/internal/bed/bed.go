// Package bed lets a test binary play with a real kernel's network without
// touching the machine's own: TestMain calls Main, which runs the binary again
// in network, mount and pid namespaces of its own. When that process ends, in
// whatever way, the kernel removes all that the test made.
//
//	func TestMain(m *testing.M) { bed.Main(m) }
package bed

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const env = "TANDEM_TEST_BOX"

// Main runs the tests inside a box. It does not return.
func Main(m *testing.M) {
	if os.Getenv(env) == "" {
		os.Exit(enter())
	}
	if err := setup(); err != nil {
		fmt.Fprintln(os.Stderr, "network test box:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func enter() int {
	runtime.LockOSThread() // Pdeathsig follows the thread
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Args[0] = os.Args[0]
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.Env = append(os.Environ(), env+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, syscall.SIGQUIT, syscall.SIGINT, syscall.SIGTERM)
	if err := c.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "network tests need root:", err)
		return 1
	}
	go func() {
		for s := range sig {
			c.Process.Signal(s)
		}
	}()
	err := c.Wait()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &ee) && ee.ExitCode() > 0:
		return ee.ExitCode()
	}
	fmt.Fprintln(os.Stderr, "network test box:", err)
	return 1
}

func setup() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private /: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("proc: %w", err)
	}
	// Shows this box's interfaces; the one outside shows the machine's.
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("sysfs: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}
