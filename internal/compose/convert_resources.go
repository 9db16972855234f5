package compose

import (
	"math"
	"path"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

func (c *converter) bytes(a at, n types.UnitBytes) int64 {
	if n < 0 || n > resource.MaxMemory {
		a.bad("must be between 0 and %s", resource.FormatMemory(resource.MaxMemory))
		return 0
	}
	return int64(n)
}

func (c *converter) cpus(a at, f float32) int64 {
	// A float32 has seven digits: print it before it becomes a float64.
	text := strconv.FormatFloat(float64(f), 'f', -1, 32)
	g, err := strconv.ParseFloat(text, 64)
	if err == nil {
		var n int64
		if n, err = resource.MilliCPU(g, false); err == nil {
			return n
		}
	}
	a.bad("%s is not a number of CPUs", text)
	return 0
}

func (c *converter) resources(a at, s *types.ServiceConfig) *v1.Resources {
	r := &v1.Resources{
		CpuMilliLimit:          c.cpus(a.in("cpus"), s.CPUS),
		MemoryBytesLimit:       c.bytes(a.in("mem_limit"), s.MemLimit),
		MemoryBytesReservation: c.bytes(a.in("mem_reservation"), s.MemReservation),
		CpuShares:              s.CPUShares,
		PidsLimit:              s.PidsLimit,
		CpusetCpus:             s.CPUSet,
	}
	if s.CPUQuota > 0 {
		period := s.CPUPeriod
		if period == 0 {
			period = 100000 // Docker's default, microseconds
		}
		switch {
		case s.CPUS != 0:
			a.in("cpu_quota").bad("set either cpus or cpu_quota")
		case period < 1000 || period > 1000000 || s.CPUQuota > math.MaxInt64/1000:
			a.in("cpu_period").bad("must be between 1000 and 1000000 microseconds")
		default:
			r.CpuMilliLimit = max(1, s.CPUQuota*1000/period)
		}
	}
	switch {
	case s.MemSwapLimit == -1:
		r.MemorySwapBytes = -1
	default:
		r.MemorySwapBytes = c.bytes(a.in("memswap_limit"), s.MemSwapLimit)
	}
	if d := s.Deploy; d != nil {
		if l, b := d.Resources.Limits, a.in("deploy.resources.limits"); l != nil {
			setIf(&r.CpuMilliLimit, c.cpus(b.in("cpus"), float32(l.NanoCPUs)))
			setIf(&r.MemoryBytesLimit, c.bytes(b.in("memory"), l.MemoryBytes))
			setIf(&r.PidsLimit, l.Pids)
		}
		if l, b := d.Resources.Reservations, a.in("deploy.resources.reservations"); l != nil {
			setIf(&r.CpuMilliReservation, c.cpus(b.in("cpus"), float32(l.NanoCPUs)))
			setIf(&r.MemoryBytesReservation, c.bytes(b.in("memory"), l.MemoryBytes))
		}
	}
	above := func(field string, reserved, limit int64) {
		if limit > 0 && reserved > limit {
			a.in("deploy.resources").bad("the %s reservation is above the limit", field)
		}
	}
	above("CPU", r.CpuMilliReservation, r.CpuMilliLimit)
	above("memory", r.MemoryBytesReservation, r.MemoryBytesLimit)
	if r.MemorySwapBytes > 0 && r.MemorySwapBytes < r.MemoryBytesLimit {
		a.in("memswap_limit").bad("counts memory and swap together, and is below mem_limit")
	}
	if r.PidsLimit < -1 {
		a.in("pids_limit").bad("must be a number of processes, or -1 for no limit")
	}
	if r.CpuShares < 0 || r.CpuShares == 1 || r.CpuShares > 262144 {
		a.in("cpu_shares").bad("must be between 2 and 262144")
	}
	return r
}

func setIf(to *int64, v int64) {
	if v != 0 {
		*to = v
	}
}

func (c *converter) ulimits(s *types.ServiceConfig) []*v1.Ulimit {
	var out []*v1.Ulimit
	for _, name := range sortedKeys(s.Ulimits) {
		u := s.Ulimits[name]
		if u == nil {
			continue
		}
		l := &v1.Ulimit{Name: name, Soft: int64(u.Soft), Hard: int64(u.Hard)}
		if u.Single != 0 {
			l.Soft, l.Hard = int64(u.Single), int64(u.Single)
		}
		out = append(out, l)
	}
	return out
}

func (c *converter) devices(a at, list []types.DeviceMapping, iso v1.Isolation) []*v1.Device {
	var out []*v1.Device
	for _, d := range list {
		to, perm := d.Target, d.Permissions
		if to == "" {
			to = d.Source
		}
		if perm == "" {
			perm = "rwm"
		}
		switch {
		case !path.IsAbs(d.Source) || !path.IsAbs(to):
			a.bad("%q: name the device by its path (CDI names are not supported)", d.Source)
			continue
		case strings.Trim(perm, "rwm") != "":
			a.bad("%q: permissions are made of r, w and m", perm)
			continue
		}
		if iso != v1.Isolation_ISOLATION_METAL {
			a.note("%s is the machine's device, not the host's; x-tandem.isolation: metal gives the host's", d.Source)
		}
		out = append(out, &v1.Device{PathOnHost: d.Source, PathInContainer: to, Permissions: perm})
	}
	return out
}

func (c *converter) logging(a at, l *types.LoggingConfig) *v1.LogConfig {
	if l == nil {
		return nil
	}
	switch l.Driver {
	case "", "json-file", "local":
	default:
		a.in("driver").bad("%q is not supported: logs are kept as with json-file; use json-file or local", l.Driver)
		return nil
	}
	out := &v1.LogConfig{}
	for _, k := range sortedKeys(l.Options) {
		v, b := l.Options[k], a.in("options."+k)
		switch k {
		case "max-size":
			n, err := resource.ParseMemory(v)
			if v == "-1" {
				b.bad("logs are always rotated; name a size")
			} else if err != nil || n < 1024 {
				b.bad("%q is not a size of at least 1k", v)
			}
			out.MaxSizeBytes = n
		case "max-file":
			n, err := strconv.ParseInt(v, 10, 32)
			if err != nil || n < 1 || n > 1000 {
				b.bad("%q is not a number between 1 and 1000", v)
			}
			out.MaxFiles = int32(n)
		default:
			b.bad("this option is not supported; max-size and max-file are")
		}
	}
	return out
}
