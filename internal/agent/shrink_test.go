package agent

import (
	"context"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
)

type memoryGuest struct {
	tandemv1connect.GuestServiceClient
	available int64
	err       error
}

func (g memoryGuest) Resources(context.Context, *connect.Request[v1.GuestResourcesRequest]) (*connect.Response[v1.GuestResourcesResponse], error) {
	return connect.NewResponse(&v1.GuestResourcesResponse{MemoryAvailableBytes: g.available}), g.err
}

// A machine never shrinks into what its guest uses: the guest would panic.
func TestShrinkLeavesWhatIsUsed(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		available int64
		err       error
		want      int64
	}{
		{available: 700 * mib, want: 256 * mib},                 // hardly anything used: all of it
		{available: (shrinkReserve + 100*mib), want: 668 * mib}, // 100 MiB to give
		{available: 50 * mib, want: 768 * mib},                  // less than the reserve: nothing
		{err: errors.New("no answer"), want: 768 * mib},
	} {
		m := &machine{link: &GuestLink{Guest: memoryGuest{available: c.available, err: c.err}}}
		if got := m.shrinkTo(t.Context(), 256*mib, 768*mib, 4*mib); got != c.want {
			t.Errorf("%d MiB available: shrinks to %d MiB, want %d", c.available/mib, got/mib, c.want/mib)
		}
	}
	if got := (&machine{}).shrinkTo(t.Context(), 256*mib, 768*mib, 4*mib); got != 768*mib {
		t.Errorf("without a guest to ask: %d MiB", got/mib)
	}
}

// A machine that could not be given all says what it lacks, and gets it soon after it
// is there.
func TestMachineSaysWhatItsSizeLacks(t *testing.T) {
	rigged(t, func(r *rig) {
		m := r.machine("m-1")
		r.apply()
		r.until(time.Minute, "it runs", func() bool { return r.machineStatus("m-1").GetState() == v1.MachineState_MACHINE_STATE_RUNNING })
		room := func(n int) {
			r.w.drv.mu.Lock()
			defer r.w.drv.mu.Unlock()
			r.w.drv.room = n
		}
		room(1)
		m.Size.CpuMilli = 2000
		r.apply()
		const lacks = "1 of 2 CPUs are there: the emulator has no room for more now; it is tried again"
		r.until(time.Minute, "it says what it lacks", func() bool { return r.machineStatus("m-1").GetMessage() == lacks })
		time.Sleep(10 * time.Minute)
		room(0)
		took := r.until(time.Minute, "it has its CPUs", func() bool { return r.machineStatus("m-1").GetSize().GetCpuMilli() == 2000 })
		if took > 10*time.Second {
			t.Errorf("it got them %v after they were there", took)
		}
		if msg := r.machineStatus("m-1").GetMessage(); msg != "" {
			t.Errorf("it still says %q", msg)
		}
	})
}
