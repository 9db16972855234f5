package planner

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// State is what the planner knows, indexed for quick decisions. Make one with New.
type State struct {
	rev        uint64
	hosts      map[string]*host
	machines   map[string]*machine
	containers map[string]*container
	volumes    map[string]string            // id -> host
	users      map[string][]*container      // volume -> placed containers that mount it
	services   map[serviceKey]map[*host]int // where replicas are
	wary       map[string]map[*host]int     // where containers with rules on company are, by project
	groups     map[groupKey]*group
	open       buckets[*host]      // hosts that take something new, by free capacity
	perKind    [4]int              // machines by isolation
	off        []*host             // switched off, by id
	standing   []*host             // with claims on them, by id
	exposed    ordered[*container] // covered, and without all their standby hosts
	coveredTo  string              // id of the host that Cover tried last
	breakers   []*host             // with broken claims on them, by id
	policy     Policy
	pools      map[string]*pool
	quotas     map[string]*quota
	zones      map[zoneKey]int         // a service's containers in a zone
	zoneAnti   map[string][]*container // placed, with rules about zones, by project and id
	total      Size                    // capacity of the hosts that take something new
	taken      Size                    // of it, what is used
	busy       Size                    // of it, what containers and overheads use
	names      map[string]string       // one copy of each project's and service's name: equal ones compare at once
	epoch      uint64                  // of who is where
	company    company
	tried      []tried

	// Memory that decisions use again, when nobody does.
	idle   *decision
	finder *finder
	spare  journal
	text   []byte
}

type host struct {
	// What a search looks at comes first, together: it looks at many.
	busy         Size // containers' requests and all overheads
	machinesSize Size // sum of machines' sizes
	metalSize    Size // sum of metal containers' requests
	reserve      Size // kept back for claims
	top          Size // the most that a machine booted here may become
	Host
	begins     order
	machines   []*machine // by id
	all, metal box
	ports      map[portKey][]*container
	key        uint32
	indexed    bool
	counted    Size           // its share of State.total
	spent      Size           // its share of State.taken
	worked     Size           // its share of State.busy
	claims     []claim        // what would come here from where
	tops       tops           // the largest of those that are not broken
	broken     ordered[*host] // whose claims are not kept any more
	grants     []grant        // where its own would go, by id
	batch      int            // batch containers
	shadows    []*container   // standing by here with rules of their own, by id
}

type machine struct {
	// What a search looks at comes first, together: it looks at many.
	host    *host
	group   *group
	slot    Size // free(), while indexed
	reach   Size // room(), while indexed
	fresh   bool // booted by the plan being made
	indexed bool
	sum     Size // of its containers' requests
	in      box
	Machine
	begins           order
	parts            []part
	overhead         Size // its part of the host's busy
	freeKey, roomKey uint32
}

func (h *host) id() string               { return h.ID }
func (m *machine) id() string            { return m.ID }
func (c *container) id() string          { return c.ID }
func (h *host) space() Size              { return Size{} } // it changes
func (m *machine) space() Size           { return m.slot }
func (c *container) space() Size         { return c.need }
func (h *host) order() order             { return h.begins }
func (m *machine) order() order          { return m.begins }
func (c *container) order() order        { return orderOf(c.ID) }
func (c *container) service() serviceKey { return serviceKey{c.Project, c.Service} }

func (h *host) takes() bool { return !h.Down && !h.Cordoned && !h.Off }
func (h *host) used() Size {
	return h.machinesSize.add(h.MachineExtra.times(int64(len(h.machines)))).add(h.metalSize)
}

// idle is what neither a container nor an overhead uses, free slots in machines
// counted in.
func (h *host) idle() Size { return h.Capacity.sub(h.busy) }

// free is what nothing runs in; avail is what of it is not kept back either.
func (h *host) free() Size  { return h.Capacity.sub(h.used()) }
func (h *host) avail() Size { return h.free().sub(h.reserve) }

func (m *machine) used() Size  { return m.host.GuestExtra.add(m.sum) }
func (m *machine) free() Size  { return m.Size.sub(m.used()) }
func (m *machine) takes() bool { return !m.Stopping && m.host.takes() }

// growable is the most it may become on a host with unlimited capacity.
func (m *machine) growable() Size {
	if !m.host.Capabilities.Grow && !m.fresh {
		return m.Size
	}
	return m.host.stepDown(m.Size, m.Ceiling)
}

// room is what could be free in it after growing as far as its ceiling and its
// host allow.
func (m *machine) room() Size {
	top := m.growable()
	if top != m.Size {
		top = m.host.stepDown(m.Size, top.min(m.Size.add(m.host.avail().positive())))
	}
	return top.sub(m.used())
}

