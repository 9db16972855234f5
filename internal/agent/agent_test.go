package agent

import (
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
)

func TestFirstContainerByClone(t *testing.T) {
	rigged(t, func(r *rig) {
		r.until(20*time.Second, "template", func() bool { return len(r.w.drv.templates) == 1 })
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.apply()
		took := r.until(3*time.Second, "running", r.state("c-1", running))
		if m := r.machineStatus("m-1"); m.StartMethod != "clone" || m.State != v1.MachineState_MACHINE_STATE_RUNNING {
			t.Errorf("machine: %v", m)
		}
		if took > time.Second {
			t.Errorf("took %s", took)
		}
		// gone without a trace
		r.spec.Machines, r.spec.Containers = nil, nil
		r.apply()
		r.until(time.Minute, "all gone", func() bool { return r.clean() == "" })
	})
}

func TestColdBootWithoutTemplate(t *testing.T) {
	rigged(t, func(r *rig) {
		r.w.drv.mu.Lock()
		r.w.drv.templates = map[string]bool{}
		r.w.drv.mu.Unlock()
		r.machine("m-1").Size = &v1.Size{CpuMilli: 2500, MemoryBytes: 300<<20 + 1}
		r.container("c-1", "m-1")
		r.apply()
		r.until(10*time.Second, "running", r.state("c-1", running))
		r.until(time.Second, "grown", func() bool {
			s := r.w.drv.ms["m-1"].st.Size
			return s.CPUs == 3 && s.Memory == 302<<20
		})
		if m := r.machineStatus("m-1"); m.StartMethod != "boot" || m.StartDuration.AsDuration() < 5*time.Second {
			t.Errorf("machine: %v", m)
		}
	})
}

func TestRestartPolicies(t *testing.T) {
	rigged(t, func(r *rig) {
		r.container("never", "", "run", "1s", "3")
		r.container("twice", "", "run", "10ms", "1").Spec.Restart = &v1.RestartPolicy{Name: "on-failure", MaxRetries: 2}
		r.container("fine", "", "run", "10ms", "0").Spec.Restart = &v1.RestartPolicy{Name: "on-failure"}
		r.container("always", "", "run", "10ms", "0").Spec.Restart = &v1.RestartPolicy{Name: "always"}
		r.container("missing", "", "missing")
		r.apply()
		r.until(10*time.Second, "ends", func() bool {
			return r.status("never").GetState() == exited && r.status("twice").GetState() == exited && r.status("fine").GetState() == exited
		})
		if st := r.status("never"); st.ExitCode != 3 || st.RestartCount != 0 || st.FinishedAt == nil {
			t.Errorf("never: %v", st)
		}
		if st := r.status("twice"); st.ExitCode != 1 || st.RestartCount != 2 {
			t.Errorf("twice: %v", st)
		}
		if st := r.status("fine"); st.ExitCode != 0 || st.RestartCount != 0 {
			t.Errorf("fine: %v", st)
		}
		if st := r.status("missing"); st.State != failed || st.ExitCode != 127 || st.Message == "" {
			t.Errorf("missing: %v", st)
		}
		// 0.1 0.2 0.4 ... 60: Docker's delays
		begin := r.status("always").RestartCount
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if n := r.status("always").RestartCount - begin; n < 12 || n > 20 {
			t.Errorf("always: restarted %d times in 10 minutes", n)
		}
		// a restart that was asked for begins anew
		for _, c := range r.spec.Containers {
			c.RestartGeneration++
		}
		r.apply()
		r.until(5*time.Second, "again", func() bool {
			st := r.status("twice")
			return st.State == exited && st.RestartCount == 2 && st.ObservedRestartGeneration == 1
		})
	})
}

