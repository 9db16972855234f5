package agent

import (
	"context"
	"slices"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
)

// full is what a server that connects now is told first.
func (r *rig) full() *v1.HostStatus {
	r.t.Helper()
	w := r.a.hub.watch()
	defer w.leave()
	st, err := w.next(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	return st
}

func TestVolumeIsKeptUntilItIsNamed(t *testing.T) {
	rigged(t, func(r *rig) {
		r.spec.Volumes = []*v1.VolumeAssignment{{Id: "v-1", Name: "data", SizeBytes: 1 << 30}, {Id: "v-2", Name: "used", SizeBytes: 1 << 30}}
		c := r.container("c-1", "")
		c.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Source: "used", Target: "/data"}}
		c.Volumes = []*v1.AssignedMount{{Target: "/data", VolumeId: "v-2"}}
		r.apply()
		r.until(time.Second, "running", r.state("c-1", running))

		r.spec.Volumes = nil
		r.apply()
		time.Sleep(10 * time.Minute)
		r.stop()
		r.start()
		time.Sleep(10 * time.Minute)
		if r.peek(func() bool { return len(r.w.vols.vols) != 2 }) {
			t.Fatalf("a volume went because nobody spoke of it: %v", r.w.vols.vols)
		}
		if st := r.full(); len(st.RemovedVolumes) > 0 {
			t.Fatalf("said to be removed: %v", st.RemovedVolumes)
		}

		// v-2 is in use: it goes with its container, and is spoken of until then.
		r.spec.DeletedVolumes = []string{"v-1", "v-2", "v-never-made"}
		r.apply()
		r.until(time.Minute, "the unused one is gone", func() bool { return len(r.w.vols.vols) == 1 })
		st := r.full()
		if !slices.Equal(st.RemovedVolumes, []string{"v-1", "v-never-made"}) || len(st.Volumes) != 1 || st.Volumes[0].Id != "v-2" || st.Volumes[0].Ready {
			t.Fatalf("told: %v", st)
		}
		r.spec.Containers = nil
		r.apply()
		r.until(time.Minute, "both are gone", func() bool { return r.clean() == "" })

		// An agent that is new says again what a server may have missed.
		r.stop()
		r.start()
		r.until(time.Minute, "told again", func() bool { return len(r.a.hub.deleted) == 3 })
		r.spec.DeletedVolumes = nil
		r.apply()
		if st := r.full(); len(st.RemovedVolumes)+len(st.Volumes) != 0 {
			t.Fatalf("still told: %v", st)
		}
	})
}

func TestIncompleteIntentRemovesNothing(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		r.machine("m-2").Mac = "02:00:00:00:00:02"
		r.container("c-1", "m-1").Ip = "10.64.0.2"
		r.container("c-2", "m-2").Ip = "10.64.0.17"
		r.container("c-3", "")
		r.spec.Volumes = []*v1.VolumeAssignment{{Id: "v-1", Name: "data", SizeBytes: 1 << 30}}
		backend := func(id, ip string) *v1.Backend { return &v1.Backend{ContainerId: id, Ip: ip, Port: 80, Ready: true} }
		r.spec.Ports = []*v1.PublishedPort{{Protocol: "tcp", HostPort: 80, Backends: []*v1.Backend{backend("c-1", "10.64.0.2"), backend("c-2", "10.64.0.17")}}}
		r.spec.Names = []*v1.NameRecord{{Network: "n", Name: "web", Ips: []string{"10.64.0.2", "10.64.0.17"}}}
		r.apply()
		all := func() bool {
			return r.state("c-1", running)() && r.state("c-2", running)() && r.state("c-3", running)()
		}
		r.until(time.Minute, "running", all)
		whole := cloneSpec(r.spec)

		// The server can't read m-2, c-3 and v-1; c-2 has no machine that it knows of.
		r.spec.Incomplete = true
		r.spec.Machines, r.spec.Containers, r.spec.Volumes = r.spec.Machines[:1], r.spec.Containers[:1], nil
		r.spec.Ports[0].Backends = r.spec.Ports[0].Backends[:1]
		r.spec.Names[0].Ips = r.spec.Names[0].Ips[:1]
		r.apply()
		check := func() {
			t.Helper()
			if !r.peek(all) || r.peek(func() bool { return len(r.w.drv.ms) != 2 || r.w.vols.vols["v-1"].ID == "" }) {
				t.Fatal("something went")
			}
			if s := r.a.networkState(); len(s.Machines) != 2 || len(s.Ports) != 1 || len(s.Ports[0].Backends) != 2 || len(s.Names[0].Ips) != 2 {
				t.Fatalf("the network forgot: %v", s)
			}
		}
		time.Sleep(10 * time.Minute)
		check()

		// Also not by an agent that is new, nor by a further incomplete intent.
		r.stop()
		r.start()
		r.until(time.Minute, "still there", all)
		r.apply()
		time.Sleep(10 * time.Minute)
		check()

		// Nor by one that has lost what was wanted before.
		r.stop()
		if err := r.a.state.remove("spec.pb"); err != nil {
			t.Fatal(err)
		}
		r.start()
		r.apply()
		time.Sleep(10 * time.Minute)
		if r.peek(func() bool {
			return len(r.w.drv.ms) != 2 || len(r.w.rt.cs) != 1 || r.w.drv.ms["m-2"].rt.cs["c-2"] == nil
		}) {
			t.Fatal("something went without memory")
		}

		rev := r.spec.Revision
		r.spec = whole
		r.spec.Revision = rev
		r.apply()
		r.until(time.Minute, "as before", all)
		r.spec.Machines, r.spec.Containers, r.spec.Volumes = nil, nil, nil
		r.spec.DeletedVolumes = []string{"v-1"}
		r.apply()
		r.until(time.Minute, "a complete one removes", func() bool { return r.clean() == "" })
	})
}
