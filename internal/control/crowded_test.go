package control

import (
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

// A host of two CPUs, one held by a machine that nothing is in any more: what
// waits for room gets it long before the machine's time is up.
func TestEmptyMachinesGiveWay(t *testing.T) {
	l := newLab(t, Options{Elasticity: Elasticity{IdleStop: time.Hour}})
	h := fakehost.New(fakehost.Options{Capacity: &v1.Size{CpuMilli: 2000, MemoryBytes: 8 << 30}})
	l.serve(h)
	big := &v1.ContainerSpec{Image: "x", Resources: &v1.Resources{CpuMilliReservation: 2000}}
	small := &v1.ContainerSpec{Image: "x", Resources: &v1.Resources{CpuMilliReservation: 500}}
	l.create(project("a")...)
	l.create(service("a", "s", 1, small))
	l.until("the small one runs", running(1))
	p, err := store.Get[*v1.Service](l.st, store.Key{Kind: store.Services, Project: "a", Name: "s"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Update(t.Context(), l.st, store.KeyOf(p), func(s *v1.Service) error { s.Replicas = 0; return nil }); err != nil {
		t.Fatal(err)
	}
	l.until("it is gone", func(s *store.Snapshot) bool { return len(s.Containers) == 0 })
	l.create(project("b")...)
	l.create(service("b", "s", 1, big))
	l.until("the big one runs", running(1))
}