func TestStopStartRemove(t *testing.T) {
	rigged(t, func(r *rig) {
		c := r.container("c-1", "")
		c.Spec.Restart = &v1.RestartPolicy{Name: "always"}
		c.Spec.StopGracePeriod = durationpb.New(37 * time.Second)
		c.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Target: "/anon"}, {Type: v1.Mount_TYPE_VOLUME, Source: "data", Target: "/data"}}
		c.Volumes = []*v1.AssignedMount{{Target: "/data", VolumeId: "v-1"}}
		r.spec.Volumes = []*v1.VolumeAssignment{{Id: "v-1", Name: "data", SizeBytes: 1 << 30}}
		r.apply()
		r.until(time.Second, "running", r.state("c-1", running))
		if r.peek(func() bool { return len(r.w.vols.vols) != 2 || r.w.vols.used["v-1"] != "metal" }) {
			t.Errorf("volumes: %v %v", r.w.vols.vols, r.w.vols.used)
		}
		c.Stopped = true
		r.apply()
		r.until(time.Second, "stopped", r.state("c-1", exited))
		time.Sleep(time.Minute)
		if st := r.status("c-1"); st.State != exited || st.ExitCode != 143 {
			t.Errorf("stopped: %v", st)
		}
		c.Stopped = false
		r.apply()
		r.until(time.Second, "running again", r.state("c-1", running))
		c.Paused = true
		r.apply()
		r.until(time.Second, "paused", r.state("c-1", v1.ContainerState_CONTAINER_STATE_PAUSED))
		c.Paused = false
		r.apply()
		r.until(time.Second, "resumed", r.state("c-1", running))

		// limits change in place, anything else makes it anew
		c.Generation++
		c.Spec.Resources = &v1.Resources{MemoryBytesLimit: 1 << 28}
		r.apply()
		r.until(time.Second, "updated", func() bool { return r.status("c-1").ObservedGeneration == 2 })
		if r.peek(func() bool { return r.w.rt.creates != 1 || r.w.rt.cs["c-1"].spec.Resources.MemoryBytesLimit != 1<<28 }) {
			t.Errorf("update: %d creates", r.w.rt.creates)
		}
		c.Generation++
		c.Spec.Env = []string{"B=2"}
		r.apply()
		r.until(time.Second, "made anew", func() bool { return r.status("c-1").ObservedGeneration == 3 && r.state("c-1", running)() })
		if r.peek(func() bool { return r.w.rt.creates != 2 }) {
			t.Errorf("recreate: %d creates", r.w.rt.creates)
		}
		r.spec.Containers = nil
		r.apply()
		r.until(5*time.Second, "removed", func() bool { return len(r.w.rt.cs) == 0 && len(r.w.vols.used) == 0 && len(r.w.imgs.leases) == 0 })
		if r.peek(func() bool { return r.w.rt.grace != 37*time.Second }) {
			t.Errorf("a container that was removed got %s to end, not its own grace period", r.w.rt.grace)
		}
		if r.peek(func() bool { return r.w.vols.vols["v-1"].ID == "" || len(r.w.vols.vols) != 1 }) {
			t.Errorf("the named volume stays, the anonymous one goes: %v", r.w.vols.vols)
		}
		r.spec.Volumes, r.spec.DeletedVolumes = nil, []string{"v-1"}
		r.apply()
		r.until(5*time.Second, "all gone", func() bool { return r.clean() == "" })
	})
}

// TestGraceOfWhatLeaves: the time that `down -t` gives comes with the intent that
// the container is not in any more, is used by the next agent too, and a shorter
// one counts at once.
func TestGraceOfWhatLeaves(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		for _, id := range []string{"quick", "slow", "own"} {
			r.container(id, "m-1", "stubborn").Spec.StopGracePeriod = durationpb.New(30 * time.Second)
		}
		r.apply()
		r.until(10*time.Second, "running", func() bool {
			return r.state("quick", running)() && r.state("slow", running)() && r.state("own", running)()
		})
		began := time.Now()
		r.spec.Containers = nil
		r.spec.Leaving = []*v1.LeavingContainer{{Id: "quick", StopTimeout: durationpb.New(3 * time.Second)}, {Id: "slow", StopTimeout: durationpb.New(10 * time.Minute)}}
		r.apply()
		left := func(n int) func() bool { return func() bool { return len(r.w.drv.ms["m-1"].rt.cs) == n } }
		r.until(time.Minute, "the quick one is gone", left(2))
		if d := time.Since(began).Round(time.Second); d != 3*time.Second {
			t.Errorf("after %s, not 3 s", d)
		}
		r.until(time.Minute, "that without word is gone", left(1))
		if d := time.Since(began).Round(time.Second); d != 30*time.Second {
			t.Errorf("after %s, not its own 30 s", d)
		}
		// The next agent goes on with what the intent said, and a longer time than the
		// one that runs changes nothing.
		r.stop()
		r.start()
		r.spec.Leaving = []*v1.LeavingContainer{{Id: "slow", StopTimeout: durationpb.New(20 * time.Minute)}}
		r.apply()
		time.Sleep(2 * time.Minute)
		if !r.peek(left(1)) {
			t.Error("the slow one got less time than it was given")
		}
		began = time.Now()
		r.spec.Leaving[0].StopTimeout = durationpb.New(0)
		r.apply()
		r.until(time.Minute, "the slow one is killed", left(0))
		if d := time.Since(began).Round(time.Second); d != 0 {
			t.Errorf("after %s, not at once", d)
		}
	})
}

