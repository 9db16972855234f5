package agent

import (
	"os"
	"strings"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/volume"
)

// anonymous lists the anonymous volumes that are there.
func (r *rig) anonymous() (ids []string) {
	r.peek(func() bool {
		for id := range r.w.vols.vols {
			if strings.HasPrefix(id, "anon-") {
				ids = append(ids, id)
			}
		}
		return true
	})
	return ids
}

// withAnonymous runs two containers with an anonymous volume each, in a machine and
// on metal.
func withAnonymous(t *testing.T, fn func(*rig)) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		for _, in := range []string{"m-1", ""} {
			r.container("c"+in, in).Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Target: "/data"}}
		}
		r.apply()
		r.until(10*time.Second, "running", func() bool { return r.state("cm-1", running)() && r.state("c", running)() })
		if l := r.anonymous(); len(l) != 2 {
			t.Fatal(l)
		}
		fn(r)
	})
}

// loseRecords removes what the agent wrote down of its containers.
func (r *rig) loseRecords() {
	r.t.Helper()
	if err := os.RemoveAll(r.a.state.path("containers")); err != nil {
		r.t.Fatal(err)
	}
}

// TestAnonymousVolumesOfLostContainers: the records are lost, and the containers are
// not wanted any more.
func TestAnonymousVolumesOfLostContainers(t *testing.T) {
	withAnonymous(t, func(r *rig) {
		r.stop()
		r.loseRecords()
		r.spec.Containers = nil
		r.start()
		r.apply()
		r.until(5*time.Minute, "nothing is left", func() bool {
			used := 0
			for id := range r.w.vols.used {
				if strings.HasPrefix(id, "anon-") {
					used++
				}
			}
			return used == 0 && len(r.w.rt.cs) == 0 && len(r.w.drv.ms["m-1"].rt.cs) == 0
		})
		if l := r.anonymous(); len(l) > 0 {
			t.Error("left over:", l)
		}
		if len(r.w.drv.ms["m-1"].rt.mounts) > 1 { // the layer stays for a while
			t.Error("mounted still:", r.w.drv.ms["m-1"].rt.mounts)
		}
	})
}

// TestAnonymousVolumesOfGoneMachines: what held the volume is gone too.
func TestAnonymousVolumesOfGoneMachines(t *testing.T) {
	withAnonymous(t, func(r *rig) {
		r.stop()
		r.loseRecords()
		r.spec.Containers, r.spec.Machines = nil, nil
		r.start()
		r.apply()
		r.until(5*time.Minute, "nothing is left", func() bool { r.last = r.clean(); return r.last == "" })
	})
}

// TestAnonymousVolumesOfKeptContainers: a lost record is no reason to lose data.
func TestAnonymousVolumesOfKeptContainers(t *testing.T) {
	withAnonymous(t, func(r *rig) {
		before := r.anonymous()
		removed := 0
		r.w.vols.removed = func(string) { removed++ }
		r.stop()
		r.loseRecords()
		r.start()
		r.apply()
		r.until(10*time.Minute, "running again", func() bool { return r.state("cm-1", running)() && r.state("c", running)() })
		if removed > 0 || len(r.anonymous()) != len(before) {
			t.Errorf("%d volumes removed, left %v of %v", removed, r.anonymous(), before)
		}
		r.spec.Containers, r.spec.Machines = nil, nil
		r.apply()
		r.until(5*time.Minute, "nothing is left", func() bool { r.last = r.clean(); return r.last == "" })
	})
}

// TestAnonymousVolumesOfNobody: a volume that was made before anything was written
// down goes, but not while the server can't read its records; one of an earlier
// naming, which does not tell its owner, is never guessed at.
func TestAnonymousVolumesOfNobody(t *testing.T) {
	withAnonymous(t, func(r *rig) {
		fresh, old := anonymousID("never-heard-of", "/data"), "anon-0123456789abcdef0123"
		r.peek(func() bool {
			for _, id := range []string{fresh, old} {
				r.w.vols.vols[id] = volume.Volume{ID: id, Path: "/v/" + id, SizeBytes: 1 << 20}
			}
			return true
		})
		r.spec.Incomplete = true
		r.apply()
		time.Sleep(time.Minute)
		if l := r.anonymous(); len(l) != 4 {
			t.Fatal("removed though the intent was incomplete; left:", l)
		}
		r.spec.Incomplete = false
		r.apply()
		r.until(time.Minute, "the leftover is gone", func() bool { _, there := r.w.vols.vols[fresh]; return !there })
		if l := r.anonymous(); len(l) != 3 {
			t.Error("left:", l)
		}
		r.peek(func() bool { delete(r.w.vols.vols, old); return true })
	})
}

// TestAnonymousVolumesKeepTheirNames: a container that was made by an agent with
// other names keeps its data when it is made anew.
func TestAnonymousVolumesKeepTheirNames(t *testing.T) {
	withAnonymous(t, func(r *rig) {
		r.stop()
		rec, bad, err := loadRecords[containerRecord](r.a.state, "containers")
		if err != nil || len(bad) > 0 {
			t.Fatal(bad, err)
		}
		const old = "anon-0123456789abcdef0123"
		was := rec["c"].Volumes[0].ID
		rec["c"].Volumes[0].ID = old
		if err := saveRecord(r.a.state, "containers", "c", rec["c"]); err != nil {
			t.Fatal(err)
		}
		r.peek(func() bool {
			delete(r.w.vols.vols, was)
			delete(r.w.vols.used, was)
			r.w.vols.vols[old] = volume.Volume{ID: old, Path: "/v/" + old, SizeBytes: 1 << 20}
			return true
		})
		r.start()
		r.spec.Containers[1].Generation++
		r.spec.Containers[1].Spec.Env = []string{"A=b"}
		r.apply()
		r.until(time.Minute, "made anew", func() bool { return r.status("c").GetObservedGeneration() == 2 && r.state("c", running)() })
		if r.peek(func() bool { return r.w.vols.used[old] != "metal" || len(r.w.vols.vols) != 3 }) {
			t.Error(r.w.vols.vols, r.w.vols.used)
		}
		r.spec.Containers, r.spec.Machines = nil, nil
		r.apply()
		r.until(5*time.Minute, "nothing is left", func() bool { r.last = r.clean(); return r.last == "" })
	})
}
