package agent

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	v1 "tandem/api/tandem/v1"
)

// TestKilledAtAnyInstruction changes the intent at random, kills agents in the
// middle of any call (before or after its effect), crashes machines, and lets
// containers exit; the world must become what was asked for, and nothing else.
func TestKilledAtAnyInstruction(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		// Drawn before the bubble is entered: rapid can't follow it inside.
		plan := rapid.SliceOfN(rapid.Custom(drawStep), 3, 12).Draw(rt, "plan")
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t)
			r.plan = plan
			for i, s := range plan {
				r.change(i, s)
				if s.Kill {
					r.arm(s.Calls, s.After)
				}
				r.tryApply()
				time.Sleep(time.Duration(s.Millis) * time.Millisecond)
				synctest.Wait()
				r.revive()
			}
			r.arm(0, false)
			r.tryApply()
			r.until(10*time.Minute, "converged", func() bool { return r.wrong() == "" })
			r.spec.Machines, r.spec.Containers, r.spec.Volumes = nil, nil, nil
			r.tryApply()
			r.until(10*time.Minute, "nothing left", func() bool { r.last = r.clean(); return r.last == "" })
			r.stop()
			for _, m := range r.w.drv.ms {
				if m.guest != nil {
					m.guest.die()
				}
			}
		})
	})
}

// step is one change, and what happens meanwhile.
type step struct {
	Pick, Which     int
	Kill, After     bool
	Calls, Millis   int
	Ends, Anonymous bool
	Policy, Code    string
}

func drawStep(rt *rapid.T) step {
	return step{
		Pick: rapid.IntRange(0, 9).Draw(rt, "pick"), Which: rapid.IntRange(0, 100).Draw(rt, "which"),
		Kill: rapid.Bool().Draw(rt, "kill"), After: rapid.Bool().Draw(rt, "after"),
		Calls: rapid.IntRange(1, 40).Draw(rt, "calls"), Millis: rapid.IntRange(0, 9000).Draw(rt, "ms"),
		Ends: rapid.Bool().Draw(rt, "ends"), Anonymous: rapid.Bool().Draw(rt, "anonymous"),
		Policy: rapid.SampledFrom([]string{"no", "always", "on-failure"}).Draw(rt, "policy"),
		Code:   rapid.SampledFrom([]string{"0", "1"}).Draw(rt, "code"),
	}
}

// change makes one random change of intent or of the world.
func (r *rig) change(i int, s step) {
	pick := s.Pick
	some := func(n int) int { return s.Which % n }
	switch nm, nc := len(r.spec.Machines), len(r.spec.Containers); {
	case pick == 0 || nm == 0:
		r.machine(fmt.Sprintf("m-%d", i)).Mac = fmt.Sprintf("02:00:00:00:00:%02x", i)
	case pick <= 3:
		in := ""
		if k := some(nm + 1); k < nm {
			in = r.spec.Machines[k].Id
		}
		c := r.container(fmt.Sprintf("c-%d", i), in)
		c.Spec.Restart = &v1.RestartPolicy{Name: s.Policy}
		if s.Ends {
			c.Spec.Command = &v1.StringList{Values: []string{"run", "2s", s.Code}}
		}
		if s.Anonymous {
			c.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Target: "/x"}}
		}
	case pick == 4 && nc > 0:
		k := some(nc)
		r.spec.Containers = append(r.spec.Containers[:k:k], r.spec.Containers[k+1:]...)
	case pick == 5:
		k := some(nm)
		var rest []*v1.ContainerAssignment
		for _, c := range r.spec.Containers {
			if c.MachineId != r.spec.Machines[k].Id {
				rest = append(rest, c)
			}
		}
		r.spec.Containers = rest
		r.spec.Machines = append(r.spec.Machines[:k:k], r.spec.Machines[k+1:]...)
	case pick == 6 && nc > 0:
		c := r.spec.Containers[some(nc)]
		c.Stopped = !c.Stopped
	case pick == 7 && nc > 0:
		c := r.spec.Containers[some(nc)]
		c.Generation++
		c.Spec.Env = append(c.Spec.Env, fmt.Sprintf("V%d=1", i))
	case pick == 8:
		r.w.drv.crash(r.spec.Machines[some(nm)].Id)
	case nc > 0:
		r.spec.Containers[some(nc)].RestartGeneration++
	}
}

