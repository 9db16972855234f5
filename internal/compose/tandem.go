package compose

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

// extension is the key of what Compose can't say. On the project:
//
//	x-tandem: {isolation: project|shared|own|metal, class: latency|batch, ha: true, spread: zone|host|machine}
//
// as defaults for its services; on a service the same and
//
//	scale: {min: 1, max: 5, cpu: 70%, memory: 0.8, pressure: 10}
//
// and on a volume
//
//	size: 10g
//
// Unknown keys are errors.
const extension = "x-tandem"

// policy is what x-tandem says of a service.
type policy struct {
	isolation v1.Isolation
	class     v1.WorkClass
	ha        bool
	spread    string
	scale     *v1.ScalePolicy
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

func (c *converter) projectPolicy(a at, value any) policy {
	p := policy{isolation: v1.Isolation_ISOLATION_PROJECT, class: v1.WorkClass_WORK_CLASS_LATENCY}
	c.keys(a, value, []string{"isolation", "class", "ha", "spread"}, p.set)
	return p
}

func (c *converter) servicePolicy(a at, value any) policy {
	p := c.defaults
	c.keys(a, value, []string{"isolation", "class", "ha", "spread", "scale"}, func(b at, k string, v any) {
		if k == "scale" {
			p.scale = c.scale(b, v)
			return
		}
		p.set(b, k, v)
	})
	return p
}

func (p *policy) set(a at, key string, value any) {
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
