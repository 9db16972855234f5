// Package resource reads and prints quantities of CPU and memory as people write
// them, in Compose files and on the command line.
//
//	n, err := resource.ParseMemory("512m")    // 536870912, as Docker reads it
//	c, err := resource.ParseCPU("0.25")       // 250 thousandths of a core
//	c, err = resource.ParseCPU("500m")        // 500, as Kubernetes writes it
//	z, err := resource.ParseSize("96c,256g")  // both at once
//	resource.FormatMemory(1536 << 20)         // "1.5GiB"
//
// Memory units are binary in every spelling ("m", "MB" and "MiB" are all 1024²
// bytes), as with Docker. All errors are errdefs.ErrInvalidArgument.
package resource

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
)

// Limits of what is accepted; larger amounts are mistakes.
const (
	MaxCPU    = 1 << 30 // thousandths of a core: about a million cores
	MaxMemory = 1 << 50 // bytes: 1 PiB
)

// Size is an amount of both: CPU in thousandths of a core, memory in bytes.
type Size struct {
	CPU    int64
	Memory int64
}

// String prints a size so that ParseSize reads it back: "1.5c,512MiB".
func (s Size) String() string { return FormatCPU(s.CPU) + "c," + FormatMemory(s.Memory) }

// ParseMemory reads a number of bytes with Docker's units: b, k, m, g, t, p, each
// also as "kb" or "kib", in any case, always powers of 1024. Fractions are cut to
// whole bytes.
func ParseMemory(text string) (int64, error) {
	bad := func(why string) (int64, error) {
		return 0, fmt.Errorf("memory %q %s; write for example 512m or 1.5g: %w", clip(text), why, errdefs.ErrInvalidArgument)
	}
	number, unit := split(text)
	if number == "" {
		return bad("is not a number with a unit")
	}
	if f, err := strconv.ParseFloat(number, 64); err != nil || f > MaxMemory {
		return bad("is too large or no number")
	}
	n, err := units.RAMInBytes(number + unit)
	if err != nil || n < 0 {
		return bad("is not a number with a unit")
	}
	if n > MaxMemory {
		return bad("is more than " + FormatMemory(MaxMemory))
	}
	return n, nil
}

// ParseCPU reads CPUs: a decimal number of cores ("0.25", "2") or thousandths
// with an m ("500m"). Finer than a thousandth is rounded to the nearest, but never
// to zero.
func ParseCPU(text string) (int64, error) {
	number, unit := split(text)
	f, err := strconv.ParseFloat(number, 64)
	if number == "" || err != nil || unit != "" && unit != "m" {
		return 0, fmt.Errorf("CPU %q is not a number; write for example 0.25, 2 or 500m: %w", clip(text), errdefs.ErrInvalidArgument)
	}
	return MilliCPU(f, unit == "m")
}

// MilliCPU turns a number of cores (or of thousandths) into thousandths, with
// ParseCPU's rounding and limits.
func MilliCPU(f float64, milli bool) (int64, error) {
	if !milli {
		f *= 1000
	}
	if math.IsNaN(f) || f < 0 || f > MaxCPU {
		return 0, fmt.Errorf("CPU amount %g is not between 0 and %d cores: %w", f/1000, MaxCPU/1000, errdefs.ErrInvalidArgument)
	}
	if f > 0 && f < 1 {
		return 1, nil
	}
	return int64(math.Round(f)), nil
}

// ParseSize reads a CPU amount with a c and a memory amount, separated by a
// comma, in either order: "96c,256g"; one of them may be absent.
func ParseSize(text string) (Size, error) {
	var z Size
	var cpu, memory bool
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		var err error
		if n, ok := strings.CutSuffix(strings.ToLower(part), "c"); ok && !cpu {
			cpu = true
			z.CPU, err = ParseCPU(n)
		} else if !ok && !memory {
			memory = true
			z.Memory, err = ParseMemory(part)
		} else {
			err = errdefs.ErrInvalidArgument
		}
		if err != nil {
			return Size{}, fmt.Errorf("size %q: write for example 4c,8g: %w", clip(text), err)
		}
	}
	return z, nil
}

// FormatCPU prints thousandths as cores: "0.25", "2".
func FormatCPU(milli int64) string {
	return strconv.FormatFloat(float64(milli)/1000, 'f', -1, 64)
}

// FormatMemory prints bytes exactly, in the largest unit that needs no more than
// two decimals: "512MiB", "1.5GiB", "1000000B".
func FormatMemory(b int64) string {
	names := []string{"PiB", "TiB", "GiB", "MiB", "KiB"}
	for i, name := range names {
		unit := int64(1) << (10 * (len(names) - i))
		if b >= unit && b%(unit/4) == 0 {
			return strconv.FormatFloat(float64(b)/float64(unit), 'f', -1, 64) + name
		}
	}
	return strconv.FormatInt(b, 10) + "B"
}

// RoundMemory prints bytes for a table, with at most three digits: "1.46GiB".
func RoundMemory(b int64) string {
	f, unit := float64(b), 0
	names := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB"}
	for math.Abs(f) >= 999.5 && unit < len(names)-1 {
		f, unit = f/1024, unit+1
	}
	digits := 2
	switch a := math.Abs(f); {
	case unit == 0 || a >= 99.95:
		digits = 0
	case a >= 9.995:
		digits = 1
	}
	t := strconv.FormatFloat(f, 'f', digits, 64)
	if strings.Contains(t, ".") {
		t = strings.TrimRight(strings.TrimRight(t, "0"), ".")
	}
	return t + names[unit]
}

// split parts a decimal number from its unit; number is "" when there is none.
func split(text string) (number, unit string) {
	text = strings.TrimSpace(text)
	if len(text) > 64 {
		return "", ""
	}
	end := 0
	for end < len(text) && (text[end] >= '0' && text[end] <= '9' || text[end] == '.') {
		end++
	}
	number, unit = text[:end], strings.TrimSpace(text[end:])
	if strings.Trim(number, ".") == "" || strings.Count(number, ".") > 1 || strings.ContainsAny(unit, "0123456789. ") {
		return "", ""
	}
	return number, unit
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}