// wrong names what is not as asked for, or "".
func (r *rig) wrong() (why string) {
	defer func() { r.last = why }()
	d := r.w.drv
	wantIn := map[string]map[string]bool{"": {}}
	for id, m := range d.ms {
		if templateMachine(id) {
			continue
		}
		wantIn[id] = map[string]bool{}
		if m.st.State != "running" {
			return id + " does not run"
		}
	}
	for _, m := range r.spec.Machines {
		if wantIn[m.Id] == nil {
			return m.Id + " is missing"
		}
	}
	for _, c := range r.spec.Containers {
		wantIn[c.MachineId][c.Id] = true
		cs := r.w.rt.cs
		if c.MachineId != "" {
			cs = d.ms[c.MachineId].rt.cs
		}
		f := cs[c.Id]
		runs := f != nil && f.st.State == running
		forEver := c.Spec.Command == nil
		switch {
		case c.Stopped && runs:
			return c.Id + " runs"
		case !c.Stopped && forEver && !runs:
			return c.Id + " does not run"
		}
		st := r.status(c.Id)
		switch {
		case st == nil:
			return c.Id + " has no status"
		case forEver && runs != (st.State == running):
			return fmt.Sprintf("%s runs: %v, its status is %v", c.Id, runs, st)
		case runs && fmt.Sprint(f.spec.Env[len(f.spec.Env)-len(c.Spec.Env):]) != fmt.Sprint(c.Spec.Env):
			return fmt.Sprintf("%s has %v instead of %v", c.Id, f.spec.Env, c.Spec.Env)
		case !c.Stopped && !forEver && c.Spec.Restart.Name == "no" && st.State != exited:
			return fmt.Sprintf("%s should have ended: %v", c.Id, st)
		}
	}
	for k, in := range wantIn {
		cs := r.w.rt.cs
		if k != "" {
			cs = d.ms[k].rt.cs
			found := false
			for _, m := range r.spec.Machines {
				found = found || m.Id == k
			}
			if !found {
				return k + " is there still"
			}
		}
		for id := range cs {
			if !in[id] {
				return id + " is in " + k + " still"
			}
		}
	}
	return ""
}

func (r *rig) arm(calls int, after bool) {
	w := r.w
	w.gmu.Lock()
	defer w.gmu.Unlock()
	w.killIn, w.after = calls, after
	w.killed = func() {
		// What is on disk at this instant is what the next agent finds.
		r.next = filepath.Join(r.t.TempDir(), "state")
		filepath.WalkDir(r.dir, func(path string, e fs.DirEntry, err error) error {
			to := filepath.Join(r.next, strings.TrimPrefix(path, r.dir))
			if e != nil && e.IsDir() {
				return os.MkdirAll(to, 0o700)
			}
			if b, err := os.ReadFile(path); err == nil { // a temporary file may vanish
				return os.WriteFile(to, b, 0o600)
			}
			return nil
		})
	}
}

// revive starts an agent after the last one was killed.
func (r *rig) revive() {
	r.w.gmu.Lock()
	dead := r.next != ""
	r.w.killIn = 0
	r.w.gmu.Unlock()
	if !dead {
		return
	}
	r.stop()
	r.dir, r.next = r.next, ""
	r.start()
	r.tryApply()
}

// tryApply gives the intent to the agent, which may be dead by now.
func (r *rig) tryApply() {
	r.spec.Revision++
	spec := cloneSpec(r.spec)
	if _, err := r.a.apply(spec); err != nil {
		r.t.Logf("apply: %v", err)
	}
	synctest.Wait()
}
