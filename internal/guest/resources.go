package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sort"
	"strconv"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/guest/layout"
)

const cgroupRoot = "/sys/fs/cgroup"

// Resources reports what is online and used. What cannot be read is zero.
func (s *service) Resources(context.Context, *connect.Request[v1.GuestResourcesRequest]) (*connect.Response[v1.GuestResourcesResponse], error) {
	mem := meminfo()
	used := mem["MemTotal"] - mem["MemAvailable"]
	u := &v1.Usage{
		At:               timestamppb.Now(),
		CpuUsageNs:       cpuUsed(),
		MemoryBytes:      used,
		MemoryLimitBytes: mem["MemTotal"],
		MemoryCacheBytes: mem["Cached"] + mem["Buffers"] - mem["Shmem"],
		Pids:             tasks(),
		CpuPressure:      pressure("cpu"),
		MemoryPressure:   pressure("memory"),
		IoPressure:       pressure("io"),
		OomKills:         uint64(table("/proc/vmstat")["oom_kill"]),
	}
	traffic(u)
	blocks(u)
	return connect.NewResponse(&v1.GuestResourcesResponse{
		CpusOnline:           int32(len(onlineList())),
		MemoryTotalBytes:     mem["MemTotal"],
		MemoryAvailableBytes: mem["MemAvailable"],
		Usage:                u,
		OverheadBytes:        max(0, used-containersUse()),
	}), nil
}

// OfflineCPUs takes the highest CPUs offline until keep are left, so that their
// removal has nothing to wait for.
func (s *service) OfflineCPUs(_ context.Context, r *connect.Request[v1.OfflineCPUsRequest]) (*connect.Response[v1.OfflineCPUsResponse], error) {
	if r.Msg.Keep < 1 {
		return nil, fmt.Errorf("keep %d CPUs: at least one must stay: %w", r.Msg.Keep, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	list := onlineList()
	for i := len(list) - 1; i >= int(r.Msg.Keep); i-- {
		path := fmt.Sprintf("/sys/devices/system/cpu/cpu%d/online", list[i])
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			return nil, fmt.Errorf("take CPU %d offline: %w: %w", list[i], err, errdefs.ErrFailedPrecondition)
		}
	}
	return connect.NewResponse(&v1.OfflineCPUsResponse{Online: int32(len(onlineList()))}), nil
}

// slim gives back what can be had again: a template is copied many times.
func slim() {
	unix.Sync()
	os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0)
	debug.FreeOSMemory()
}

// onlineList is the numbers of the CPUs that are online, ascending.
func onlineList() []int {
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return nil
	}
	var list []int
	for _, part := range strings.Split(strings.TrimSpace(string(b)), ",") {
		from, to, ranged := strings.Cut(part, "-")
		a, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		z := a
		if ranged {
			if z, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		for ; a <= z && len(list) < 4096; a++ {
			list = append(list, a)
		}
	}
	sort.Ints(list)
	return list
}

// table reads "key value" lines ("key: value kB" counts in bytes).
func table(path string) map[string]int64 {
	m := map[string]int64{}
	b, err := os.ReadFile(path)
	if err != nil {
		return m
	}
	for _, l := range strings.Split(string(b), "\n") {
		f := strings.Fields(l)
		if len(f) < 2 {
			continue
		}
		v, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		if len(f) > 2 && f[2] == "kB" {
			v *= 1024
		}
		m[strings.TrimSuffix(f[0], ":")] = v
	}
	return m
}

func meminfo() map[string]int64 { return table("/proc/meminfo") }

// cpuUsed is the busy time of all CPUs, ns.
func cpuUsed() uint64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var ticks uint64
	for i, f := range strings.Fields(line) {
		// cpu user nice system idle iowait irq softirq steal
		if i == 0 || i == 4 || i == 5 || i > 7 {
			continue
		}
		v, _ := strconv.ParseUint(f, 10, 64)
		ticks += v
	}
	return ticks * 10_000_000 // USER_HZ is 100
}

// tasks is the number of processes and threads.
func tasks() int64 {
	b, err := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(b))
	if err != nil || len(f) < 4 {
		return 0
	}
	_, all, _ := strings.Cut(f[3], "/")
	n, _ := strconv.ParseInt(all, 10, 64)
	return n
}

// pressure is the share of the last ten seconds in which something waited, percent.
func pressure(what string) float64 {
	b, err := os.ReadFile("/proc/pressure/" + what)
	if err != nil {
		return 0
	}
	for _, f := range strings.Fields(string(b)) {
		if v, ok := strings.CutPrefix(f, "avg10="); ok {
			p, _ := strconv.ParseFloat(v, 64)
			return p
		}
	}
	return 0
}

// traffic adds what went through the machine's own NICs.
func traffic(u *v1.Usage) {
	nics, _ := filepath.Glob("/sys/class/net/*/device")
	for _, n := range nics {
		stat := func(name string) uint64 { return number(filepath.Join(filepath.Dir(n), "statistics", name)) }
		u.NetRxBytes += stat("rx_bytes")
		u.NetTxBytes += stat("tx_bytes")
		u.NetRxPackets += stat("rx_packets")
		u.NetTxPackets += stat("tx_packets")
	}
}

// blocks adds what disks read and wrote.
func blocks(u *v1.Usage) {
	stats, _ := filepath.Glob("/sys/block/sd*/stat")
	for _, s := range stats {
		b, err := os.ReadFile(s)
		f := strings.Fields(string(b))
		if err != nil || len(f) < 7 {
			continue
		}
		r, _ := strconv.ParseUint(f[2], 10, 64)
		w, _ := strconv.ParseUint(f[6], 10, 64)
		u.BlockReadBytes += r * 512
		u.BlockWriteBytes += w * 512
	}
}

func number(path string) uint64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// containersUse is the memory of all cgroups but our own, without page cache
// that can go.
func containersUse() int64 {
	var sum int64
	groups, _ := filepath.Glob(cgroupRoot + "/*/memory.current")
	for _, g := range groups {
		dir := filepath.Dir(g)
		if dir == layout.GuestCgroup {
			continue
		}
		st := table(filepath.Join(dir, "memory.stat"))
		sum += max(0, int64(number(g))-st["inactive_file"]-st["active_file"])
	}
	return sum
}
