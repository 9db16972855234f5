package guest

import (
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tandem/internal/guest/layout"
)

// guestMemory is what PID 1 and the agent may keep while containers fight for
// memory, bytes.
const guestMemory = 48 << 20

// kernelSettings that do not depend on the machine's size.
var kernelSettings = map[string]string{
	"kernel/printk_devkmsg":               "on\n", // the kernel wants the line's end
	"net/ipv4/ip_forward":                 "1",
	"net/ipv4/conf/all/rp_filter":         "0",
	"net/ipv4/conf/default/rp_filter":     "0",
	"net/ipv4/ip_unprivileged_port_start": "0", // as Docker: a container's user may bind port 80
	"kernel/pid_max":                      "4194304",
	"fs/file-max":                         "1048576",
	"fs/inotify/max_user_instances":       "8192",
	"fs/inotify/max_user_watches":         "524288",
	"vm/max_map_count":                    "262144",
	"vm/overcommit_memory":                "1",
	"kernel/keys/maxkeys":                 "20000",
	"kernel/keys/maxbytes":                "1000000",
	"kernel/core_pattern":                 "core", // no helper program in the machine's own namespaces
	"kernel/sysrq":                        "0",
	"kernel/yama/ptrace_scope":            "1",
	"kernel/dmesg_restrict":               "1",
	"kernel/unprivileged_bpf_disabled":    "1",
}

// settings prepares the kernel for containers.
func settings(log *slog.Logger) {
	onlineMemory(log)
	for k, v := range kernelSettings {
		path := "/proc/sys/" + k
		if _, err := os.Stat(path); err == nil {
			write(log, path, v)
		}
	}
	scaleLimits()
	unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 20, Max: 1 << 20})
	unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY})
	unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 0, Max: unix.RLIM_INFINITY})
	unix.Umask(0o022)
	for _, e := range environment {
		k, v, _ := strings.Cut(e, "=")
		os.Setenv(k, v)
	}
	cgroups(log)
	if err := loopbackUp(); err != nil {
		log.Error("loopback", "error", err)
	}
}

// scaleLimits sets what the kernel bounds by the memory that is there now; again
// whenever memory came.
func scaleLimits() {
	os.WriteFile("/proc/sys/kernel/threads-max", []byte("500000"), 0)
}

// cgroups turns the controllers on and gives PID 1 and the agent a group of
// their own, with memory that no container can press out and a CPU weight that
// keeps the agent answering.
func cgroups(log *slog.Logger) {
	b, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		log.Error("cgroups", "error", err)
		return
	}
	for _, c := range strings.Fields(string(b)) {
		if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			log.Info("cgroup controller stays off", "controller", c, "error", err)
		}
	}
	if err := os.MkdirAll(layout.GuestCgroup, 0o755); err != nil {
		log.Error("cgroup", "error", err)
		return
	}
	write(log, filepath.Join(layout.GuestCgroup, "memory.min"), strconv.Itoa(guestMemory))
	write(log, filepath.Join(layout.GuestCgroup, "cpu.weight"), "2000")
	write(log, filepath.Join(layout.GuestCgroup, "cgroup.procs"), "1")
}

func write(log *slog.Logger, path, value string) {
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		log.Warn("setting", "path", path, "error", err)
	}
}

// loopbackUp sets lo up by one ioctl.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
}

// onlineMemory makes memory that is hot-added come online by itself; it is called
// before the first block arrives. Movable memory can be taken away again, but the
// kernel can't keep its own things there, among them 1.6 % of all memory for what
// it knows of each page: with movable memory alone, 12 GiB of it eat up the 256 MiB
// that a machine starts with. So the kernel takes one part in five for itself, once
// movable memory is four times as much as its own.
func onlineMemory(log *slog.Logger) {
	const params = "/sys/module/memory_hotplug/parameters/"
	how := "online_movable"
	if _, err := os.Stat(params + "online_policy"); err == nil {
		write(log, params+"auto_movable_ratio", "400")
		write(log, params+"online_policy", "auto-movable")
		how = "online"
	}
	write(log, "/sys/devices/system/memory/auto_online_blocks", how)
}
