package agent

import (
	"context"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"

	"google.golang.org/protobuf/types/known/durationpb"
)

// When the host goes down all is stopped in order and not started again before the
// next agent, which finds what containers wrote.
func TestHalt(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		r.container("c-1", "m-1").Spec.Restart = &v1.RestartPolicy{Name: "always"}
		metal := r.container("c-2", "", "stubborn")
		metal.Spec.StopGracePeriod = durationpb.New(30 * time.Second)
		metal.Spec.Restart = &v1.RestartPolicy{Name: "always"}
		r.apply()
		r.until(20*time.Second, "running", func() bool { return r.state("c-1", running)() && r.state("c-2", running)() })

		begin := time.Now()
		if err := r.a.Halt(context.Background()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took < 30*time.Second || took > time.Minute {
			t.Errorf("took %s; the container on metal has 30 s", took)
		}
		stopped := func() bool {
			return r.w.drv.ms["m-1"].st.State == hypervisor.Stopped && r.w.rt.cs["c-2"].st.State == exited
		}
		if !r.peek(stopped) {
			t.Error("something runs")
		}
		time.Sleep(5 * time.Minute)
		if !r.peek(stopped) {
			t.Error("something was started again")
		}
		r.stop()
		r.start()
		r.until(time.Minute, "running again", r.runs("c-1", "m-1", 2))
		if r.madeAnew("m-1") {
			t.Error("its writable layer was lost")
		}
	})
}

// The agent ends as soon as Halt has returned, and its record is right then.
func TestHaltWaitsForRecords(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.apply()
		r.until(20*time.Second, "running", r.state("c-1", running))
		r.w.drv.lingers = time.Second
		if err := r.a.Halt(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.stop()
		r.start()
		r.until(time.Minute, "running again", r.runs("c-1", "m-1", 2))
		if r.madeAnew("m-1") {
			t.Error("its writable layer was lost")
		}
	})
}
