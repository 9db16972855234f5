package planner

import "slices"

// The primitive changes, each keeping every index right. Public methods, decisions
// (which take them back) and Commit are made of these; none of them touches the
// revision.

func (s *State) addMachine(m *machine) {
	h := s.hosts[m.Host]
	m.host, m.begins, m.in.level = h, orderOf(m.ID), levelKernel
	k := groupOf(m.Isolation, m.Project)
	if s.groups[k] == nil {
		s.groups[k] = &group{}
	}
	m.group = s.groups[k]
	s.machines[m.ID] = m
	s.chargeMachine(m, 1)
	s.perKind[m.Isolation]++
	h.machines = insertByID(h.machines, m)
	h.machinesSize = h.machinesSize.add(m.Size)
	m.overhead = h.GuestExtra.add(h.MachineExtra)
	h.busy = h.busy.add(m.overhead)
	s.indexMachine(m)
	s.reindexHost(h)
}

func (s *State) dropMachine(m *machine) {
	for _, c := range slices.Clone(m.in.byID()) {
		s.unplace(c)
	}
	h := m.host
	s.unindexMachine(m)
	if m.group.size() == 0 {
		delete(s.groups, groupOf(m.Isolation, m.Project))
	}
	delete(s.machines, m.ID)
	s.chargeMachine(m, -1)
	s.perKind[m.Isolation]--
	h.machines = removeByID(h.machines, m)
	h.machinesSize = h.machinesSize.sub(m.Size)
	h.busy = h.busy.sub(m.overhead)
	s.reindexHost(h)
}

func (s *State) resize(m *machine, to Size) {
	s.unindexMachine(m)
	m.host.machinesSize = m.host.machinesSize.sub(m.Size).add(to)
	m.Size = to
	s.indexMachine(m)
	s.reindexHost(m.host)
}

// place puts a container that is nowhere into m, or onto h itself when m is nil.
func (s *State) place(c *container, h *host, m *machine) {
	c.host, c.machine = h, m
	s.epoch++
	s.charge(c, 1)
	h.all.add(c)
	h.busy = h.busy.add(c.need)
	s.follow(h)
	if c.Class == Batch {
		h.batch++
	}
	if m != nil {
		s.unindexMachine(m)
		m.sum = m.sum.add(c.need)
		m.in.add(c)
		s.indexMachine(m)
	} else {
		h.metalSize = h.metalSize.add(c.need)
		h.metal.add(c)
		s.reindexHost(h)
	}
	for _, p := range c.Ports {
		if p.Port != 0 {
			h.ports[p.key()] = insertByID(h.ports[p.key()], c)
		}
	}
	for _, v := range c.Volumes {
		s.users[v] = insertByID(s.users[v], c)
	}
	if c.Service != "" {
		k := c.service()
		oneMore(s.services, k, h)
		s.zones[zoneKey{k, h.Zone}]++
	}
	if len(c.Anti) > 0 {
		oneMore(s.wary, c.Project, h)
	}
	if c.zoned() {
		s.zoneAnti[c.Project] = insertByID(s.zoneAnti[c.Project], c)
	}
}

// zoned says whether c brings rules about its zone.
func (c *container) zoned() bool {
	return slices.ContainsFunc(c.Anti, func(r AntiRule) bool { return r.Layer == "zone" })
}

func (s *State) unplace(c *container) {
	h, m := c.host, c.machine
	if h == nil {
		return
	}
	s.release(c)
	s.epoch++
	c.host, c.machine = nil, nil
	s.charge(c, -1)
	h.all.remove(c)
	h.busy = h.busy.sub(c.need)
	s.follow(h)
	if c.Class == Batch {
		h.batch--
	}
	if m != nil {
		s.unindexMachine(m)
		m.sum = m.sum.sub(c.need)
		m.in.remove(c)
		s.indexMachine(m)
	} else {
		h.metalSize = h.metalSize.sub(c.need)
		h.metal.remove(c)
		s.reindexHost(h)
	}
	for _, p := range c.Ports {
		if list := removeByID(h.ports[p.key()], c); len(list) > 0 {
			h.ports[p.key()] = list
		} else {
			delete(h.ports, p.key())
		}
	}
	for _, v := range c.Volumes {
		if list := removeByID(s.users[v], c); len(list) > 0 {
			s.users[v] = list
		} else {
			delete(s.users, v)
		}
	}
	if len(c.Anti) > 0 {
		oneLess(s.wary, c.Project, h)
	}
	if c.zoned() {
		if list := removeByID(s.zoneAnti[c.Project], c); len(list) > 0 {
			s.zoneAnti[c.Project] = list
		} else {
			delete(s.zoneAnti, c.Project)
		}
	}
	if c.Service != "" {
		k := c.service()
		if z := (zoneKey{k, h.Zone}); s.zones[z] > 1 {
			s.zones[z]--
		} else {
			delete(s.zones, z)
		}
		oneLess(s.services, k, h)
	}
}

