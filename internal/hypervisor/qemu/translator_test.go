package qemu

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

func TestRoomForCPU(t *testing.T) {
	for _, c := range []struct {
		size int64
		max  int
		want int
	}{{64 * mib, 1, 1}, {64 * mib, 2, 16}, {64 * mib, 32, 32}, {256 * mib, 2, 16}, {256 * mib, 8, 64}, {512 * mib, 32, 256}} {
		if n := cacheRegions(c.size, c.max); n != c.want {
			t.Errorf("%d MiB for %d CPUs: %d regions instead of %d", c.size/mib, c.max, n, c.want)
		}
	}
	report := func(used, size int64) string {
		return fmt.Sprintf("Translation buffer state:\ngen code size       %d/%d\nTB count            7\n", used*mib, size*mib)
	}
	for _, c := range []struct {
		used          int64
		regions, cpus int
		want          bool
	}{{0, 16, 1, true}, {224, 16, 1, false}, {223, 16, 1, true}, {223, 16, 2, false}, {255, 16, 1, false}, {32, 16, 8, true}, {112, 16, 8, false}} {
		if got := roomForCPU(report(c.used, 256), c.regions, c.cpus); got != c.want {
			t.Errorf("%d MiB used by %d CPUs: room is %v", c.used, c.cpus, got)
		}
	}
	for _, odd := range []string{"", "gen code size  lots", "gen code size 5/0"} {
		if !roomForCPU(odd, 16, 1) {
			t.Errorf("%q keeps CPUs away", odd)
		}
	}
	d := &Driver{opt: Options{TranslationCache: 64 * mib}}
	if d.cacheSize(2) != 64*mib || d.cacheSize(32) != 512*mib {
		t.Error(d.cacheSize(2), d.cacheSize(32))
	}
}

// TestAllCPUsWhileBusy plugs in every CPU that a machine may have while its guest
// translates new code all the time, also with a cache so small that it is full soon: CPUs
// come later then, but the VMM lives.
func TestAllCPUsWhileBusy(t *testing.T) {
	if accel() != "tcg" {
		t.Log("this host has KVM: the translator is tried all the same")
	}
	for round, cache := range []int64{0, 0, 32 * mib} {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			dir := t.TempDir()
			o := options(dir, testLog(t))
			o.Accel, o.TranslationCache = "tcg", cache
			d := openWith(t, o)
			most := 8
			if cache > 0 {
				most = 2
			}
			d.host.max.CPUs = most
			s := spec(t, "c")
			s.Ceiling.CPUs = most
			if err := d.Create(ctx, s); err != nil {
				t.Fatal(err)
			}
			if err := d.Start(ctx, "c", hypervisor.StartOptions{}); err != nil {
				t.Fatal(err)
			}
			sh := shell(ctx, t, d, "c")
			// Each copy of the program is new code.
			busy := `for i in 1 2 3 4; do (n=0; while :; do cp /bin/busybox /tmp/b$i; for a in id date ls df ps; do /tmp/b$i $a; done; rm /tmp/b$i; n=$((n+1)); done >/dev/null 2>&1 &); done; echo started`
			if out, err := sh.Run(ctx, busy); err != nil || !strings.Contains(out, "started") {
				t.Fatal(out, err)
			}
			say := func(when string) {
				_ = d.with(ctx, "c", func(ctx context.Context, m *machine, q *qmp.Client) error {
					r, err := cacheReport(ctx, q)
					line, _, _ := strings.Cut(r[strings.Index(r, "gen code size")+len("gen code size"):], "\n")
					t.Log(when, strings.TrimSpace(line), err)
					return nil
				})
			}
			if cache > 0 {
				time.Sleep(15 * time.Second) // let it fill
			}
			say("before:")
			for got, tries := 1, 0; got < most; tries++ {
				size, err := d.Resize(ctx, "c", hypervisor.Size{CPUs: most})
				if err != nil || ctx.Err() != nil {
					st, _ := d.Inspect(context.Background(), "c")
					t.Fatalf("%d CPUs after %d tries: %v, %s", size.CPUs, tries, err, st.Message)
				}
				if got = size.CPUs; got < most {
					say("waits:")
					time.Sleep(time.Second)
				}
			}
			say("after:")
			if out, err := sh.Run(ctx, "nproc"); err != nil {
				t.Fatal(out, err)
			}
		})
	}
}
