package host

import (
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// envInit makes the test binary the first process of a host's namespaces.
const envInit = "TANDEM_E2E_INIT"

// MaybeInit makes this process the first of a host's namespaces if it was started
// to be that; else it returns. Call it first in TestMain.
func MaybeInit() {
	if os.Getenv(envInit) != "" {
		hostInit()
		os.Exit(0)
	}
}

// hostInit is pid 1 of a host: it prepares the namespaces, says "ready" and reaps.
func hostInit() {
	check := func(err error, what string) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "host init:", what, err)
			os.Exit(1)
		}
	}
	check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), "private mounts")
	check(unix.Mount("proc", "/proc", "proc", 0, ""), "proc")
	check(unix.Mount("sysfs", "/sys", "sysfs", 0, ""), "sysfs")
	// The control groups below /sys are the computer's: bring them back.
	check(bindCgroups(), "cgroups")
	lo, err := netlink.LinkByName("lo")
	check(err, "lo")
	check(netlink.LinkSetUp(lo), "lo up")
	// A bridged packet must not meet iptables; see the network's page.
	os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte("0"), 0o644)
	fmt.Println("ready")
	ch := make(chan os.Signal, 64)
	signal.Notify(ch, unix.SIGCHLD)
	for range ch {
		for {
			var ws unix.WaitStatus
			pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
			if pid <= 0 || err != nil {
				break
			}
		}
	}
}

// bindCgroups mounts again what a new sysfs hides. The list comes from the
// parent through the environment, as "source;target;type;options" lines.
func bindCgroups() error {
	for _, l := range strings.Split(strings.TrimSpace(os.Getenv(envInit)), "\n") {
		p := strings.Split(l, ";")
		if len(p) != 3 {
			continue
		}
		target, typ, opts := p[0], p[1], p[2]
		os.MkdirAll(target, 0o755)
		if err := unix.Mount(typ, target, typ, 0, opts); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
	}
	return nil
}

// cgroupMounts describes this computer's hierarchies for bindCgroups.
func cgroupMounts() string {
	b, _ := os.ReadFile("/proc/self/mounts")
	var out []string
	for _, l := range strings.Split(string(b), "\n") {
		p := strings.Fields(l)
		if len(p) < 4 || !strings.HasPrefix(p[1], "/sys/fs/cgroup") {
			continue
		}
		var opts []string
		for _, o := range strings.Split(p[3], ",") {
			switch o {
			case "rw", "ro", "relatime", "nosuid", "nodev", "noexec", "mode=755", "seclabel", "inode64":
			default:
				opts = append(opts, o)
			}
		}
		out = append(out, p[1]+";"+p[2]+";"+strings.Join(opts, ","))
	}
	return strings.Join(out, "\n") + "\n"
}