// New returns an empty state.
func New() *State {
	return &State{
		hosts:      map[string]*host{},
		machines:   map[string]*machine{},
		containers: map[string]*container{},
		volumes:    map[string]string{},
		users:      map[string][]*container{},
		services:   map[serviceKey]map[*host]int{},
		wary:       map[string]map[*host]int{},
		groups:     map[groupKey]*group{},
		zones:      map[zoneKey]int{},
		zoneAnti:   map[string][]*container{},
		names:      map[string]string{},
		pools:      map[string]*pool{},
		quotas:     map[string]*quota{},
	}
}

// Revision counts the changes since New.
func (s *State) Revision() uint64 { return s.rev }

// SetHost inserts or replaces a host; its machines and containers stay. Refused
// are an empty id and sizes that are negative or absurd.
func (s *State) SetHost(h Host) error {
	if h.ID == "" {
		return errors.New("host without an id")
	}
	for _, z := range []Size{h.Capacity, h.MachineExtra, h.GuestExtra, h.Base, h.Capabilities.MaxMachine,
		{h.Capabilities.CPUStep, h.Capabilities.MemoryStep}} {
		if !z.valid() {
			return fmt.Errorf("host %s: size of %d millicores and %d bytes is out of range", h.ID, z.CPU, z.Memory)
		}
	}
	if !finite(h.Capabilities.BootSeconds) || !finite(h.Capabilities.GrowSeconds) {
		return fmt.Errorf("host %s: boot and grow seconds must be between 0 and a day", h.ID)
	}
	h.Labels = maps.Clone(h.Labels)
	s.rev++
	old := s.hosts[h.ID]
	if old == nil {
		n := newHost(h)
		s.hosts[h.ID] = n
		s.indexHost(n)
		s.mend()
		return nil
	}
	s.unindexHost(old)
	for k := range old.all.services.all() {
		s.rezone(k, old, h.Zone)
	}
	old.Host, old.top = h, h.ceiling()
	s.indexHost(old)
	if !old.takes() || !old.reserve.fits(old.free()) {
		s.dismiss(old, nil)
	}
	s.mend()
	return nil
}

func newHost(h Host) *host {
	n := &host{Host: h, top: h.ceiling(), begins: orderOf(h.ID), ports: map[portKey][]*container{}}
	n.metal.level = levelKernel
	return n
}

func finite(f float64) bool { return f >= 0 && f <= 86400 }

// RemoveHost forgets a host and its machines; what ran there counts as not placed.
func (s *State) RemoveHost(id string) {
	h := s.hosts[id]
	if h == nil {
		return
	}
	s.rev++
	for _, m := range slices.Clone(h.machines) {
		s.dropMachine(m)
	}
	for _, c := range slices.Clone(h.all.byID()) {
		s.unplace(c)
	}
	s.unindexHost(h)
	h.Off = true // takes nothing any more
	s.dismiss(h, nil)
	s.forget(h)
	delete(s.hosts, id)
	s.mend()
}

// SetMachine inserts or replaces a machine; its containers stay, also when it went
// to another host. Its host must be known. A ceiling below the size counts as the size.
func (s *State) SetMachine(m Machine) error {
	h := s.hosts[m.Host]
	switch {
	case m.ID == "":
		return errors.New("machine without an id")
	case h == nil:
		return fmt.Errorf("machine %s: host %q is not known", m.ID, m.Host)
	case m.Isolation > Own:
		return fmt.Errorf("machine %s: isolation %d makes no machine", m.ID, m.Isolation)
	case !m.Size.valid() || !m.Min.valid() || !m.Ceiling.valid():
		return fmt.Errorf("machine %s: size, minimum or ceiling is out of range", m.ID)
	}
	m.Ceiling = m.Ceiling.max(m.Size)
	m.Project = s.name(m.Project)
	s.rev++
	old := s.machines[m.ID]
	if old == nil {
		s.addMachine(&machine{Machine: m})
		s.yield(h)
		return nil
	}
	if old.Host == m.Host && old.Isolation == m.Isolation && old.Project == m.Project {
		s.unindexMachine(old)
		h.machinesSize = h.machinesSize.sub(old.Size).add(m.Size)
		old.Machine = m
		s.indexMachine(old)
		s.reindexHost(h)
		if !h.reserve.fits(h.free()) {
			s.dismiss(h, nil)
		}
		s.mend()
		return nil
	}
	inside := slices.Clone(old.in.byID())
	s.dropMachine(old)
	n := &machine{Machine: m}
	s.addMachine(n)
	for _, c := range inside {
		s.place(c, h, n)
		s.secure(c, nil)
	}
	if !h.reserve.fits(h.free()) {
		s.dismiss(h, nil)
	}
	s.mend()
	return nil
}

