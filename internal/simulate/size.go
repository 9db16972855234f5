package simulate

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Size is CPU in thousandths of a core and memory in bytes.
type Size struct {
	CPU    int64
	Memory int64
}

// Bounds on sizes and times of anything that is read: more than any server or
// trace has, and far from overflow in sums.
const (
	maxCPU    = 1 << 30 // a million cores
	maxMemory = 1 << 50 // a pebibyte
	maxTime   = Time(100 * 366 * 24 * 3600 * 1000)
)

func (a Size) add(b Size) Size     { return Size{a.CPU + b.CPU, a.Memory + b.Memory} }
func (a Size) sub(b Size) Size     { return Size{a.CPU - b.CPU, a.Memory - b.Memory} }
func (a Size) fits(room Size) bool { return a.CPU <= room.CPU && a.Memory <= room.Memory }
func (a Size) max(b Size) Size     { return Size{max(a.CPU, b.CPU), max(a.Memory, b.Memory)} }

// share is the larger of the parts that a is of whole.
func (a Size) share(whole Size) float64 {
	return max(part(a.CPU, whole.CPU), part(a.Memory, whole.Memory))
}

func part(a, whole int64) float64 {
	if whole <= 0 {
		return 0
	}
	return float64(a) / float64(whole)
}

// String prints a size as ParseSize reads it: "1.5c,512m".
func (a Size) String() string {
	return strconv.FormatFloat(float64(a.CPU)/1000, 'f', -1, 64) + "c," + memoryText(a.Memory)
}

func memoryText(b int64) string {
	for _, u := range []struct {
		s string
		n int64
	}{{"t", 1 << 40}, {"g", 1 << 30}, {"m", 1 << 20}, {"k", 1 << 10}} {
		if b >= u.n {
			return strconv.FormatFloat(float64(b)/float64(u.n), 'f', -1, 64) + u.s
		}
	}
	return strconv.FormatInt(b, 10) + "b"
}

// ParseSize reads "96c,256g": cores, then memory with k, m, g or t (powers of
// 1024). Fractions are allowed.
func ParseSize(s string) (Size, error) {
	bad := func(why string) (Size, error) {
		return Size{}, fmt.Errorf("size %q: %s; write it as 96c,256g", s, why)
	}
	cpu, mem, ok := strings.Cut(strings.ToLower(strings.TrimSpace(s)), ",")
	if !ok {
		return bad("a CPU and a memory size are needed")
	}
	cores, ok := strings.CutSuffix(strings.TrimSpace(cpu), "c")
	if !ok {
		return bad("the CPU ends in c")
	}
	c, err := number(cores, maxCPU/1000)
	if err != nil {
		return bad("CPU " + err.Error())
	}
	mem = strings.TrimSuffix(strings.TrimSuffix(strings.TrimSpace(mem), "b"), "i")
	unit := float64(1)
	if n := len(mem); n > 0 {
		if i := strings.IndexByte("kmgt", mem[n-1]); i >= 0 {
			unit, mem = math.Pow(1024, float64(i+1)), mem[:n-1]
		}
	}
	m, err := number(mem, maxMemory/unit)
	if err != nil {
		return bad("memory " + err.Error())
	}
	return Size{CPU: int64(math.Ceil(c*1000 - 1e-6)), Memory: int64(math.Ceil(m*unit - 1e-6))}, nil
}

// number reads a decimal number of at least 0 and at most limit.
func number(s string, limit float64) (float64, error) {
	f, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	switch {
	case err != nil && math.IsInf(f, 0):
		return 0, fmt.Errorf("%q is too large", clip(s))
	case err != nil:
		return 0, fmt.Errorf("%q is not a number", clip(s))
	case math.IsNaN(f) || math.IsInf(f, 0):
		return 0, fmt.Errorf("%q is not a number that can be reckoned with", clip(s))
	case f < 0 || math.Signbit(f) && f != 0:
		return 0, fmt.Errorf("%q is negative", clip(s))
	case f > limit:
		return 0, fmt.Errorf("%q is too large: %g is the most", clip(s), limit)
	}
	return f, nil
}

// clip keeps a hostile text short in a message.
func clip(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}

// Time is simulated time in milliseconds since the trace's zero.
type Time int64

// Seconds is t as the trace writes it.
func (t Time) Seconds() float64 { return float64(t) / 1000 }

// At turns a duration since the trace's zero into a Time.
func At(d time.Duration) Time { return Time(d.Milliseconds()) }

func (t Time) hours() float64 { return float64(t) / 3600000 }

func seconds(s float64) Time { return Time(math.Round(s * 1000)) }
