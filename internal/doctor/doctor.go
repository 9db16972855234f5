// Package doctor says what this host can do for Tandem, and what to do about
// what it can't: each finding has a code that programs can rely on, a severity,
// an explanation, and the command that mends it.
//
//	for _, f := range doctor.Check(ctx, doctor.Options{StateDir: "/var/lib/tandem"}) {
//		fmt.Println(f.Severity, f.Title, f.Remedy)
//	}
//
// Nothing is changed by a check, but the verdict on KVM is kept in StateDir if
// that is there. main must call kvmprobe.MaybeChild, for KVM is
// tried for real.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor/kvmprobe"
)

// Severities of findings, from good to bad. With an error, machines or
// containers can't run; with a warning, something is slow, missing or short.
const (
	OK      = "ok"
	Info    = "info"
	Warning = "warning"
	Error   = "error"
)

// Options say what to look at. Only StateDir must be given.
type Options struct {
	StateDir string
	QEMU     string // binary; default qemu-system-x86_64
	// Root is prepended to /proc, /sys and /dev; for tests.
	Root string
	// LookPath finds a program; default exec.LookPath.
	LookPath func(string) (string, error)
	// KVM probes; default kvmprobe.Probe with its cache in StateDir.
	KVM func(ctx context.Context) kvmprobe.Verdict
	// Run runs a program and returns its output; default exec.
	Run func(ctx context.Context, argv ...string) (string, error)
}

const (
	gib = uint64(1) << 30
	mib = uint64(1) << 20
)

// Check looks at everything, in the order in which a person would mend it.
func Check(ctx context.Context, o Options) []*v1.Finding {
	if o.QEMU == "" {
		o.QEMU = "qemu-system-x86_64"
	}
	if o.LookPath == nil {
		o.LookPath = exec.LookPath
	}
	if o.KVM == nil {
		// Where the driver keeps the verdict too.
		o.KVM = func(ctx context.Context) kvmprobe.Verdict {
			cache := filepath.Join(o.StateDir, "kvm.json")
			if _, err := os.Stat(o.StateDir); err != nil {
				cache = "" // and not make the directory
			}
			return kvmprobe.Probe(ctx, cache)
		}
	}
	if o.Run == nil {
		o.Run = func(ctx context.Context, argv ...string) (string, error) {
			b, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
			return string(b), err
		}
	}
	var found []*v1.Finding
	for _, check := range []func(context.Context, Options) *v1.Finding{
		privilege, qemu, kvm, cgroups, tun, nftables, forwarding, overlay, loop, mkfs, disk, memory,
	} {
		if ctx.Err() != nil {
			break
		}
		if f := check(ctx, o); f != nil {
			found = append(found, f)
		}
	}
	return found
}

// Worst is the worst severity among findings.
func Worst(found []*v1.Finding) string {
	rank := map[string]int{OK: 0, Info: 1, Warning: 2, Error: 3}
	worst := OK
	for _, f := range found {
		if rank[f.GetSeverity()] > rank[worst] {
			worst = f.GetSeverity()
		}
	}
	return worst
}

func finding(code, severity, title, detail, remedy string) *v1.Finding {
	return &v1.Finding{Code: code, Severity: severity, Title: title, Detail: detail, Remedy: remedy}
}

func (o Options) path(p string) string { return o.Root + p }

func (o Options) read(p string) string {
	b, _ := os.ReadFile(o.path(p))
	return strings.TrimSpace(string(b))
}

func privilege(_ context.Context, _ Options) *v1.Finding {
	if os.Geteuid() == 0 {
		return nil
	}
	return finding("not-root", Warning, "Not run as root",
		"Machines then run without limits and without users of their own, and networks can't be made. Some checks see less.",
		"sudo tandem doctor")
}

var version = regexp.MustCompile(`version (\d+)\.(\d+)\S*`)

