package planner

import (
	"fmt"
	"slices"
	"strings"
)

// The names of rules, as they appear in Exclusion.Rule.
const (
	RuleCPU        = "cpu"
	RuleMemory     = "memory"
	RuleIsolation  = "isolation"
	RuleProject    = "project"
	RulePorts      = "ports"
	RuleVolume     = "volume"
	RuleHost       = "host"
	RuleAnti       = "anti"
	RuleCeiling    = "ceiling"
	RuleCapability = "capability"
	RuleDown       = "down"
	RuleZone       = "zone"
	RuleNear       = "near"
	RuleFailover   = "failover"
	RuleQuota      = "quota"
	RulePool       = "pool"
)

// miss is why a candidate was turned away; the zero value means that it was not.
type miss struct {
	rule   string
	detail string // without the candidate's name
	short  Size   // what a capacity rule lacked
	// Details that most candidates have are put into words only when they are told.
	form form
	size Size
}

// form is what a detail says around a host's name or a size.
type form uint8

const (
	asItIs   form = iota
	cantGrow      // detail is the host
	tooSmall      // size is what it makes no machine of
	keeps         // size is what it keeps back
)

// appendText appends the detail in words.
func (m *miss) appendText(b []byte) []byte {
	switch m.form {
	case cantGrow:
		b = append(b, "can't grow on "...)
	case tooSmall:
		return m.size.appendTo(append(b, "makes no machine as large as "...))
	case keeps:
		return append(m.size.appendTo(append(b, "keeps "...)), " back for the loss of a host"...)
	}
	return append(b, m.detail...)
}

func (m miss) ok() bool { return m.rule == "" }

// hostRules checks all that concerns a host for a container except capacity.
func (s *State) hostRules(c *container, h *host) miss {
	if h.Down {
		return miss{rule: RuleDown, detail: "is down"}
	}
	if h.Cordoned {
		return miss{rule: RuleDown, detail: "is cordoned"}
	}
	if h.Off {
		return miss{rule: RuleDown, detail: "is switched off"}
	}
	if len(c.Zones) > 0 && !slices.Contains(c.Zones, h.Zone) {
		return miss{rule: RuleZone, detail: "is not in one of the zones asked for (" + strings.Join(c.Zones, ", ") + ")"}
	}
	if len(c.Hosts) > 0 && !slices.Contains(c.Hosts, h.ID) {
		return miss{rule: RuleHost, detail: "is not one of the hosts asked for (" + strings.Join(c.Hosts, ", ") + ")"}
	}
	for _, v := range c.Volumes {
		if at := s.volumes[v]; at != "" && at != h.ID {
			return miss{rule: RuleVolume, detail: fmt.Sprintf("has no volume %s: it is on %s", v, at)}
		}
	}
	if m := portRule(c, h); !m.ok() {
		return m
	}
	if m := s.hostAnti(c, h); !m.ok() {
		return m
	}
	if m := s.zoneRule(c, h); !m.ok() {
		return m
	}
	return s.nearRule(c, &h.all, h.Zone, "host")
}

// portRule: a port belongs to one service on a host.
func portRule(c *container, h *host) miss {
	for _, p := range c.Ports {
		if p.Port == 0 {
			continue
		}
		for _, o := range h.ports[p.key()] {
			if o == c || c.Service != "" && o.service() == c.service() {
				continue
			}
			if slices.ContainsFunc(o.Ports, p.overlaps) {
				k := p.key()
				return miss{rule: RulePorts, detail: fmt.Sprintf("port %d/%s is taken by %s", k.port, k.protocol, o.ID)}
			}
		}
	}
	return miss{}
}

// volumeRule: a volume's disk is attached to one kernel at a time, m, or that of
// the host itself when m is nil.
func (s *State) volumeRule(c *container, h *host, m *machine) miss {
	for _, v := range c.Volumes {
		for _, o := range s.users[v] {
			if o == c || o.host == h && o.machine == m {
				continue
			}
			where := "on " + o.hostID()
			if o.machine != nil {
				where = "in " + o.machineID()
			}
			return miss{rule: RuleVolume, detail: fmt.Sprintf("can't have volume %s: %s uses it %s", v, o.ID, where)}
		}
	}
	return miss{}
}

// machineRules checks whether c may run in m, after growth if need be.
func (s *State) machineRules(c *container, m *machine) miss {
	if m.Stopping {
		return miss{rule: RuleDown, detail: "is stopping"}
	}
	if groupOf(m.Isolation, m.Project) != groupOf(c.Isolation, c.Project) {
		if c.Isolation != m.Isolation {
			return miss{rule: RuleIsolation, detail: "has another isolation"}
		}
		return miss{rule: RuleProject, detail: "belongs to project " + m.Project}
	}
	if m.Isolation == Own && len(m.in.members) > 0 {
		return miss{rule: RuleIsolation, detail: "is another container's own"}
	}
	if s.indifferent(c, m.host) {
		return machineCapacity(c.need, m)
	}
	if x := s.hostRules(c, m.host); !x.ok() {
		x.detail = m.host.ID + " " + x.detail
		return x
	}
	if x := s.volumeRule(c, m.host, m); !x.ok() {
		return x
	}
	if x := antiRule(c, &m.in, "machine"); !x.ok() {
		return x
	}
	if x := s.nearRule(c, &m.in, "", "machine"); !x.ok() {
		return x
	}
	if x := s.residentRule(c, m.host); !x.ok() {
		x.detail = m.host.ID + " " + x.detail
		return x
	}
	return machineCapacity(c.need, m)
}

