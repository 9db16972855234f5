package policy

import (
	"fmt"
	"slices"

	v1 "tandem/api/tandem/v1"
)

// MaxCompany bounds the rules on company of one service.
const MaxCompany = 32

// layers from near to far: who is in the same machine is on the same host, too.
var layers = []string{"machine", "host", "zone"}

// Company says what of the services' rules on company can't be meant, by the name of
// the service; nothing for those whose rules are fine. Rules may name services that
// are not among these: they have no containers then.
func Company(services []*v1.ServiceSpec) map[string][]string {
	by := map[string]*v1.ServiceSpec{}
	for _, s := range services {
		by[s.GetName()] = s
	}
	out := map[string][]string{}
	for _, s := range services {
		if texts := company(s, by); len(texts) > 0 {
			out[s.GetName()] = texts
		}
	}
	return out
}

func company(s *v1.ServiceSpec, by map[string]*v1.ServiceSpec) (out []string) {
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if len(s.GetCompany()) > MaxCompany {
		say("%d rules on company, at most %d", len(s.GetCompany()), MaxCompany)
		return out
	}
	for _, r := range s.GetCompany() {
		o := by[r.GetService()]
		switch {
		case !serviceName.MatchString(r.GetService()):
			say("a rule on company names %.80q, which is no name of a service", r.GetService())
			continue
		case !slices.Contains(layers, r.Layer):
			say("beside %s on %.20q: there are machine, host and zone", r.Service, r.Layer)
			continue
		case r.AtMost < 0 || r.AtMost > maxCount || r.Near && r.AtMost != 0:
			say("at most %d of %s beside it is not meant", r.AtMost, r.Service)
		}
		if !r.Near {
			continue
		}
		if r.Service == s.Name {
			say("a service is not near itself; leave that out")
		}
		if o == nil {
			continue
		}
		if r.Layer == "machine" {
			out = append(out, together(s, o)...)
		}
		for _, x := range slices.Concat(against(s, o.Name), against(o, s.Name)) {
			if x.AtMost == 0 && slices.Index(layers, x.Layer) >= slices.Index(layers, r.Layer) {
				say("it is to be near %s (%s) and apart from it (%s): that can't both be", r.Service, r.Layer, x.Layer)
			}
		}
	}
	return out
}

// together says why two services can't share a machine.
func together(a, b *v1.ServiceSpec) []string {
	x, y := a.GetTemplate().GetIsolation(), b.GetTemplate().GetIsolation()
	for _, s := range []*v1.ServiceSpec{a, b} {
		switch s.GetTemplate().GetIsolation() {
		case v1.Isolation_ISOLATION_OWN:
			return []string{fmt.Sprintf("%s and %s can't be in one machine: %s has isolation own, a machine for each container alone", a.Name, b.Name, s.Name)}
		case v1.Isolation_ISOLATION_METAL:
			return []string{fmt.Sprintf("%s and %s can't be in one machine: %s has isolation metal, and is in none", a.Name, b.Name, s.Name)}
		}
	}
	if (x == v1.Isolation_ISOLATION_SHARED) != (y == v1.Isolation_ISOLATION_SHARED) {
		return []string{fmt.Sprintf("%s and %s can't be in one machine: one of them has isolation shared, the other not", a.Name, b.Name)}
	}
	return nil
}

// against is the rules of s that keep it apart from another service.
func against(s *v1.ServiceSpec, other string) []*v1.CompanyRule {
	var out []*v1.CompanyRule
	for _, r := range s.GetCompany() {
		if !r.Near && r.Service == other {
			out = append(out, r)
		}
	}
	return out
}