// oneMore counts another of k on h.
func oneMore[K comparable](where map[K]map[*host]int, k K, h *host) {
	on := where[k]
	if on == nil {
		on = map[*host]int{}
		where[k] = on
	}
	on[h]++
}

// oneLess counts one of k less on h; what is not there has no entry.
func oneLess[K comparable](where map[K]map[*host]int, k K, h *host) {
	on := where[k]
	if n := on[h]; n > 1 {
		on[h] = n - 1
	} else if delete(on, h); len(on) == 0 {
		delete(where, k)
	}
}

func (s *State) setVolume(id, host string) {
	if host == "" {
		delete(s.volumes, id)
	} else {
		s.volumes[id] = host
	}
}

func (s *State) indexMachine(m *machine) {
	if !m.takes() {
		m.group.closed++
		return
	}
	m.slot, m.reach = m.free(), m.room()
	m.freeKey, m.roomKey, m.indexed = key(m.slot), key(m.reach), true
	m.group.free.add(m.freeKey, m)
	m.group.room.add(m.roomKey, m)
}

func (s *State) unindexMachine(m *machine) {
	if !m.indexed {
		m.group.closed--
		return
	}
	m.group.free.remove(m.freeKey, m)
	m.group.room.remove(m.roomKey, m)
	m.indexed = false
}

// unindexHost takes a host and its machines out of the indexes, before its fields change.
func (s *State) unindexHost(h *host) {
	for _, m := range h.machines {
		s.unindexMachine(m)
	}
	if h.indexed {
		s.open.remove(h.key, h)
		h.indexed = false
	}
	if h.Off {
		s.off = removeByID(s.off, h)
	}
	s.total, s.taken, s.busy = s.total.sub(h.counted), s.taken.sub(h.spent), s.busy.sub(h.worked)
	h.counted, h.spent, h.worked = Size{}, Size{}, Size{}
}

func (s *State) indexHost(h *host) {
	for _, m := range h.machines { // overheads are the host's, and may have changed
		now := h.GuestExtra.add(h.MachineExtra)
		h.busy = h.busy.sub(m.overhead).add(now)
		m.overhead = now
	}
	for _, m := range h.machines {
		s.indexMachine(m)
	}
	if h.takes() {
		h.key, h.indexed = key(h.avail()), true
		s.open.add(h.key, h)
		h.counted, h.spent, h.worked = h.Capacity, h.used(), h.busy
		s.total, s.taken, s.busy = s.total.add(h.counted), s.taken.add(h.spent), s.busy.add(h.worked)
	}
	if h.Off {
		s.off = insertByID(s.off, h)
	}
}

// reindexHost follows a change of what is free on a host: its own cell, and the
// room for growth of its machines.
func (s *State) reindexHost(h *host) {
	if !h.indexed {
		return
	}
	s.taken = s.taken.sub(h.spent)
	h.spent = h.used()
	s.taken = s.taken.add(h.spent)
	s.follow(h)
	if k := key(h.avail()); k != h.key {
		s.open.remove(h.key, h)
		h.key = k
		s.open.add(k, h)
	}
	for _, m := range h.machines {
		if !m.indexed {
			continue
		}
		m.reach = m.room()
		if k := key(m.reach); k != m.roomKey {
			m.group.room.remove(m.roomKey, m)
			m.roomKey = k
			m.group.room.add(k, m)
		}
	}
}

// follow keeps the sum of what hosts' containers and overheads use.
func (s *State) follow(h *host) {
	if h.indexed {
		s.busy = s.busy.sub(h.worked).add(h.busy)
		h.worked = h.busy
	}
}
