package bed

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NS is a network namespace of a test.
type NS struct {
	Path string
	NL   *netlink.Handle
	f    *os.File
}

// NewNS makes a namespace with its loopback up; it goes with the test.
func NewNS(t testing.TB) *NS {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o400); err != nil {
		t.Fatal(err)
	}
	err := onThread(-1, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
	return OpenNS(t, path)
}

// OpenNS opens a namespace that somebody else made.
func OpenNS(t testing.TB, path string) *NS {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	n := &NS{Path: path, f: f}
	if err := n.Do(func() (err error) {
		n.NL, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}); err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { n.NL.Close(); f.Close() })
	return n
}

// Do runs fn on a thread in the namespace. Sockets that fn opens stay in it.
// What a net.Listener or net.Conn does later does not need the thread; dialling
// and listening do, with addresses in numbers.
func (n *NS) Do(fn func() error) error { return onThread(int(n.f.Fd()), fn) }

// Fd is a descriptor of the namespace.
func (n *NS) Fd() int { return int(n.f.Fd()) }

// Run runs a command in the namespace and returns what it printed.
func (n *NS) Run(name string, args ...string) (string, error) {
	var out []byte
	err := n.Do(func() (err error) {
		out, err = exec.Command(name, args...).CombinedOutput()
		return err
	})
	if err != nil {
		err = fmt.Errorf("%s %v: %w: %s", name, args, err, out)
	}
	return string(out), err
}

func onThread(ns int, fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		old, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			errc <- err
			return
		}
		defer old.Close()
		if ns >= 0 {
			if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
				errc <- err
				return
			}
		}
		err = fn()
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		errc <- err
	}()
	return <-errc
}
