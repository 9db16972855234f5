// Package scaling says which scale policies of services are possible, for the Compose
// files' reader and for the server alike.
//
//	for _, what := range scaling.Check(service) {
//		fmt.Println(service.Name + ": " + what)
//	}
package scaling

import (
	"cmp"
	"fmt"

	v1 "tandem/api/tandem/v1"
)

// MaxReplicas is the most that a policy may allow.
const MaxReplicas = 10000

// Check tells, in words, all that is wrong with a service's policy; nothing for a
// service without one.
func Check(s *v1.ServiceSpec) []string {
	p := s.GetScale()
	if p == nil {
		return nil
	}
	var out []string
	bad := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	switch {
	case p.Max < 1:
		bad("max is missing: name the most replicas there may be")
	case p.Min < 1:
		bad("min (%d) must be at least 1: of a service without containers nothing can be measured", p.Min)
	case p.Max < p.Min:
		bad("max (%d) is below min (%d)", p.Max, p.Min)
	case p.Max > MaxReplicas:
		bad("max (%d) is more than %d", p.Max, MaxReplicas)
	case s.Replicas < p.Min || s.Replicas > p.Max:
		bad("replicas (%d) must lie between min (%d) and max (%d)", s.Replicas, p.Min, p.Max)
	}
	share := func(name string, f float64) {
		if !(f >= 0 && f <= 1) { // NaN is neither
			bad("%s (%g) must be a share of what is reserved: above 0, at most 1", name, f)
		}
	}
	share("cpu", p.CpuTarget)
	share("memory", p.MemoryTarget)
	if !(p.PressureTarget >= 0 && p.PressureTarget <= 100) {
		bad("pressure (%g) must be a percentage above 0", p.PressureTarget)
	}
	if p.CpuTarget == 0 && p.MemoryTarget == 0 && p.PressureTarget == 0 {
		bad("name at least one target: cpu, memory or pressure")
	}
	r := s.GetTemplate().GetResources()
	if p.CpuTarget > 0 && cmp.Or(r.GetCpuMilliReservation(), r.GetCpuMilliLimit()) == 0 {
		bad("cpu is a share of what a container reserves, and it reserves none: set deploy.resources.reservations.cpus")
	}
	if p.MemoryTarget > 0 && cmp.Or(r.GetMemoryBytesReservation(), r.GetMemoryBytesLimit()) == 0 {
		bad("memory is a share of what a container reserves, and it reserves none: set deploy.resources.reservations.memory")
	}
	if s.ContainerName != "" && p.Max > 1 {
		bad("container_name %s goes with one container: take it away", s.ContainerName)
	}
	return out
}
