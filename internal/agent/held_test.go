package agent

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

// A machine that the VMM paused because the host's disk is full answers no
// keep-alive. It is not ended for that, says what it waits for, and goes on with
// all that ran in it.
func TestMachineThatWaitsForItsDisk(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m")
		r.container("c", "m", "sleep")
		r.apply()
		r.until(2*time.Minute, "it runs", r.state("c", running))
		began, starts := r.status("c").StartedAt.AsTime(), r.starts()
		hold := func(held bool) {
			r.w.drv.mu.Lock()
			m := r.w.drv.ms["m"]
			m.st.State, m.st.Message = hypervisor.Running, ""
			if held {
				m.st.State, m.st.Message = hypervisor.Paused, "the host has no space left"
			}
			guest := m.guest
			r.w.drv.mu.Unlock()
			guest.mu.Lock()
			guest.hang = held
			guest.mu.Unlock()
			r.w.drv.mu.Lock()
			for w := range r.w.drv.watchers {
				w <- hypervisor.Event{Machine: "m", Kind: hypervisor.EventHeld}
			}
			r.w.drv.mu.Unlock()
		}
		hold(true)
		unreachable := func() bool {
			st := r.machineStatus("m")
			return st.GetState() == v1.MachineState_MACHINE_STATE_UNREACHABLE && strings.Contains(st.Message, "no space left")
		}
		r.until(10*time.Second, "its status says so", unreachable)
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		if !r.peek(unreachable) || r.starts() != starts {
			t.Fatalf("after half an hour: %v, started %d times", r.machineStatus("m"), r.starts())
		}
		hold(false)
		r.until(time.Minute, "it goes on", func() bool {
			return r.machineStatus("m").GetState() == v1.MachineState_MACHINE_STATE_RUNNING && r.status("c").GetState() == running
		})
		if st := r.status("c"); !st.StartedAt.AsTime().Equal(began) || st.RestartCount != 0 {
			t.Errorf("it was started again: %v", st)
		}
	})
}
