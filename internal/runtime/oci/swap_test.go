package oci

import (
	"io"
	"log/slog"
	"testing"

	"tandem/internal/runtime/cgroup"

	v1 "tandem/api/tandem/v1"
)

// Who limits memory and says nothing of swap gets as much of it again, as with
// Docker; on a host with swap there would be no limit otherwise.
func TestSwapOfALimit(t *testing.T) {
	cg, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	r := &Runtime{cg: cg, log: slog.New(slog.NewTextHandler(io.Discard, nil)), o: Options{CgroupParent: "/tandem-test-swap"}}
	counted := cg.Group("/tandem-test-swap/x").SwapLimits()
	for _, c := range []struct{ limit, swap, want int64 }{
		{64 << 20, 0, 128 << 20}, {64 << 20, 64 << 20, 64 << 20}, {64 << 20, -1, -1}, {1<<62 + 1, 0, -1}, {0, 0, 0},
	} {
		_, mem, _ := r.limits("x", &v1.Resources{MemoryBytesLimit: c.limit, MemorySwapBytes: c.swap})
		switch {
		case c.want == 0 || !counted:
			if mem.Swap != nil {
				t.Errorf("%+v: %d", c, *mem.Swap)
			}
		case mem.Swap == nil || *mem.Swap != c.want:
			t.Errorf("%+v: %v", c, mem.Swap)
		}
	}
}
