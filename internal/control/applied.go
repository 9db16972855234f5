package control

import (
	"cmp"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// ApplyRecommendation lets a service reserve what is recommended, until its Compose
// file asks for something else than now. What it is scaled by stays, as its use is
// measured against that. It says whether anything differs; if not, nothing is changed.
func ApplyRecommendation(s *v1.Service, r *v1.Recommendation, now time.Time) bool {
	a := &v1.AppliedRecommendation{Reserved: clone(r.GetRecommended()), Requested: clone(Requested(s)), At: stamp(now)}
	res := WithApplied(a, s.Scale)
	if proto.Equal(reservation(res), reservation(s.Template.Resources)) {
		return false
	}
	s.Applied = a
	setResources(s, res)
	return true
}

// UndoRecommendation lets a service reserve again what its Compose file asks for. It
// says whether anything was applied.
func UndoRecommendation(s *v1.Service) bool {
	if s.Applied == nil {
		return false
	}
	res := s.Applied.Requested
	s.Applied = nil
	setResources(s, res)
	return true
}

func setResources(s *v1.Service, res *v1.Resources) {
	s.Template.Resources = res
	s.Hash = ServiceHash(s.Template)
	s.Meta.Generation++
}

// Requested is what a service's Compose file asks for, whether a recommendation is
// used in its place or not.
func Requested(s *v1.Service) *v1.Resources {
	if s.GetApplied() != nil {
		return s.Applied.Requested
	}
	return s.GetTemplate().GetResources()
}

// SameRequest is whether two files ask for the same CPU and memory, and allow the same.
func SameRequest(a, b *v1.Resources) bool {
	return proto.Equal(reservation(a), reservation(b)) && a.GetCpuMilliLimit() == b.GetCpuMilliLimit() && a.GetMemoryBytesLimit() == b.GetMemoryBytesLimit()
}

func reservation(r *v1.Resources) *v1.Size {
	return &v1.Size{CpuMilli: r.GetCpuMilliReservation(), MemoryBytes: r.GetMemoryBytesReservation()}
}

// WithApplied is what the Compose file asks for, with what was applied in its place
// as far as the service is not scaled by it.
func WithApplied(a *v1.AppliedRecommendation, scale *v1.ScalePolicy) *v1.Resources {
	res := clone(cmp.Or(a.GetRequested(), &v1.Resources{}))
	if n := a.GetReserved().GetCpuMilli(); n > 0 && scale.GetCpuTarget() == 0 {
		res.CpuMilliReservation = n
	}
	if n := a.GetReserved().GetMemoryBytes(); n > 0 && scale.GetMemoryTarget() == 0 {
		res.MemoryBytesReservation = n
	}
	return res
}
