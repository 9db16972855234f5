package compose

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"tandem/api/policy"
	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

// extension is the key of what Compose can't say. On the project:
//
//	x-tandem: {isolation: project|shared|own|metal, class: latency|batch, ha: true, spread: zone|host|machine, pool: /teams/shop}
//
// as defaults for its services; on a service the same and
//
//	scale: {min: 1, max: 5, cpu: 70%, memory: 0.8, pressure: 10}
//	near:  {cache: machine}                                  # or [cache]: on the same host
//	apart: {db: host, crawler: {layer: machine, at_most: 2}} # or [db]: on no host with it
//
// ha: false keeps no place free for the loss of its host, where the cluster's policy
// keeps one for all others. On a volume there is
//
//	size: 10g
//
// Unknown keys are errors.
const extension = "x-tandem"

// placing is what x-tandem says of a service.
type placing struct {
	isolation v1.Isolation
	class     v1.WorkClass
	ha        bool
	spread    string
	pool      string
	scale     *v1.ScalePolicy
	company   []*v1.CompanyRule
}

var isolations = map[string]v1.Isolation{
	"project": v1.Isolation_ISOLATION_PROJECT,
	"shared":  v1.Isolation_ISOLATION_SHARED,
	"own":     v1.Isolation_ISOLATION_OWN,
	"metal":   v1.Isolation_ISOLATION_METAL,
}

var classes = map[string]v1.WorkClass{
	"latency": v1.WorkClass_WORK_CLASS_LATENCY,
	"batch":   v1.WorkClass_WORK_CLASS_BATCH,
}

// keys walks an x-tandem mapping; known handles a key or says that it does not know it.
func (c *converter) keys(a at, value any, allowed []string, known func(a at, key string, v any)) {
	if value == nil {
		return
	}
	m, ok := value.(map[string]any)
	if !ok {
		a.bad("must be a mapping with %s", strings.Join(allowed, ", "))
		return
	}
	for _, k := range sortedKeys(m) {
		if !slices.Contains(allowed, k) {
			a.in(k).bad("this key is not known; there are %s", strings.Join(allowed, ", "))
			continue
		}
		known(a.in(k), k, m[k])
	}
}

func (c *converter) projectPolicy(a at, value any) placing {
	p := placing{isolation: v1.Isolation_ISOLATION_PROJECT, class: v1.WorkClass_WORK_CLASS_LATENCY, ha: true}
	c.keys(a, value, []string{"isolation", "class", "ha", "spread", "pool"}, p.set)
	return p
}

func (c *converter) servicePolicy(a at, value any) placing {
	p := c.defaults
	c.keys(a, value, []string{"isolation", "class", "ha", "spread", "pool", "scale", "near", "apart"}, func(b at, k string, v any) {
		switch k {
		case "scale":
			p.scale = c.scale(b, v)
		case "near", "apart":
			p.company = append(p.company, c.company(b, v, k == "near")...)
		default:
			p.set(b, k, v)
		}
	})
	return p
}

func (p *placing) set(a at, key string, value any) {
	text := fmt.Sprint(value)
	var ok bool
	switch key {
	case "isolation":
		if p.isolation, ok = isolations[text]; !ok {
			a.bad("%q is not one of project, shared, own, metal", text)
		}
	case "class":
		if p.class, ok = classes[text]; !ok {
			a.bad("%q is not one of latency, batch", text)
		}
	case "ha":
		b, err := strconv.ParseBool(text)
		if err != nil {
			a.bad("%q is not true or false", text)
		}
		p.ha = b
	case "spread":
		if !slices.Contains([]string{"zone", "host", "machine"}, text) {
			a.bad("%q is not one of zone, host, machine", text)
		}
		p.spread = text
	case "pool":
		if err := policy.PoolPath(text); err != nil {
			a.bad("%q is no path of a pool; write for example /teams/shop", text)
		}
		p.pool = text
	}
}

