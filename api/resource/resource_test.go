package resource

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"
)

func TestParseMemory(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "512m": 512 << 20, "512M": 512 << 20, "512MB": 512 << 20, "512MiB": 512 << 20, "512mb": 512 << 20,
		"1.5g": 3 << 29, "1.5 g": 3 << 29, " 2k ": 2048, "100b": 100, "0.5k": 512, "1t": 1 << 40, "1p": 1 << 50,
	} {
		if got, err := ParseMemory(text); err != nil || got != want {
			t.Errorf("ParseMemory(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "m", "-1m", "1x", "1mm", "1bb", "1.2.3m", ".", "1e9", "0x10", "inf", "NaN", "2p", "99999999999999999999", "1 2m", "1mibb"} {
		if got, err := ParseMemory(text); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ParseMemory(%q) = %d, %v, want an error", text, got, err)
		}
	}
}

func TestParseCPU(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "0.25": 250, ".5": 500, "2": 2000, "500m": 500, "1500m": 1500, "0.0001": 1, "1.9999": 2000} {
		if got, err := ParseCPU(text); err != nil || got != want {
			t.Errorf("ParseCPU(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "m", "-1", "1c", "1M", "1e3", "NaN", "inf", "99999999999999"} {
		if got, err := ParseCPU(text); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ParseCPU(%q) = %d, %v, want an error", text, got, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	for text, want := range map[string]Size{
		"96c,256g": {96000, 256 << 30}, "256g, 96c": {96000, 256 << 30}, "0.5c": {500, 0}, "1g": {0, 1 << 30}, "250mc,1m": {250, 1 << 20},
	} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", ",", "1c,2c", "1g,2g", "1c,1g,1g", "c", "x"} {
		if got, err := ParseSize(text); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("ParseSize(%q) = %v, %v, want an error", text, got, err)
		}
	}
}

func TestFormat(t *testing.T) {
	for b, want := range map[int64]string{0: "0B", 1000000: "1000000B", 512 << 20: "512MiB", 3 << 29: "1.5GiB", 1 << 50: "1PiB", 2048: "2KiB", 143 << 20: "143MiB"} {
		if got := FormatMemory(b); got != want {
			t.Errorf("FormatMemory(%d) = %q, want %q", b, got, want)
		}
	}
	for b, want := range map[int64]string{0: "0B", 999: "999B", 1023: "1KiB", 1536: "1.5KiB", 150 << 20: "150MiB", 1500 << 20: "1.46GiB", 10 << 30: "10GiB"} {
		if got := RoundMemory(b); got != want {
			t.Errorf("RoundMemory(%d) = %q, want %q", b, got, want)
		}
	}
	if got := (Size{CPU: 1500, Memory: 512 << 20}).String(); got != "1.5c,512MiB" {
		t.Error(got)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"512m", "1.5GiB", "0.25", "96c,256g", "1 k"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := ParseMemory(s); err == nil {
			if n < 0 || n > MaxMemory {
				t.Fatalf("ParseMemory(%q) = %d", s, n)
			}
			if d, err := units.RAMInBytes(trim(s)); err != nil || d != n {
				t.Fatalf("ParseMemory(%q) = %d, Docker reads %d, %v", s, n, d, err)
			}
			if back, err := ParseMemory(FormatMemory(n)); err != nil || back != n {
				t.Fatalf("%d printed as %q reads back as %d, %v", n, FormatMemory(n), back, err)
			}
		}
		if n, err := ParseCPU(s); err == nil {
			if back, err := ParseCPU(FormatCPU(n)); err != nil || back != n {
				t.Fatalf("%d printed as %q reads back as %d, %v", n, FormatCPU(n), back, err)
			}
		}
		if z, err := ParseSize(s); err == nil {
			if back, err := ParseSize(z.String()); err != nil || back != z {
				t.Fatalf("%v reads back as %v, %v", z, back, err)
			}
		}
	})
}

// trim leaves out the spaces that Docker does not accept and we do.
func trim(s string) string {
	number, unit := split(s)
	return number + unit
}