// TestStopOutlivesTheAgent: an agent that was killed while it stopped a container is
// followed by one that does not know yet whether the machine runs; it must not take
// the container for ended.
func TestStopOutlivesTheAgent(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		for _, in := range []string{"m-1", ""} {
			c := r.container("c"+in, in, "stubborn")
			c.Spec.StopGracePeriod = durationpb.New(30 * time.Second)
		}
		r.apply()
		r.until(10*time.Second, "running", func() bool { return r.state("cm-1", running)() && r.state("c", running)() })
		for _, c := range r.spec.Containers {
			c.Stopped = true
		}
		r.apply()
		r.stop()
		r.start()
		r.until(time.Minute, "stopped", func() bool { return r.state("cm-1", exited)() && r.state("c", exited)() })
		if r.peek(func() bool {
			return r.w.drv.ms["m-1"].rt.cs["cm-1"].st.State != exited || r.w.rt.cs["c"].st.State != exited
		}) {
			t.Error("a container runs that is said to have ended")
		}
		if st := r.status("cm-1"); st.ExitCode != 137 || st.FinishedAt == nil {
			t.Errorf("how it ended is not known: %v", st)
		}
	})
}

func TestHold(t *testing.T) {
	rigged(t, func(r *rig) {
		c := r.container("c-1", "")
		c.Hold = true
		r.apply()
		r.until(time.Second, "created", r.state("c-1", v1.ContainerState_CONTAINER_STATE_CREATED))
		time.Sleep(time.Minute)
		if r.peek(func() bool { return r.w.rt.cs["c-1"].run != 0 }) {
			t.Error("it was started")
		}
		c.Hold = false
		r.apply()
		r.until(100*time.Millisecond, "running", r.state("c-1", running))
	})
}

func TestImageThatCanNotBePulled(t *testing.T) {
	rigged(t, func(r *rig) {
		r.container("c-1", "").Spec.Image = "other"
		c := r.container("c-2", "")
		c.Spec.Image, c.Spec.PullPolicy = "third", "never"
		r.apply()
		r.until(time.Second, "told", r.state("c-1", failed))
		if st := r.status("c-1"); st.Message != "pull image other: registry says no" {
			t.Errorf("message %q", st.Message)
		}
		time.Sleep(10 * time.Minute)
		if r.peek(func() bool { return r.w.imgs.pulls < 8 || r.w.imgs.pulls > 20 }) {
			t.Errorf("%d pulls in 10 minutes", r.w.imgs.pulls)
		}
		r.w.imgs.mu.Lock()
		img := &v1.Image{Id: "sha256:o", Config: &v1.ImageConfig{Entrypoint: []string{"sleep"}}}
		r.w.imgs.have["other"], r.w.imgs.have["third"], r.w.imgs.have["sha256:o"] = img, img, img
		r.w.imgs.mu.Unlock()
		r.a.imageChanged("load", "sha256:o", "other")
		r.until(100*time.Millisecond, "both run at once", func() bool { return r.state("c-1", running)() && r.state("c-2", running)() })
	})
}

