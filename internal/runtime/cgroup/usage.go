package cgroup

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	v1 "tandem/api/tandem/v1"
)

// OOMKills counts processes of the group that the kernel killed for memory.
func (g Group) OOMKills() uint64 {
	dir := g.dir("memory")
	if dir == "" {
		return 0
	}
	if g.l.Unified() {
		return kv(filepath.Join(dir, "memory.events"))["oom_kill"]
	}
	return kv(filepath.Join(dir, "memory.oom_control"))["oom_kill"]
}

// SwapLimits is true if the kernel can bound memory and swap together.
func (g Group) SwapLimits() bool {
	dir := g.dir("memory")
	if dir == "" {
		return false
	}
	if g.l.Unified() { // a kernel with swap counts it there
		_, err := os.Stat("/proc/swaps")
		return err == nil
	}
	_, err := os.Stat(filepath.Join(g.l.v1["memory"], "memory.memsw.limit_in_bytes"))
	if err != nil { // the root group of some kernels lacks it
		_, err = os.Stat(filepath.Join(dir, "memory.memsw.limit_in_bytes"))
	}
	return err == nil
}

// Usage reads what the group has used; network counters are not here.
func (g Group) Usage() *v1.Usage {
	u := &v1.Usage{}
	if g.l.Unified() {
		g.usage2(u)
	} else {
		g.usage1(u)
	}
	u.OomKills = g.OOMKills()
	return u
}

func (g Group) usage2(u *v1.Usage) {
	d := g.dir("")
	cpu := kv(filepath.Join(d, "cpu.stat"))
	u.CpuUsageNs, u.CpuThrottledNs = cpu["usage_usec"]*1000, cpu["throttled_usec"]*1000
	cur, st := num(filepath.Join(d, "memory.current")), kv(filepath.Join(d, "memory.stat"))
	u.MemoryBytes, u.MemoryCacheBytes = less(cur, st["inactive_file"]), int64(st["file"])
	u.MemoryLimitBytes = limit(num(filepath.Join(d, "memory.max")))
	u.Pids = int64(num(filepath.Join(d, "pids.current")))
	b, _ := os.ReadFile(filepath.Join(d, "io.stat"))
	for _, f := range strings.Fields(string(b)) {
		k, v, _ := strings.Cut(f, "=")
		n, _ := strconv.ParseUint(v, 10, 64)
		switch k {
		case "rbytes":
			u.BlockReadBytes += n
		case "wbytes":
			u.BlockWriteBytes += n
		}
	}
	_, err := os.Stat(filepath.Join(d, "cpu.pressure"))
	u.PressureKnown = err == nil
	u.CpuPressure = pressure(filepath.Join(d, "cpu.pressure"))
	u.MemoryPressure = pressure(filepath.Join(d, "memory.pressure"))
	u.IoPressure = pressure(filepath.Join(d, "io.pressure"))
}

func (g Group) usage1(u *v1.Usage) {
	if d := g.dir("cpuacct"); d != "" {
		u.CpuUsageNs = num(filepath.Join(d, "cpuacct.usage"))
	}
	if d := g.dir("cpu"); d != "" {
		u.CpuThrottledNs = kv(filepath.Join(d, "cpu.stat"))["throttled_time"]
	}
	if d := g.dir("memory"); d != "" {
		cur, st := num(filepath.Join(d, "memory.usage_in_bytes")), kv(filepath.Join(d, "memory.stat"))
		u.MemoryBytes, u.MemoryCacheBytes = less(cur, st["total_inactive_file"]), int64(st["total_cache"])
		u.MemoryLimitBytes = limit(num(filepath.Join(d, "memory.limit_in_bytes")))
	}
	if d := g.dir("pids"); d != "" {
		u.Pids = int64(num(filepath.Join(d, "pids.current")))
	}
	if d := g.dir("blkio"); d != "" {
		b, _ := os.ReadFile(filepath.Join(d, "blkio.throttle.io_service_bytes_recursive"))
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line) // "8:0 Read 4096"
			if len(f) != 3 {
				continue
			}
			n, _ := strconv.ParseUint(f[2], 10, 64)
			switch f[1] {
			case "Read":
				u.BlockReadBytes += n
			case "Write":
				u.BlockWriteBytes += n
			}
		}
	}
}

func less(total, cache uint64) int64 {
	if cache > total {
		return 0
	}
	return int64(total - cache)
}

// limit maps "no limit" (max, or v1's largest page multiple) to 0.
func limit(n uint64) int64 {
	if n >= math.MaxInt64/2 {
		return 0
	}
	return int64(n)
}

func num(path string) uint64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	s := strings.TrimSpace(string(b))
	if s == "max" {
		return math.MaxInt64
	}
	n, _ := strconv.ParseUint(s, 10, 64)
	return n
}

func kv(path string) map[string]uint64 {
	b, _ := os.ReadFile(path)
	m := map[string]uint64{}
	for _, line := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(line, " "); ok {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64); err == nil {
				m[k] = n
			}
		}
	}
	return m
}

func pressure(path string) float64 {
	b, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(b), "\n")
	for _, f := range strings.Fields(line) {
		if v, ok := strings.CutPrefix(f, "avg10="); ok {
			n, _ := strconv.ParseFloat(v, 64)
			return n
		}
	}
	return 0
}
