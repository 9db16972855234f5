package control

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

func TestRecommendationIsAppliedAndUndone(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	r := &v1.Recommendation{Recommended: &v1.Size{CpuMilli: 300, MemoryBytes: 1 << 28}}
	for _, x := range []struct {
		name        string
		file        *v1.Resources
		scale       *v1.ScalePolicy
		cpu, memory int64
		differs     bool
	}{
		{name: "nothing asked for", cpu: 300, memory: 1 << 28, differs: true},
		{name: "in the place of a request", file: &v1.Resources{CpuMilliLimit: 500, CpuMilliReservation: 100}, cpu: 300, memory: 1 << 28, differs: true},
		{name: "not what it is scaled by", file: &v1.Resources{CpuMilliReservation: 100}, scale: &v1.ScalePolicy{CpuTarget: 0.5}, cpu: 100, memory: 1 << 28, differs: true},
		{name: "scaled by all", file: &v1.Resources{CpuMilliReservation: 100}, scale: &v1.ScalePolicy{CpuTarget: 0.5, MemoryTarget: 0.5}, cpu: 100},
		{name: "asked for already", file: &v1.Resources{CpuMilliReservation: 300, MemoryBytesReservation: 1 << 28}, cpu: 300, memory: 1 << 28},
	} {
		s := &v1.Service{Meta: &v1.Meta{}, Template: &v1.ContainerSpec{Resources: x.file}, Scale: x.scale}
		s.Hash = ServiceHash(s.Template)
		was := clone(s)
		if got := ApplyRecommendation(s, r, now); got != x.differs || got == proto.Equal(was, s) {
			t.Errorf("%s: %v, %v", x.name, got, s)
		}
		if q := s.Template.GetResources(); q.GetCpuMilliReservation() != x.cpu || q.GetMemoryBytesReservation() != x.memory || q.GetCpuMilliLimit() != x.file.GetCpuMilliLimit() {
			t.Errorf("%s: reserves %v", x.name, q)
		}
		if !proto.Equal(Requested(s), x.file) || s.Hash != ServiceHash(s.Template) {
			t.Errorf("%s: the file's request is %v, the hash %s", x.name, Requested(s), s.Hash)
		}
		if ApplyRecommendation(s, r, now.Add(time.Hour)) {
			t.Error(x.name, "applied twice")
		}
		if UndoRecommendation(s) != x.differs || UndoRecommendation(s) || !proto.Equal(s.Template, was.Template) || s.Hash != was.Hash || s.Applied != nil {
			t.Error(x.name, "not as it was:", s)
		}
	}
}

func TestSameRequest(t *testing.T) {
	a := &v1.Resources{CpuMilliReservation: 1, MemoryBytesReservation: 2, CpuMilliLimit: 3, MemoryBytesLimit: 4, PidsLimit: 5}
	for i, change := range []func(*v1.Resources){
		func(r *v1.Resources) { r.PidsLimit, r.CpuShares = 6, 7 }, // still the same
		func(r *v1.Resources) { r.CpuMilliReservation = 0 }, func(r *v1.Resources) { r.MemoryBytesReservation = 0 },
		func(r *v1.Resources) { r.CpuMilliLimit = 0 }, func(r *v1.Resources) { r.MemoryBytesLimit = 0 },
	} {
		b := clone(a)
		change(b)
		if SameRequest(a, b) != (i == 0) {
			t.Error(i)
		}
	}
	if !SameRequest(nil, &v1.Resources{}) {
		t.Error("nothing is nothing")
	}
}
