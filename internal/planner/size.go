package planner

import (
	"math"
	"math/bits"
	"strconv"
)

// DefaultMemory is what a container that reserves no memory counts for, in bytes.
// Docker's users set nothing; 64 MiB is what a small server needs to start, and
// keeps a machine from being filled with containers that count for nothing.
const DefaultMemory = 64 << 20

// Bounds on sizes; more than any server has, and far from overflow in sums.
const (
	maxCPU    = 1 << 40
	maxMemory = 1 << 56
)

func (a Size) add(b Size) Size     { return Size{a.CPU + b.CPU, a.Memory + b.Memory} }
func (a Size) sub(b Size) Size     { return Size{a.CPU - b.CPU, a.Memory - b.Memory} }
func (a Size) fits(room Size) bool { return a.CPU <= room.CPU && a.Memory <= room.Memory }
func (a Size) max(b Size) Size     { return Size{max(a.CPU, b.CPU), max(a.Memory, b.Memory)} }
func (a Size) min(b Size) Size     { return Size{min(a.CPU, b.CPU), min(a.Memory, b.Memory)} }
func (a Size) positive() Size      { return a.max(Size{}) }
func (a Size) zero() bool          { return a == Size{} }
func (a Size) shortOf(b Size) Size { return a.sub(b).positive() }
func (a Size) valid() bool {
	return a.CPU >= 0 && a.Memory >= 0 && a.CPU <= maxCPU && a.Memory <= maxMemory
}
func (a Size) times(n int64) Size { return Size{a.CPU * n, a.Memory * n} }
func (c *Container) effective() Size {
	r := c.Request
	if r.Memory == 0 {
		r.Memory = DefaultMemory
	}
	return r
}

// String prints a size as people say it: "1.5 CPU and 512 MiB".
func (a Size) String() string { return string(a.appendTo(make([]byte, 0, 32))) }

// appendTo appends what String prints.
func (a Size) appendTo(b []byte) []byte {
	if a.CPU != 0 {
		b = appendCPU(b, a.CPU)
		if a.Memory == 0 {
			return b
		}
		b = append(b, " and "...)
	}
	return appendMemory(b, a.Memory)
}

func appendCPU(b []byte, milli int64) []byte {
	return append(strconv.AppendFloat(b, float64(milli)/1000, 'f', -1, 64), " CPU"...)
}

var memoryUnits = [...]string{" B", " KiB", " MiB", " GiB", " TiB"}

func appendMemory(b []byte, v int64) []byte {
	f, u := float64(v), 0
	for (f >= 1024 || f <= -1024) && u < len(memoryUnits)-1 {
		// 1536 MiB reads better than 1.5 GiB only below 10 GiB: keep whole numbers.
		if u >= 2 && f < 10240 && f != float64(int64(f/1024)*1024) {
			break
		}
		f, u = f/1024, u+1
	}
	return append(appendFloat(b, f, 1), memoryUnits[u]...)
}

func appendSeconds(b []byte, s float64) []byte { return append(appendFloat(b, s, 2), " s"...) }

// appendFloat appends f with at most so many digits after the point, and no zeros at
// their end.
func appendFloat(b []byte, f float64, digits int) []byte {
	if f == math.Trunc(f) && math.Abs(f) < 1<<53 {
		return strconv.AppendInt(b, int64(f), 10)
	}
	b = strconv.AppendFloat(b, f, 'f', digits, 64)
	for b[len(b)-1] == '0' {
		b = b[:len(b)-1]
	}
	if b[len(b)-1] == '.' {
		b = b[:len(b)-1]
	}
	return b
}

// stepUp is the smallest from + k*step that is at least want.
func stepUp(from, want, step int64) int64 {
	if want <= from {
		return from
	}
	return from + (want-from+step-1)/step*step
}

// stepDown is the largest from + k*step that is at most limit, from itself when
// limit lies below it.
func stepDown(from, limit, step int64) int64 {
	if limit <= from {
		return from
	}
	return from + (limit-from)/step*step
}

// ceiling is the most a machine booted on h may become; host.top has it.
func (h *Host) ceiling() Size {
	top, limit := h.Capacity.sub(h.MachineExtra), h.Capabilities.MaxMachine
	if limit.CPU > 0 {
		top.CPU = min(top.CPU, limit.CPU)
	}
	if limit.Memory > 0 {
		top.Memory = min(top.Memory, limit.Memory)
	}
	return h.stepDown(h.Base, top)
}

func (h *Host) steps() Size {
	s := Size{CPU: h.Capabilities.CPUStep, Memory: h.Capabilities.MemoryStep}
	if s.CPU <= 0 {
		s.CPU = 1000
	}
	if s.Memory <= 0 {
		s.Memory = 1
	}
	return s
}

func (h *Host) stepUp(from, want Size) Size {
	st := h.steps()
	return Size{stepUp(from.CPU, want.CPU, st.CPU), stepUp(from.Memory, want.Memory, st.Memory)}
}

func (h *Host) stepDown(from, limit Size) Size {
	st := h.steps()
	return Size{stepDown(from.CPU, limit.CPU, st.CPU), stepDown(from.Memory, limit.Memory, st.Memory)}
}

// class sorts amounts into quarter powers of two: what is in a lower class than a
// need can't satisfy it, what is in the same or a higher one may.
func class(v int64) uint32 {
	if v <= 0 {
		return 0
	}
	n := bits.Len64(uint64(v))
	part := uint32(0)
	if n > 2 {
		part = uint32(v>>(n-3)) & 3
	}
	return uint32(4*n) + part
}
