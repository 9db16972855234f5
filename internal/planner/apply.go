package planner

import "slices"

// The primitive changes, each keeping every index right. Public methods, decisions
// (which take them back) and Commit are made of these; none of them touches the
// revision.

func (s *State) addMachine(m *machine) {
	h := s.hosts[m.Host]
	m.host = h
	k := groupOf(m.Isolation, m.Project)
	if s.groups[k] == nil {
		s.groups[k] = &group{}
	}
	m.group = s.groups[k]
	s.machines[m.ID] = m
	s.perKind[m.Isolation]++
	h.machines = insertByID(h.machines, m)
	h.machinesSize = h.machinesSize.add(m.Size)
	s.indexMachine(m)
	s.reindexHost(h)
}

func (s *State) dropMachine(m *machine) {
	for _, c := range slices.Clone(m.in.members) {
		s.unplace(c)
	}
	h := m.host
	s.unindexMachine(m)
	if m.group.size() == 0 {
		delete(s.groups, groupOf(m.Isolation, m.Project))
	}
	delete(s.machines, m.ID)
	s.perKind[m.Isolation]--
	h.machines = removeByID(h.machines, m)
	h.machinesSize = h.machinesSize.sub(m.Size)
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
	c.host, c.machine, c.Host = h, m, h.ID
	h.all.add(c)
	if m != nil {
		c.Machine = m.ID
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
		if s.services[k] == nil {
			s.services[k] = map[*host]int{}
		}
		s.services[k][h]++
	}
}

func (s *State) unplace(c *container) {
	h, m := c.host, c.machine
	if h == nil {
		return
	}
	c.host, c.machine, c.Host, c.Machine = nil, nil, "", ""
	h.all.remove(c)
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
	if c.Service != "" {
		k := c.service()
		if s.services[k][h]--; s.services[k][h] == 0 {
			delete(s.services[k], h)
			if len(s.services[k]) == 0 {
				delete(s.services, k)
			}
		}
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
	m.freeKey, m.roomKey, m.indexed = key(m.free()), key(m.room()), true
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
}

func (s *State) indexHost(h *host) {
	for _, m := range h.machines {
		s.indexMachine(m)
	}
	if h.takes() {
		h.key, h.indexed = key(h.free()), true
		s.open.add(h.key, h)
	}
}

// reindexHost follows a change of what is free on a host: its own cell, and the
// room for growth of its machines.
func (s *State) reindexHost(h *host) {
	if !h.indexed {
		return
	}
	if k := key(h.free()); k != h.key {
		s.open.remove(h.key, h)
		h.key = k
		s.open.add(k, h)
	}
	for _, m := range h.machines {
		if !m.indexed {
			continue
		}
		if k := key(m.room()); k != m.roomKey {
			m.group.room.remove(m.roomKey, m)
			m.roomKey = k
			m.group.room.add(k, m)
		}
	}
}
