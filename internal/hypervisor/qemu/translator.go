package qemu

import (
	"context"
	"fmt"
	"strings"

	"tandem/internal/hypervisor/qmp"
)

// QEMU cuts TCG's cache of translated code into regions. Each CPU fills one, takes
// the next when it is full, and when none is left all are emptied. A CPU that is
// plugged in takes a region at once; when all are taken at that moment QEMU dies
// of an assertion ("tcg_region_initial_alloc"). So the cache is large, and no CPU
// is plugged in while it is nearly full: asked again a while later, it was emptied.

const (
	// tcgCache is the default size of the cache. It fills as the guest runs code that
	// it has not run before, and what was touched never goes back to the host: it is
	// the largest part of a small machine. Position-independent programs are
	// translated anew for each process, because each has them at another address, so
	// any cache is full one day, and emptying it costs a busy guest two seconds of
	// processor time. This one holds what a machine needs until its first container
	// serves (85 MiB with Apache) and some more, for CPUs that are plugged in then.
	tcgCache = 112 * mib
	// tcgCachePerCPU is the least for each CPU that a machine may come to have.
	tcgCachePerCPU = 16 * mib
	// tcgSpare is what must be free beside a new CPU's own region: what running
	// CPUs may translate between the question and the plug.
	tcgSpare = 6 * mib
)

// cacheSize is the cache of a machine that may come to have so many CPUs.
func (d *Driver) cacheSize(maxCPUs int) int64 {
	return max(d.opt.TranslationCache, int64(maxCPUs)*tcgCachePerCPU)
}

// cacheRegions is QEMU's rule: eight regions for each CPU that may come, of at
// least 2 MiB each, and never fewer than CPUs.
func cacheRegions(size int64, maxCPUs int) int {
	n := int(size / (2 * mib))
	if maxCPUs <= 1 {
		return 1
	}
	if n <= maxCPUs {
		return maxCPUs
	}
	return min(n, 8*maxCPUs)
}

// roomForCPU says whether a region is free for one more CPU, by what QEMU tells of
// the cache. An answer that it does not understand counts as yes: the cache is
// seldom full.
func roomForCPU(report string, regions, cpus int) bool {
	var used, size int64
	for line := range strings.Lines(report) {
		if rest, ok := strings.CutPrefix(line, "gen code size"); ok {
			if _, err := fmt.Sscanf(strings.TrimSpace(rest), "%d/%d", &used, &size); err != nil {
				return true
			}
		}
	}
	if size <= 0 || regions <= 0 {
		return true
	}
	region := max(size/int64(regions), 1)
	full := int(used / region)
	return regions-full-cpus > int((tcgSpare+region-1)/region)
}

// cacheReport asks a machine's VMM how full the cache is.
func cacheReport(ctx context.Context, q *qmp.Client) (string, error) {
	var r struct {
		Text string `json:"human-readable-text"`
	}
	err := q.Do(ctx, "x-query-jit", nil, &r)
	return r.Text, err
}

// mayPlug says whether one more CPU can be plugged in beside those that are there.
func (m *machine) mayPlug(ctx context.Context, q *qmp.Client, cpus int) bool {
	if m.d.host.accel != "tcg" {
		return true
	}
	report, err := cacheReport(ctx, q)
	if err != nil {
		m.d.log.Debug("how full the translation cache is can't be asked", "machine", m.id, "error", err)
		return true
	}
	most := m.spec.Ceiling.CPUs
	return roomForCPU(report, cacheRegions(m.d.cacheSize(most), most), cpus)
}