func qemu(ctx context.Context, o Options) *v1.Finding {
	const install = "apt-get install -y qemu-system-x86"
	bin, err := o.LookPath(o.QEMU)
	if err != nil {
		return finding("qemu-missing", Error, "QEMU is not installed", "Machines need it; containers with isolation metal do not.", install)
	}
	out, err := o.Run(ctx, bin, "-version")
	m := version.FindStringSubmatch(out)
	if err != nil || m == nil {
		return finding("qemu-broken", Error, "QEMU does not run", fmt.Sprintf("%s -version: %v: %.200s", bin, err, out), "apt-get install --reinstall -y qemu-system-x86")
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if major < 7 || major == 7 && minor < 2 {
		return finding("qemu-old", Error, "QEMU is too old", fmt.Sprintf("%s is %s; 7.2 or newer is needed.", bin, m[0]), install)
	}
	return finding("qemu", OK, "QEMU "+strings.TrimPrefix(m[0], "version "), bin, "")
}

func kvm(ctx context.Context, o Options) *v1.Finding {
	v := o.KVM(ctx)
	const slow = " Machines run translated (TCG) instead: right, but several times slower."
	switch {
	case v.Usable:
		return finding("kvm", OK, "KVM works", v.Reason, "")
	case !v.Present:
		return finding("kvm-missing", Warning, "No KVM", v.Reason+"."+slow,
			"switch on VT-x/AMD-V in the firmware (or nested virtualization in the hypervisor above), then: modprobe kvm_intel || modprobe kvm_amd")
	case strings.Contains(v.Reason, "can't be opened"):
		return finding("kvm-denied", Warning, "KVM can't be opened", v.Reason+"."+slow, "chgrp kvm /dev/kvm && chmod 660 /dev/kvm")
	default:
		return finding("kvm-unusable", Warning, "KVM is there, but does not work", v.Reason+"."+slow,
			"none on this host: it is itself a virtual machine whose hypervisor does not run nested guests properly; use a bare-metal host or one with real nested virtualization")
	}
}

func cgroups(_ context.Context, o Options) *v1.Finding {
	v1at, v2at := map[string]bool{}, ""
	for _, l := range strings.Split(o.read("/proc/self/mounts"), "\n") {
		p := strings.Fields(l)
		if len(p) < 4 {
			continue
		}
		switch p[2] {
		case "cgroup":
			for _, c := range strings.Split(p[3], ",") {
				v1at[c] = true
			}
		case "cgroup2":
			v2at = p[1]
		}
	}
	var missing []string
	have2 := " " + o.read(v2at+"/cgroup.controllers") + " "
	for _, c := range []string{"memory", "cpu", "pids"} {
		if !v1at[c] && (v2at == "" || !strings.Contains(have2, " "+c+" ")) {
			missing = append(missing, c)
		}
	}
	kind := "v2"
	switch {
	case v1at["memory"] && v2at != "":
		kind = "hybrid (controllers in v1)"
	case v1at["memory"]:
		kind = "v1"
	}
	if len(missing) > 0 {
		return finding("cgroup-controllers", Warning, "Control groups lack "+strings.Join(missing, ", "),
			"Machines and metal containers can't be limited by it.", "mount -t cgroup2 none /sys/fs/cgroup")
	}
	return finding("cgroup", OK, "Control groups "+kind, "memory, cpu and pids are there", "")
}

func tun(_ context.Context, o Options) *v1.Finding {
	f, err := os.OpenFile(o.path("/dev/net/tun"), os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
		return finding("tun", OK, "TUN/TAP", "/dev/net/tun opens", "")
	}
	remedy := "modprobe tun"
	if errors.Is(err, fs.ErrNotExist) {
		remedy = "modprobe tun; mkdir -p /dev/net && mknod /dev/net/tun c 10 200"
	}
	return finding("tun-missing", Error, "No TUN/TAP", "Machines can't have a network: "+err.Error(), remedy)
}

func nftables(ctx context.Context, o Options) *v1.Finding {
	nft, err := o.LookPath("nft")
	if err != nil {
		return finding("nft-missing", Info, "The nft program is not installed", "Tandem speaks to the kernel itself, but people will miss it.", "apt-get install -y nftables")
	}
	if out, err := o.Run(ctx, nft, "list", "tables"); err != nil {
		return finding("nftables-missing", Error, "The kernel has no nftables", "Published ports and isolation of projects need it: "+strings.TrimSpace(fmt.Sprintf("%.200s", out)), "modprobe nf_tables")
	}
	return finding("nftables", OK, "nftables", "the kernel lists its tables", "")
}

func forwarding(_ context.Context, o Options) *v1.Finding {
	if o.read("/proc/sys/net/ipv4/ip_forward") == "1" {
		return finding("ip-forward", OK, "IP forwarding is on", "", "")
	}
	return finding("ip-forward-off", Info, "IP forwarding is off", "tandem serve switches it on when the first network is made.", "sysctl -w net.ipv4.ip_forward=1")
}

func overlay(_ context.Context, o Options) *v1.Finding {
	if strings.Contains(o.read("/proc/filesystems"), "overlay") {
		return finding("overlayfs", OK, "overlayfs", "", "")
	}
	// The kernel loads it when it is mounted first.
	modules := o.path("/lib/modules/" + o.read("/proc/sys/kernel/osrelease"))
	for _, list := range []string{"modules.dep", "modules.builtin"} {
		if b, err := os.ReadFile(filepath.Join(modules, list)); err == nil && strings.Contains(string(b), "/overlay.ko") {
			return finding("overlayfs", OK, "overlayfs", "a module that the kernel loads when it is needed", "")
		}
	}
	return finding("overlayfs-missing", Warning, "No overlayfs", "Containers with isolation metal can't run; those in machines can.", "modprobe overlay")
}

func loop(_ context.Context, o Options) *v1.Finding {
	if _, err := os.Stat(o.path("/dev/loop-control")); err == nil {
		return finding("loop", OK, "Loop devices", "", "")
	}
	return finding("loop-missing", Warning, "No loop devices", "Images can't be mounted on the host: containers with isolation metal can't run.", "modprobe loop")
}

func mkfs(_ context.Context, o Options) *v1.Finding {
	for _, p := range []string{"mkfs.ext4", "/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"} {
		if at, err := o.LookPath(p); err == nil {
			return finding("mkfs", OK, "mkfs.ext4", at, "")
		}
	}
	return finding("mkfs-missing", Error, "mkfs.ext4 is not installed", "Volumes and scratch disks are made with it.", "apt-get install -y e2fsprogs")
}

func disk(_ context.Context, o Options) *v1.Finding {
	dir := o.StateDir
	var st syscall.Statfs_t
	for ; ; dir = filepath.Dir(dir) { // it need not be there yet
		err := syscall.Statfs(dir, &st)
		if err == nil {
			break
		}
		if dir == "/" || dir == "." || dir == "" {
			return finding("state-dir", Error, "The state directory can't be looked at", err.Error(), "choose another with --state-dir")
		}
	}
	free := st.Bavail * uint64(st.Bsize)
	detail := fmt.Sprintf("%.1f GiB are free for %s", float64(free)/float64(gib), o.StateDir)
	switch {
	case st.Flags&1 != 0: // ST_RDONLY
		return finding("disk-read-only", Error, "The state directory is read-only", detail, "mount -o remount,rw "+dir)
	case free < gib:
		return finding("disk-full", Error, "The disk is almost full", detail, "tandem image rm --unused, or choose another disk with --state-dir")
	case free < 10*gib:
		return finding("disk-low", Warning, "Little disk space", detail, "tandem image rm --unused")
	}
	return finding("disk", OK, "Disk space", detail, "")
}

func memory(_ context.Context, o Options) *v1.Finding {
	var total, available uint64
	for _, l := range strings.Split(o.read("/proc/meminfo"), "\n") {
		var kib uint64
		if _, err := fmt.Sscanf(l, "MemTotal: %d kB", &kib); err == nil {
			total = kib << 10
		} else if _, err := fmt.Sscanf(l, "MemAvailable: %d kB", &kib); err == nil {
			available = kib << 10
		}
	}
	detail := fmt.Sprintf("%d MiB of %d MiB are available; the smallest machine takes about 200 MiB", available/mib, total/mib)
	if available < 512*mib {
		return finding("memory-low", Warning, "Little memory", detail, "stop something, or add memory")
	}
	return finding("memory", OK, "Memory", detail, "")
}
