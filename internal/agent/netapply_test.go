package agent

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
)

// TestTakenPortStopsNobody: a network that lacks a port is in force; the lack is
// told once, tried again, and told to be over.
func TestTakenPortStopsNobody(t *testing.T) {
	rigged(t, func(r *rig) {
		set := func(err error) {
			r.w.net.mu.Lock()
			defer r.w.net.mu.Unlock()
			r.w.net.err = err
		}
		set(fmt.Errorf("apply: %w", &network.Degraded{Err: fmt.Errorf("port 80/tcp is taken: %w", errdefs.ErrAlreadyExists)}))
		w := r.a.hub.watch()
		defer w.leave()
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.container("c-2", "")
		r.apply()
		r.until(30*time.Second, "running", func() bool { return r.state("c-1", running)() && r.state("c-2", running)() })
		time.Sleep(5 * time.Minute)
		actions := map[string]int{}
		events := func() map[string]int {
			st, err := w.next(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range st.Events {
				if e.Kind == "network" {
					actions[e.Action]++
				}
			}
			return actions
		}
		if n := events(); n["degraded"] != 1 || n["restored"] != 0 {
			t.Errorf("told: %v", n)
		}
		if r.peek(func() bool { return r.w.net.calls < 5 }) {
			t.Errorf("tried %d times", r.w.net.calls)
		}
		doctor, err := service{a: r.a}.Doctor(t.Context(), connect.NewRequest(&v1.DoctorRequest{}))
		if err != nil || len(doctor.Msg.Findings) != 1 || doctor.Msg.Findings[0].Code != "network-degraded" {
			t.Errorf("doctor: %v %v", doctor, err)
		}
		set(nil)
		time.Sleep(2 * time.Minute)
		r.container("c-3", "")
		r.apply()
		r.until(30*time.Second, "running", r.state("c-3", running))
		if n := events(); n["degraded"] != 1 || n["restored"] != 1 || r.a.net.degraded() != nil {
			t.Errorf("told at the end: %v", n)
		}

		// A network that could not be set up does stop them.
		set(errors.New("no nft"))
		r.container("c-4", "")
		r.apply()
		time.Sleep(time.Minute)
		if r.state("c-4", running)() {
			t.Error("started without a network")
		}
		set(nil)
		r.until(5*time.Minute, "running", r.state("c-4", running))
	})
}

// TestChangedWhileItsMachineRests: what the machine's scratch disk still has of the
// container is of the old spec, and is not what starts.
func TestChangedWhileItsMachineRests(t *testing.T) {
	rigged(t, func(r *rig) {
		m := r.machine("m-1")
		c := r.container("c-1", "m-1")
		r.apply()
		r.until(30*time.Second, "running", r.state("c-1", running))
		m.Stopped = true
		r.apply()
		r.until(time.Minute, "stopped", func() bool { return r.machineStatus("m-1").State == v1.MachineState_MACHINE_STATE_STOPPED })
		c.Generation++
		c.Spec.Hostname = "other"
		r.apply()
		time.Sleep(time.Minute)
		m.Stopped = false
		r.apply()
		r.until(time.Minute, "running", r.state("c-1", running))
		if r.peek(func() bool { return r.w.drv.ms["m-1"].rt.cs["c-1"].spec.Hostname != "other" }) {
			t.Error("the container of the old spec runs")
		}
	})
}