func TestHealth(t *testing.T) {
	rigged(t, func(r *rig) {
		ok := false
		r.w.rt.probe = func() int { return map[bool]int{true: 0, false: 1}[ok] }
		c := r.container("c-1", "")
		c.Spec.Healthcheck = &v1.HealthCheck{Test: []string{"CMD-SHELL", "true"}, Interval: durationpb.New(10 * time.Second),
			StartPeriod: durationpb.New(30 * time.Second), StartInterval: durationpb.New(time.Second), Retries: 2}
		r.apply()
		health := func(h v1.Health) func() bool { return func() bool { return r.status("c-1").GetHealth() == h } }
		r.until(time.Second, "starting", health(v1.Health_HEALTH_STARTING))
		time.Sleep(20 * time.Second)
		if st := r.status("c-1"); st.Health != v1.Health_HEALTH_STARTING || st.FailingStreak != 0 {
			t.Errorf("in the start period: %v", st)
		}
		set := func(v bool) { r.w.rt.mu.Lock(); ok = v; r.w.rt.mu.Unlock() }
		set(true)
		r.until(3*time.Second, "healthy", health(v1.Health_HEALTH_HEALTHY))
		set(false)
		r.until(25*time.Second, "unhealthy", health(v1.Health_HEALTH_UNHEALTHY))
		if st := r.status("c-1"); st.FailingStreak != 2 || st.HealthOutput != "probed" {
			t.Errorf("unhealthy: %v", st)
		}
		r.stop()
		r.start() // it is not forgotten
		r.until(100*time.Millisecond, "still unhealthy", health(v1.Health_HEALTH_UNHEALTHY))
		set(true)
		r.until(15*time.Second, "healthy", health(v1.Health_HEALTH_HEALTHY))
	})
}

func TestAgentRestart(t *testing.T) {
	rigged(t, func(r *rig) {
		r.until(20*time.Second, "template", func() bool { return len(r.w.drv.templates) == 1 })
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.container("c-2", "m-1", "run", "1m", "7")
		r.container("c-3", "", "run", "1m", "8").Spec.Restart = &v1.RestartPolicy{Name: "always"}
		r.apply()
		r.until(5*time.Second, "running", func() bool {
			return r.state("c-1", running)() && r.state("c-2", running)() && r.state("c-3", running)()
		})
		starts := r.starts()
		r.stop()
		time.Sleep(2 * time.Minute) // two exit meanwhile
		r.start()
		r.until(time.Second, "seen", r.state("c-2", exited))
		if st := r.status("c-2"); st.ExitCode != 7 || time.Since(st.FinishedAt.AsTime()) < time.Minute-time.Second {
			t.Errorf("c-2: %v", st)
		}
		r.until(time.Second, "restarted by policy", r.state("c-3", running))
		if st := r.status("c-3"); st.RestartCount != 1 {
			t.Errorf("c-3: %v", st)
		}
		r.until(time.Second, "still running", r.state("c-1", running))
		if r.peek(func() bool { return r.w.drv.ms["m-1"].rt.cs["c-1"].run != 1 || len(r.w.drv.starts) != starts }) {
			t.Error("the machine or its container was disturbed")
		}
		if st := r.machineStatus("m-1"); st.State != v1.MachineState_MACHINE_STATE_RUNNING || st.StartMethod != "clone" {
			t.Errorf("machine: %v", st)
		}
	})
}

func TestMachineCrash(t *testing.T) {
	rigged(t, func(r *rig) {
		r.until(20*time.Second, "template", func() bool { return len(r.w.drv.templates) == 1 })
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.container("c-2", "m-1", "run", "1s", "0")
		r.apply()
		r.until(5*time.Second, "running and ended", func() bool { return r.state("c-1", running)() && r.state("c-2", exited)() })
		time.Sleep(2 * time.Minute)
		r.w.drv.crash("m-1")
		took := r.until(5*time.Second, "again", func() bool { return r.status("c-1").RestartCount == 1 && r.state("c-1", running)() })
		t.Logf("back after %s", took)
		if st := r.status("c-2"); st.State != exited || st.RestartCount != 0 {
			t.Errorf("what had ended stays so: %v", st)
		}
		if st := r.machineStatus("m-1"); st.Restarts != 1 || st.State != v1.MachineState_MACHINE_STATE_RUNNING {
			t.Errorf("machine: %v", st)
		}
		// again and again: slower and slower
		before := r.starts()
		for range 200 {
			r.w.drv.crash("m-1")
			time.Sleep(time.Second)
		}
		if n := r.starts() - before; n > 20 {
			t.Errorf("started %d times in 200 seconds of crashes", n)
		}
		r.until(2*time.Minute, "again", r.state("c-1", running))
	})
}

