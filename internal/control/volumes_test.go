package control

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

func TestHostSpecNamesDeletedVolumes(t *testing.T) {
	snap := &store.Snapshot{Volumes: []*v1.Volume{
		{Meta: &v1.Meta{Id: "v-1", Name: "a", Project: "p"}, HostId: "h"},
		{Meta: &v1.Meta{Id: "v-2", Name: "b", Project: "p", Deleting: true}, HostId: "h"},
		{Meta: &v1.Meta{Id: "v-3", Name: "c", Project: "p", Deleting: true}, HostId: "other"},
	}}
	s := hostSpec(snap, "h", "c")
	if len(s.Volumes) != 1 || s.Volumes[0].Id != "v-1" || !slices.Equal(s.DeletedVolumes, []string{"v-2"}) || s.Incomplete {
		t.Fatal(s)
	}
	for kind, want := range map[store.Kind]bool{store.Machines: true, store.Containers: true, store.Volumes: true, store.Networks: true, store.Services: false, store.Hosts: false} {
		snap.Corrupt = []store.Key{{Kind: kind, Project: "p", Name: "x"}}
		if s := hostSpec(snap, "h", "c"); s.Incomplete != want {
			t.Errorf("unreadable %s: incomplete is %v", kind, s.Incomplete)
		}
	}
}

// TestVolumeRecordStaysUntilItsDataIsGone: also over a break of the connection, and
// for a volume that was never made.
func TestVolumeRecordStaysUntilItsDataIsGone(t *testing.T) {
	l := newLab(t, Options{})
	h := fakehost.New(fakehost.Options{})
	stop := l.serve(h)
	l.until("the host", func(s *store.Snapshot) bool { return len(s.Hosts) == 1 })
	l.create(project("p")...)
	vol := func(id string) *v1.Volume {
		return &v1.Volume{Meta: &v1.Meta{Id: id, Name: id, Project: "p"}, HostId: h.ID()}
	}
	l.create(vol("v-1"), vol("v-2"))
	l.until("made", func(s *store.Snapshot) bool {
		return len(s.Volumes) == 2 && s.Volumes[0].GetStatus().GetReady() && s.Volumes[1].GetStatus().GetReady()
	})
	stop()
	for _, n := range []string{"v-1", "v-3"} {
		if n == "v-3" {
			l.create(vol(n)) // the host never hears of it while it is wanted
		}
		if _, err := store.Update(t.Context(), l.st, store.Key{Kind: store.Volumes, Project: "p", Name: n}, func(v *v1.Volume) error { v.Meta.Deleting = true; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	l.ctl.poke("collect")
	if _, err := l.ctl.collect(t.Context()); err != nil && !errdefs.IsConflict(err) {
		t.Fatal(err)
	}
	if s := l.st.Snapshot(); len(s.Volumes) != 3 {
		t.Fatal("a record went though nobody said that its data is gone", s.Volumes)
	}
	l.serve(h)
	l.until("both records are gone", func(s *store.Snapshot) bool { return len(s.Volumes) == 1 && s.Volumes[0].Meta.Name == "v-2" })
}

// TestUnreadableOwnerRemovesNothing: a project or service that can't be read is no
// reason to remove its containers, or to make one whose place is taken.
func TestUnreadableOwnerRemovesNothing(t *testing.T) {
	l := newLab(t, Options{})
	x := &v1.Container{Meta: &v1.Meta{Project: "p", Name: "p-web-1", Id: "c-1"}, Service: "web"}
	s := service("p", "web", 2, &v1.ContainerSpec{Image: "x"})
	for _, bad := range []store.Key{{Kind: store.Projects, Name: "p"}, {Kind: store.Services, Project: "p", Name: "web"}} {
		d := &deployment{c: l.ctl, snap: &store.Snapshot{Corrupt: []store.Key{bad}}, tx: l.st.Txn()}
		d.projects, d.services = map[string]*v1.Project{}, map[svcKey]*v1.Service{}
		if bad.Kind == store.Projects {
			d.services[svcKey{"p", "web"}] = s
			if d.goes(s) {
				t.Error("the service goes")
			}
		} else {
			d.projects["p"] = &v1.Project{Meta: &v1.Meta{Name: "p"}}
		}
		d.single(x)
		if len(d.marked) != 0 {
			t.Errorf("%s: the container goes", bad)
		}
		d.snap = &store.Snapshot{}
		d.single(x)
		if len(d.marked) != 1 {
			t.Errorf("without %s the container goes", bad)
		}
	}
}