// machineCapacity says what m lacks for need, growth counted in.
func machineCapacity(need Size, m *machine) miss {
	short := need.shortOf(m.room())
	if short.zero() && need.fits(m.room()) {
		return miss{}
	}
	want := m.used().add(need)
	h := m.host
	if !h.Capabilities.Grow && !m.fresh && want.fits(h.top) {
		return miss{rule: RuleCapability, short: short, form: cantGrow, detail: h.ID}
	}
	if (h.Capabilities.Grow || m.fresh) && !want.fits(m.growable()) {
		return miss{rule: RuleCeiling, short: short}
	}
	return capacityMiss(short)
}

func capacityMiss(short Size) miss {
	if short.CPU > 0 {
		return miss{rule: RuleCPU, short: short}
	}
	return miss{rule: RuleMemory, short: short}
}

// bootSize is the size in which a machine for need starts on h.
func bootSize(h *host, need Size) Size {
	return h.stepUp(h.Base, h.GuestExtra.add(need))
}

// bootRules checks whether a machine for c can be booted on h.
func (s *State) bootRules(c *container, h *host) miss {
	if s.indifferent(c, h) {
		return bootCapacity(c.need, h)
	}
	if x := s.hostRules(c, h); !x.ok() {
		return x
	}
	if x := s.volumeRule(c, h, noMachine); !x.ok() {
		return x
	}
	if x := s.nearRule(c, &noMachine.in, "", "machine"); !x.ok() {
		return x
	}
	if x := s.residentRule(c, h); !x.ok() {
		return x
	}
	return bootCapacity(c.need, h)
}

// indifferent says whether only room matters between c and h.
func (s *State) indifferent(c *container, h *host) bool {
	return h.takes() && !s.matters(c, h)
}

// bootCapacity says what h lacks for a machine for need.
func bootCapacity(need Size, h *host) miss {
	size := bootSize(h, need)
	whole := size.add(h.MachineExtra)
	if !size.fits(h.top) && whole.fits(h.Capacity) {
		return miss{rule: RuleCeiling, short: size.shortOf(h.top), form: tooSmall, size: size}
	}
	if !whole.fits(h.avail()) {
		return hostMiss(whole, h)
	}
	return miss{}
}

// noMachine stands for a machine that nobody is in yet.
var noMachine = &machine{}

// metalRules checks whether c can run on h itself.
func (s *State) metalRules(c *container, h *host) miss {
	if !h.Capabilities.Metal {
		return miss{rule: RuleCapability, detail: "runs no containers outside of machines"}
	}
	if x := s.hostRules(c, h); !x.ok() {
		return x
	}
	if x := s.volumeRule(c, h, nil); !x.ok() {
		return x
	}
	if x := antiRule(c, &h.metal, "machine"); !x.ok() {
		return x
	}
	if x := s.nearRule(c, &h.metal, "", "machine"); !x.ok() {
		return x
	}
	if x := s.residentRule(c, h); !x.ok() {
		return x
	}
	if !c.need.fits(h.avail()) {
		return hostMiss(c.need, h)
	}
	return miss{}
}

// hostMiss says what h lacks for need: the room, or only the part that it keeps back.
func hostMiss(need Size, h *host) miss {
	if need.fits(h.free()) {
		short := need.shortOf(h.avail())
		return miss{rule: RuleFailover, short: short, form: keeps, size: h.reserve}
	}
	return capacityMiss(need.shortOf(h.free()))
}

// zoneRule checks rules on company in a zone, of c and of those there.
func (s *State) zoneRule(c *container, h *host) miss {
	for _, r := range c.Anti {
		if r.Layer != "zone" {
			continue
		}
		k := serviceKey{c.Project, r.Service}
		if n := s.inZone(k, h.Zone) + s.zoneShadows(k, h.Zone); n > r.Max {
			return miss{rule: RuleAnti, detail: fmt.Sprintf("is in zone %q, which runs %d of %s; at most %d may be beside it", h.Zone, n, r.Service, r.Max)}
		}
	}
	if c.Service == "" || len(s.zoneAnti) == 0 {
		return miss{}
	}
	for _, o := range s.zoneAnti[c.Project] {
		if o.host == nil || o.host.Zone != h.Zone || o == c {
			continue
		}
		for _, r := range o.Anti {
			if r.Layer != "zone" || r.Service != c.Service {
				continue
			}
			n := s.inZone(c.service(), h.Zone) + 1
			if o.Service == c.Service {
				n--
			}
			if n > r.Max {
				return miss{rule: RuleAnti, detail: fmt.Sprintf("is in the zone of %s, which allows at most %d of %s beside it", o.ID, r.Max, c.Service)}
			}
		}
	}
	return miss{}
}

// nearRule checks that company which must be near is, once any of it runs.
func (s *State) nearRule(c *container, b *box, zone, layer string) miss {
	for _, r := range c.Near {
		k := serviceKey{c.Project, r.Service}
		if len(s.services[k]) == 0 {
			continue
		}
		there := false
		switch {
		case r.Layer == layer:
			there = b.count(k) > 0
		case r.Layer == "zone" && layer == "host":
			there = s.inZone(k, zone) > 0
		default:
			continue
		}
		if !there {
			return miss{rule: RuleNear, detail: "has no " + r.Service + ", which must be near"}
		}
	}
	return miss{}
}

// inZone counts a service's containers in a zone.
func (s *State) inZone(k serviceKey, zone string) int {
	return s.zones[zoneKey{k, zone}]
}