// Machine is what is known of a machine.
func (s *State) Machine(id string) (Machine, bool) {
	if m := s.machines[id]; m != nil {
		return m.Machine, true
	}
	return Machine{}, false
}

// RemoveMachine forgets a machine; what ran in it counts as not placed.
func (s *State) RemoveMachine(id string) {
	if m := s.machines[id]; m != nil {
		s.rev++
		s.dropMachine(m)
		s.mend()
	}
}

// SetContainer inserts or replaces a container, placed (Machine, or Host on metal)
// or not. A state that breaks rules is taken as it is: it was seen. Its machine or
// host must be known.
func (s *State) SetContainer(c Container) error {
	switch {
	case c.ID == "":
		return errors.New("container without an id")
	case !c.Request.valid():
		return fmt.Errorf("container %s: request is out of range", c.ID)
	case c.Pool != "" && !validPath(c.Pool):
		return fmt.Errorf("container %s: pool %q: a path looks like /a/b", c.ID, c.Pool)
	case c.Isolation > Metal:
		return fmt.Errorf("container %s: isolation %d is not known", c.ID, c.Isolation)
	case c.Spread != "" && c.Spread != "host" && c.Spread != "machine" && c.Spread != "zone":
		return fmt.Errorf("container %s: spread %q is not one of host, machine, zone", c.ID, c.Spread)
	}
	for _, r := range c.Anti {
		if !layer(r.Layer) || r.Max < 0 {
			return fmt.Errorf("container %s: rule against %s: layer %q with at most %d is not valid", c.ID, r.Service, r.Layer, r.Max)
		}
	}
	for _, r := range c.Near {
		if !layer(r.Layer) || r.Service == "" {
			return fmt.Errorf("container %s: rule to be near %q: layer %q is not valid", c.ID, r.Service, r.Layer)
		}
	}
	var h *host
	var m *machine
	if c.Machine != "" {
		m = s.machines[c.Machine]
	}
	switch {
	case c.Machine != "" && m == nil:
		return fmt.Errorf("container %s: machine %q is not known", c.ID, c.Machine)
	case m != nil:
		if c.Host != "" && c.Host != m.Host {
			return fmt.Errorf("container %s: machine %s is on host %s, not %s", c.ID, m.ID, m.Host, c.Host)
		}
		h = m.host
	case c.Host != "":
		if h = s.hosts[c.Host]; h == nil {
			return fmt.Errorf("container %s: host %q is not known", c.ID, c.Host)
		}
	}
	s.rev++
	var stood [2]*host
	var was *host
	if old := s.containers[c.ID]; old != nil {
		stood, was = old.standby, old.host
		s.unplace(old)
	}
	n := s.newContainer(&c)
	s.containers[c.ID] = n
	s.pool(c.Pool) // there from now on, with those above it
	if h != nil {
		if h != was {
			s.makeWay(n, h, nil)
		}
		s.place(n, h, m)
		s.yield(h)
		for slot, g := range stood { // as before, where that still holds
			if slot < s.policy.HostLosses && g != nil && s.covered(n) && s.canStand(n, g) {
				s.stand(n, slot, g)
			}
		}
		s.secure(n, nil)
	}
	return nil
}

// name is the copy of a name that all share.
func (s *State) name(v string) string {
	if v == "" {
		return ""
	}
	n, ok := s.names[v]
	if !ok {
		n = strings.Clone(v)
		s.names[n] = n
	}
	return n
}

// RemoveContainer forgets a container.
func (s *State) RemoveContainer(id string) {
	if c := s.containers[id]; c != nil {
		s.rev++
		s.unplace(c)
		delete(s.containers, id)
		s.mend()
	}
}

// SetVolume says on which host a volume's disk is; "" is on none yet.
func (s *State) SetVolume(id, host string) {
	if s.volumes[id] == host {
		return
	}
	s.rev++
	s.setVolume(id, host)
}

// rezone follows a host to another zone with what it has of a service.
func (s *State) rezone(k serviceKey, h *host, zone string) {
	n := h.all.count(k)
	if from := (zoneKey{k, h.Zone}); s.zones[from] > n {
		s.zones[from] -= n
	} else {
		delete(s.zones, from)
	}
	s.zones[zoneKey{k, zone}] += n
}

func layer(v string) bool { return v == "machine" || v == "host" || v == "zone" }

func errLosses(n int) error {
	return fmt.Errorf("policy: %d host losses at once; the guarantee is made for 0, 1 or 2", n)
}

func (s *State) sortedContainers() []*container {
	list := make([]*container, 0, len(s.containers))
	for _, c := range s.containers {
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *container) int { return cmp.Compare(a.ID, b.ID) })
	return list
}
