package scaling

import (
	"math"
	"strings"
	"testing"

	v1 "tandem/api/tandem/v1"
)

func TestCheck(t *testing.T) {
	good := func() *v1.ServiceSpec {
		return &v1.ServiceSpec{Replicas: 2, Scale: &v1.ScalePolicy{Min: 1, Max: 5, CpuTarget: 0.7, MemoryTarget: 1, PressureTarget: 10},
			Template: &v1.ContainerSpec{Resources: &v1.Resources{CpuMilliReservation: 500, MemoryBytesLimit: 1 << 20}}}
	}
	if p := append(Check(good()), Check(&v1.ServiceSpec{})...); p != nil {
		t.Error(p)
	}
	for want, spoil := range map[string]func(*v1.ServiceSpec){
		"name the most":                    func(s *v1.ServiceSpec) { s.Scale.Max = 0 },
		"at least 1":                       func(s *v1.ServiceSpec) { s.Scale.Min = 0 },
		"is below min":                     func(s *v1.ServiceSpec) { s.Scale.Min = 6 },
		"more than 10000":                  func(s *v1.ServiceSpec) { s.Scale.Max = 10001 },
		"must lie between":                 func(s *v1.ServiceSpec) { s.Replicas = 6 },
		"cpu (NaN)":                        func(s *v1.ServiceSpec) { s.Scale.CpuTarget = math.NaN() },
		"memory (1.5)":                     func(s *v1.ServiceSpec) { s.Scale.MemoryTarget = 1.5 },
		"pressure (101)":                   func(s *v1.ServiceSpec) { s.Scale.PressureTarget = 101 },
		"at least one target":              func(s *v1.ServiceSpec) { s.Scale = &v1.ScalePolicy{Min: 1, Max: 2} },
		"resources.reservations.cpus":      func(s *v1.ServiceSpec) { s.Template.Resources.CpuMilliReservation = 0 },
		"resources.reservations.memory":    func(s *v1.ServiceSpec) { s.Template.Resources.MemoryBytesLimit = 0 },
		"container_name x goes with one c": func(s *v1.ServiceSpec) { s.ContainerName = "x" },
	} {
		s := good()
		spoil(s)
		if p := Check(s); len(p) != 1 || !strings.Contains(p[0], want) {
			t.Errorf("%s: %q", want, p)
		}
	}
}