func TestGuestThatHangs(t *testing.T) {
	rigged(t, func(r *rig) {
		r.until(20*time.Second, "template", func() bool { return len(r.w.drv.templates) == 1 })
		r.machine("m-1")
		r.container("c-1", "m-1")
		r.apply()
		r.until(5*time.Second, "running", r.state("c-1", running))
		var g *fakeGuest
		r.peek(func() bool { g = r.w.drv.ms["m-1"].guest; return true })
		g.mu.Lock()
		g.hang = true
		g.mu.Unlock()
		took := r.until(2*time.Minute, "unreachable", func() bool {
			return r.machineStatus("m-1").State == v1.MachineState_MACHINE_STATE_UNREACHABLE
		})
		t.Logf("unreachable after %s", took)
		r.until(3*time.Minute, "started again", func() bool { return r.status("c-1").RestartCount == 1 && r.state("c-1", running)() })
	})
}

func TestMachineStopAndStart(t *testing.T) {
	rigged(t, func(r *rig) {
		m := r.machine("m-1")
		r.container("c-1", "m-1")
		r.apply()
		r.until(20*time.Second, "running", r.state("c-1", running))
		m.Stopped = true
		r.apply()
		r.until(time.Minute, "stopped", func() bool {
			return r.machineStatus("m-1").State == v1.MachineState_MACHINE_STATE_STOPPED
		})
		m.Stopped = false
		r.apply()
		r.until(20*time.Second, "running again", r.runs("c-1", "m-1", 2))
		if r.madeAnew("m-1") {
			t.Error("its writable layer was lost by an orderly stop")
		}
		m.RestartGeneration++
		starts := r.starts()
		r.apply()
		r.until(20*time.Second, "restarted", func() bool { return len(r.w.drv.starts) == starts+1 && r.state("c-1", running)() })
	})
}

// What containers wrote before an orderly stop is there after it, also when the next
// guests hang before they answer. A guest that did not power off left nothing whole.
func TestWritableLayersOutliveStops(t *testing.T) {
	for name, c := range map[string]struct {
		deaf     int
		stubborn bool
		lost     bool
	}{
		"the clone hangs":                {deaf: 1},
		"the clone hangs, and two boots": {deaf: 3},
		"it does not power off":          {stubborn: true, lost: true},
	} {
		t.Run(name, func(t *testing.T) {
			rigged(t, func(r *rig) {
				m := r.machine("m-1")
				r.container("c-1", "m-1")
				r.apply()
				r.until(20*time.Second, "running", r.state("c-1", running))
				r.w.drv.stubborn = c.stubborn
				m.Stopped = true
				r.apply()
				r.until(time.Minute, "stopped", func() bool {
					return r.machineStatus("m-1").State == v1.MachineState_MACHINE_STATE_STOPPED
				})
				r.w.drv.deaf, r.w.drv.stubborn = map[string]int{"m-1": c.deaf}, false
				m.Stopped = false
				r.apply()
				r.until(10*time.Minute, "running again", r.runs("c-1", "m-1", 2+c.deaf))
				if got := r.madeAnew("m-1"); got != c.lost {
					t.Errorf("its writable layer was lost: %v", got)
				}
				r.w.drv.crash("m-1")
				r.until(time.Minute, "running after a crash", r.runs("c-1", "m-1", 3+c.deaf))
				if !r.madeAnew("m-1") {
					t.Error("a scratch disk that a crash left was used on")
				}
			})
		})
	}
}

func TestIntentIsChecked(t *testing.T) {
	rigged(t, func(r *rig) {
		r.container("c-1", "")
		r.apply()
		r.until(time.Second, "running", r.state("c-1", running))
		for name, spec := range map[string]*v1.HostSpec{
			"other cluster": {ClusterId: "c2", Revision: 99},
			"no cluster":    {Revision: 99},
			"older":         {ClusterId: "c1", Revision: 0},
			"bad id":        {ClusterId: "c1", Revision: 99, Machines: []*v1.MachineAssignment{{Id: "../x"}}},
			"twice":         {ClusterId: "c1", Revision: 99, Machines: []*v1.MachineAssignment{{Id: "m"}, {Id: "m"}}},
			"no machine":    {ClusterId: "c1", Revision: 99, Containers: []*v1.ContainerAssignment{{Id: "c", MachineId: "m", Spec: &v1.ContainerSpec{}}}},
		} {
			if _, err := r.a.apply(spec); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
		time.Sleep(time.Second)
		if !r.state("c-1", running)() {
			t.Error("a refused intent did harm")
		}
		if _, err := New(r.a.o); err == nil {
			t.Error("a second agent got the state directory")
		}
	})
}
