package qemu

import (
	"context"
	"testing"
	"time"

	"tandem/internal/hypervisor"
)

// CPUs come and go more often than there are places for them; where they can't
// go, asking for it harms nobody.
func TestCPUsComeAndGo(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	dir := t.TempDir()
	useWarm(t, dir)
	d := open(t, dir)
	clone(ctx, t, d, "c")
	sh := shell(ctx, t, d, "c")
	for i := range 3 {
		for _, n := range []int{2, 1} {
			got, err := d.Resize(ctx, "c", hypervisor.Size{CPUs: n})
			if err != nil || got.CPUs > 2 {
				st, _ := d.Inspect(ctx, "c")
				t.Fatalf("round %d: %d CPUs: %+v, %v, %v", i, n, got, err, st.Message)
			}
			if n == 1 && d.Capabilities().ShrinkCPU == (got.CPUs != 1) {
				t.Errorf("round %d: %d CPUs after shrinking", i, got.CPUs)
			}
			if _, err := sh.Run(ctx, "sleep 1; nproc"); err != nil {
				st, _ := d.Inspect(ctx, "c")
				t.Fatalf("round %d: %d CPUs: %v, %v", i, n, err, st.Message)
			}
		}
	}
}
