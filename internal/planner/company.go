package planner

import "fmt"

// Rules on company are among containers of one project, and concern the few hosts where
// those run: on all others nothing but room matters. So where they run is looked up once
// for a container, and the rules are asked there only. It is a matter of cache misses:
// asking them reads the records of machine, host and neighbours, and most candidates need
// none of these.

// company is where rules matter to a container.
type company struct {
	c       *container
	demands *demands
	epoch   uint64
	reach   reach
	on      []map[*host]int // where the services run that its rules speak of, by number of the rule
	wary    map[*host]int   // where those of its project run that bring rules of their own
}

// reach is where rules may matter to a container.
type reach uint8

const (
	nowhere   reach = iota // it brings no rules, and nobody brings any against it
	somewhere              // see matters
	anywhere               // it brings rules that are not on company, or there are some about zones
)

// companyOf is c's company, the one of before while nobody has come or gone since.
func (s *State) companyOf(c *container) *company {
	x := &s.company
	if x.c == c && x.demands == c.demands && x.epoch == s.epoch {
		return x
	}
	x.c, x.demands, x.epoch, x.on = c, c.demands, s.epoch, x.on[:0]
	x.wary = s.wary[c.Project]
	near := len(x.wary) > 0
	for _, r := range c.Anti {
		on := s.services[serviceKey{c.Project, r.Service}]
		x.on, near = append(x.on, on), near || len(on) > 0
	}
	switch {
	case c.particular() || c.zoned() || len(s.zoneAnti[c.Project]) > 0:
		x.reach = anywhere
	case near:
		x.reach = somewhere
	default:
		x.reach = nowhere
	}
	return x
}

// particular says whether c brings rules on where it goes that are not on company.
func (c *container) particular() bool {
	return !c.plain && len(c.Ports)+len(c.Volumes)+len(c.Hosts)+len(c.Zones)+len(c.Near) > 0
}

// matters says whether rules may matter between c and h.
func (s *State) matters(c *container, h *host) bool {
	x := s.companyOf(c)
	if x.reach != somewhere {
		return x.reach == anywhere
	}
	for _, on := range x.on {
		if on[h] > 0 {
			return true
		}
	}
	// Others may come to h after a loss, if hosts have claims on it.
	return x.wary[h] > 0 || len(s.standing) > 0 && len(h.claims) > 0
}

// easy says whether only room matters to c, wherever it goes.
func (s *State) easy(c *container) bool {
	if c.plain { // many are asked, and this is what they are
		return len(s.wary) == 0 || len(s.wary[c.Project]) == 0
	}
	return s.companyOf(c).reach == nowhere
}

// hostAnti checks the company rules of c and of those already on h.
func (s *State) hostAnti(c *container, h *host) miss {
	if len(c.Anti) > 0 {
		on := s.companyOf(c).on
		for i, r := range c.Anti {
			if r.Layer == "host" && on[i][h] > r.Max {
				return tooMany(r)
			}
		}
	}
	return allowed(c, &h.all, "host")
}

// antiRule checks the company rules of c and of those already in b.
func antiRule(c *container, b *box, layer string) miss {
	for _, r := range c.Anti {
		if r.Layer == layer && b.count(serviceKey{c.Project, r.Service}) > r.Max {
			return tooMany(r)
		}
	}
	return allowed(c, b, layer)
}

func tooMany(r AntiRule) miss {
	if r.Max == 0 {
		return miss{rule: RuleAnti, detail: "runs " + r.Service + ", which must not be beside it"}
	}
	return miss{rule: RuleAnti, detail: fmt.Sprintf("runs %s, of which at most %d may be beside it", r.Service, r.Max)}
}

// allowed checks the company rules of those in b for c.
func allowed(c *container, b *box, layer string) miss {
	if c.Service == "" {
		return miss{}
	}
	for _, o := range b.anti {
		if o.Project != c.Project || o == c {
			continue
		}
		for _, r := range o.Anti {
			if r.Layer != layer || r.Service != c.Service {
				continue
			}
			beside := b.count(c.service())
			if o.Service == c.Service {
				beside-- // o is not beside itself
			}
			if beside+1 > r.Max {
				return miss{rule: RuleAnti, detail: fmt.Sprintf("%s there allows at most %d of %s beside it", o.ID, r.Max, c.Service)}
			}
		}
	}
	return miss{}
}
