package planner

import (
	"maps"
	"slices"
)

// cloning is a copy in the making: where each thing's copy is.
type cloning struct {
	from, to *State
	hosts    map[*host]*host
	machines map[*machine]*machine
	groups   map[*group]*group
	quotas   map[*quota]*quota
}

// Clone copies the state, for what-if questions: as it is, with every index, in a few
// large pieces. O(everything), and only reads the state.
func (s *State) Clone() *State {
	n := New()
	n.rev, n.epoch, n.policy, n.perKind = s.rev, s.epoch, s.policy, s.perKind
	n.total, n.taken, n.busy = s.total, s.taken, s.busy
	n.volumes, n.zones, n.names = maps.Clone(s.volumes), maps.Clone(s.zones), maps.Clone(s.names)
	k := &cloning{
		from: s, to: n,
		hosts:    make(map[*host]*host, len(s.hosts)),
		machines: make(map[*machine]*machine, len(s.machines)),
		groups:   make(map[*group]*group, len(s.groups)),
		quotas:   make(map[*quota]*quota, len(s.quotas)),
	}
	k.bounds()
	k.things()
	k.insides()
	for key, g := range s.groups {
		x := k.groups[g]
		x.free, x.room, x.closed = cloneBuckets(&g.free, k.machine), cloneBuckets(&g.room, k.machine), g.closed
		n.groups[key] = x
	}
	n.open = cloneBuckets(&s.open, k.host)
	n.off, n.standing, n.breakers = each(s.off, k.host), each(s.standing, k.host), each(s.breakers, k.host)
	n.exposed, n.coveredTo = cloneOrdered(&s.exposed, k.container), s.coveredTo
	for v, list := range s.users {
		n.users[v] = each(list, k.container)
	}
	for project, list := range s.zoneAnti {
		n.zoneAnti[project] = each(list, k.container)
	}
	cloneCounts(k, n.services, s.services)
	cloneCounts(k, n.wary, s.wary)
	return n
}

// cloneCounts copies how many there are on which hosts.
func cloneCounts[K comparable](k *cloning, to, from map[K]map[*host]int) {
	for key, on := range from {
		there := make(map[*host]int, len(on))
		for h, n := range on {
			there[k.hosts[h]] = n
		}
		to[key] = there
	}
}

// bounds copies quotas and pools.
func (k *cloning) bounds() {
	for project, q := range k.from.quotas {
		x := *q
		k.to.quotas[project], k.quotas[q] = &x, &x
	}
	for path, p := range k.from.pools {
		k.to.pools[path] = &pool{Pool: p.Pool, used: p.used}
	}
	same := func(p *pool) *pool { return k.to.pools[p.Path] }
	for path, p := range k.from.pools {
		x := k.to.pools[path]
		if x.kids = each(p.kids, same); p.parent != nil {
			x.parent = same(p.parent)
		}
	}
}

// things copies hosts, machines and containers, who is in what, and no other pointers.
func (k *cloning) things() {
	s, n := k.from, k.to
	hosts, machines, containers := make([]host, len(s.hosts)), make([]machine, len(s.machines)), make([]container, len(s.containers))
	n.hosts, n.machines, n.containers = make(map[string]*host, len(hosts)), make(map[string]*machine, len(machines)), make(map[string]*container, len(containers))
	for id, h := range s.hosts {
		x := &hosts[0]
		hosts = hosts[1:]
		*x = *h
		x.Labels = maps.Clone(h.Labels)
		n.hosts[id], k.hosts[h] = x, x
	}
	copied := func(c *container) *container {
		x := &containers[0]
		containers = containers[1:]
		*x = *c
		x.quota = k.quotas[c.quota]
		n.containers[c.ID] = x
		return x
	}
	inside := func(b *box, h *host, m *machine) {
		list := make([]*container, len(b.members))
		for i, c := range b.members {
			x := copied(c)
			x.host, x.machine = h, m
			list[i], h.all.members[c.place[levelHost]] = x, x
		}
		b.members = list
	}
	for old, h := range k.hosts {
		h.all.members = make([]*container, len(old.all.members))
		inside(&h.metal, h, nil)
		h.machines = each(old.machines, func(m *machine) *machine {
			x := &machines[0]
			machines = machines[1:]
			*x = *m
			n.machines[m.ID], k.machines[m] = x, x
			x.host, x.group = h, k.groups[m.group]
			if x.group == nil {
				x.group = &group{}
				k.groups[m.group] = x.group
			}
			inside(&x.in, h, x)
			return x
		})
	}
	for _, c := range s.containers {
		if c.host == nil {
			copied(c)
		}
	}
}

// insides makes what hosts, machines and containers have their copies' own.
func (k *cloning) insides() {
	for _, x := range k.to.containers {
		for slot, g := range x.standby {
			if g != nil {
				x.standby[slot] = k.hosts[g]
			}
		}
	}
	for _, m := range k.machines {
		k.box(&m.in)
		m.parts = slices.Clone(m.parts)
		for i := range m.parts {
			m.parts[i].on = k.hosts[m.parts[i].on]
		}
	}
	for _, h := range k.hosts {
		k.box(&h.all)
		k.box(&h.metal)
		ports := make(map[portKey][]*container, len(h.ports))
		for p, list := range h.ports {
			ports[p] = each(list, k.container)
		}
		h.ports = ports
		h.claims = each(h.claims, func(x claim) claim { return claim{k.hosts[x.from], x.size} })
		h.grants = each(h.grants, func(x grant) grant { return grant{k.hosts[x.on], x.at} })
		h.tops.nodes = slices.Clone(h.tops.nodes)
		h.broken = cloneOrdered(&h.broken, k.host)
		h.shadows = each(h.shadows, k.container)
	}
}

func (k *cloning) box(b *box) {
	b.services.few, b.services.many = slices.Clone(b.services.few), maps.Clone(b.services.many)
	b.anti = each(b.anti, k.container)
}

func (k *cloning) host(h *host) *host          { return k.hosts[h] }
func (k *cloning) machine(m *machine) *machine { return k.machines[m] }

// container is the copy of one that is placed: it has the same place.
func (k *cloning) container(c *container) *container {
	return k.hosts[c.host].all.members[c.place[levelHost]]
}

func each[T any](list []T, same func(T) T) []T {
	if list == nil {
		return nil
	}
	out := make([]T, len(list))
	for i, t := range list {
		out[i] = same(t)
	}
	return out
}

func cloneBuckets[T item](b *buckets[T], same func(T) T) buckets[T] {
	return buckets[T]{keys: slices.Clone(b.keys), n: b.n, cells: each(b.cells, func(cell *ordered[T]) *ordered[T] {
		x := cloneOrdered(cell, same)
		return &x
	})}
}

func cloneOrdered[T item](o *ordered[T], same func(T) T) ordered[T] {
	return ordered[T]{n: o.n, runs: each(o.runs, func(r []entry[T]) []entry[T] {
		return each(r, func(e entry[T]) entry[T] { return entry[T]{e.order, e.space, same(e.t)} })
	})}
}