// company reads near or apart: a list of services, or a mapping of each to how near
// counts.
func (c *converter) company(a at, value any, near bool) []*v1.CompanyRule {
	var out []*v1.CompanyRule
	rule := func(a at, service, layer string) *v1.CompanyRule {
		if !slices.Contains([]string{"machine", "host", "zone"}, layer) {
			a.bad("%q is not one of machine, host, zone", layer)
			layer = "host" // said once
		}
		r := &v1.CompanyRule{Service: service, Layer: layer, Near: near}
		out = append(out, r)
		return r
	}
	switch v := value.(type) {
	case []any:
		for _, s := range v {
			rule(a, fmt.Sprint(s), "host")
		}
	case map[string]any:
		for _, service := range sortedKeys(v) {
			b := a.in(service)
			m, ok := v[service].(map[string]any)
			if !ok {
				rule(b, service, fmt.Sprint(v[service]))
				continue
			}
			r := rule(b, service, "host")
			allowed := []string{"layer", "at_most"}
			if near {
				allowed = allowed[:1]
			}
			c.keys(b, m, allowed, func(d at, k string, v any) {
				text := fmt.Sprint(v)
				if k == "layer" {
					if r.Layer = text; !slices.Contains([]string{"machine", "host", "zone"}, text) {
						d.bad("%q is not one of machine, host, zone", text)
						r.Layer = "host"
					}
					return
				}
				n, err := strconv.ParseInt(text, 10, 32)
				if err != nil || n < 0 || n > maxReplicas {
					d.bad("%q is not a number of replicas up to %d", text, maxReplicas)
				}
				r.AtMost = int32(n)
			})
		}
	default:
		a.bad("must be a list of services, or a mapping of services to machine, host or zone")
	}
	return out
}

// checkCompany names rules on company that can't be meant. Services of profiles that
// are not active may be named.
func (c *converter) checkCompany(services []*v1.ServiceSpec) {
	wrong := policy.Company(services)
	for _, s := range services {
		a := at{c.report, "services." + s.Name + "." + extension}
		for _, what := range wrong[s.Name] {
			a.bad("%s", what)
		}
		for _, r := range s.Company {
			_, active := c.project.Services[r.Service]
			if _, disabled := c.project.DisabledServices[r.Service]; !active && !disabled {
				a.bad("near or apart names %q, which is no service of this project", r.Service)
			}
		}
	}
}

func (c *converter) scale(a at, value any) *v1.ScalePolicy {
	s := &v1.ScalePolicy{Min: 1}
	if value == nil {
		a.bad("needs at least max")
		return nil
	}
	before := len(a.problems)
	c.keys(a, value, []string{"min", "max", "cpu", "memory", "pressure"}, func(b at, k string, v any) {
		text := strings.TrimSpace(fmt.Sprint(v))
		switch k {
		case "min", "max":
			n, err := strconv.ParseInt(text, 10, 32)
			if err != nil || n < 0 || n > maxReplicas {
				b.bad("%q is not a number of replicas up to %d", text, maxReplicas)
			}
			if k == "min" {
				s.Min = int32(n)
			} else {
				s.Max = int32(n)
			}
		case "cpu":
			s.CpuTarget = fraction(b, text)
		case "memory":
			s.MemoryTarget = fraction(b, text)
		case "pressure":
			f, err := strconv.ParseFloat(strings.TrimSuffix(text, "%"), 64)
			if err != nil || !(f > 0 && f <= 100) {
				b.bad("%q is not a percentage above 0", text)
			}
			s.PressureTarget = f
		}
	})
	if len(a.problems) > before {
		return nil
	}
	return s
}

// fraction reads "70%" or 0.7, of what a container reserves.
func fraction(a at, text string) float64 {
	number, percent := strings.CutSuffix(text, "%")
	f, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if percent {
		f /= 100
	}
	if err != nil || math.IsNaN(f) || f <= 0 || f > 1 {
		a.bad("%q is not a share; write for example 70%% or 0.7", text)
		return 0
	}
	return f
}

func (c *converter) volumePolicy(a at, value any) int64 {
	var size int64
	c.keys(a, value, []string{"size"}, func(b at, _ string, v any) {
		n, err := resource.ParseMemory(fmt.Sprint(v))
		if err != nil || n < 1<<20 {
			b.bad("%q is not a size of at least 1m", fmt.Sprint(v))
		}
		size = n
	})
	return size
}
