package simulate

import (
	"cmp"
	"slices"
)

// cover answers whether the loss of any one host could be survived: whether all
// containers that are on it fit on the other hosts at once, by starting its
// machines again, or by placing containers again in free slots of running machines
// of the same group or in new machines in the free part of a host. It knows
// nothing of the policy and takes no promise from it: it tries. The answers follow
// from the states that it was asked about alone, so that a stranger gets the same.
//
// The search is first and best fit decreasing, so a "no" may be wrong and a "yes" never is.
//
// It can be asked at every instant, because what was found for a host is kept as
// its proof, and is read again instead of searched for again as long as it holds:
// see proof.
type cover struct {
	resizable bool
	making    proof // what the search under way has found so far
	nodes     int   // that search may still try

	hosts  fit
	hostAt []*Host
	groups map[string]*slots
	order  []*Container
	opened []opened
	tight  bool // best fit instead of first fit
	undo   []undone
	last   *Host // host that failed the last look: asked first
}

// undone is a size before it was changed.
type undone struct {
	f   *fit
	i   int
	was Size
}

// slots are the running machines of a group.
type slots struct {
	fit fit
	at  []*Machine // in the order of booting
	// home has one of them for each host that has some.
	home map[int]*Machine
}

// opened is a machine that the attempt has booted.
type opened struct {
	group string
	host  int
}

// survives looks at the loss of each host.
func (k *cover) survives(hosts []*Host, overhead Size) bool {
	k.prepare(hosts)
	if h := k.last; h != nil && h.pos < len(hosts) && hosts[h.pos] == h && !k.proven(h, overhead) {
		return false
	}
	for _, h := range hosts {
		if !k.proven(h, overhead) {
			k.last = h
			return false
		}
	}
	k.last = nil
	return true
}

// proven says whether what is on h fits elsewhere: by the proof that h has, or by
// a new one.
func (k *cover) proven(h *Host, overhead Size) bool {
	if h.proof.holds(h) {
		return true
	}
	k.making.clear(h)
	if !k.without(h, overhead) {
		k.rollback()
		return false
	}
	k.rollback()
	h.proof, k.making = k.making, h.proof
	return true
}

// prepare notes who is free where.
func (k *cover) prepare(hosts []*Host) {
	k.hostAt = hosts
	k.groups = nil
	k.hosts.reset(len(hosts))
	for i, h := range hosts {
		free := Size{-1, -1}
		if h.Up {
			free = h.Free()
		}
		k.hosts.init(i, free)
	}
	k.hosts.build()
}

func (k *cover) prepareGroups() {
	if k.groups != nil {
		return
	}
	k.groups = map[string]*slots{}
	for _, h := range k.hostAt {
		if !h.Up {
			continue
		}
		for _, m := range h.Machines {
			if m.Own {
				continue
			}
			g := k.groups[m.Project]
			if g == nil {
				g = &slots{home: map[int]*Machine{}}
				k.groups[m.Project] = g
			}
			if m.Up && m.target == nil {
				g.at = append(g.at, m)
				g.home[h.pos] = m
			}
		}
	}
	for _, g := range k.groups {
		slices.SortFunc(g.at, func(a, b *Machine) int { return cmp.Compare(a.seq, b.seq) })
		g.fit.reset(len(g.at))
		for i, m := range g.at {
			g.fit.init(i, m.slot())
		}
		g.fit.build()
	}
}

// without looks for room for what is on h elsewhere.
func (k *cover) without(h *Host, overhead Size) bool {
	if !slices.ContainsFunc(h.Machines, func(m *Machine) bool { return len(m.Containers) > 0 }) {
		return true
	}
	self := h.pos
	k.set(&k.hosts, self, Size{-1, -1})
	if i := k.roomiest(h.Used); i >= 0 {
		k.making.on(k.hostAt[i], h.Used)
		return true // all its machines as they are, on one other host
	}
	if k.machines(h) {
		return true
	}
	k.rollback()
	k.prepareGroups()
	k.set(&k.hosts, self, Size{-1, -1})
	return k.containers(h, overhead)
}

// roomiest is the host with the most left among those with room for s, or -1: what
// is proven by it stays proven for long.
func (k *cover) roomiest(s Size) int {
	best := k.hosts.first(s)
	if best < 0 {
		return -1
	}
	for i := best + 1; i < k.hosts.n; i++ {
		if free := k.hosts.at(i); s.fits(free) && leftover(free, k.hostAt[i].Size) > leftover(k.hosts.at(best), k.hostAt[best].Size) {
			best = i
		}
	}
	return best
}

// machines tries to start h's machines again as they are.
func (k *cover) machines(h *Host) bool {
	list := slices.Clone(h.Machines)
	slices.SortFunc(list, func(a, b *Machine) int {
		return cmp.Or(cmp.Compare(b.Size.share(h.Size), a.Size.share(h.Size)), cmp.Compare(a.ID, b.ID))
	})
	k.making.reset()
	for _, m := range list {
		if len(m.Containers) == 0 {
			continue
		}
		i := k.hosts.first(m.Size)
		if i < 0 {
			return false
		}
		k.take(&k.hosts, i, m.Size)
		k.making.on(k.hostAt[i], m.Size)
	}
	return true
}

// containers tries to place h's containers again, the large ones first: large by
// CPU, by memory, by the larger share, each first fit and best fit.
func (k *cover) containers(h *Host, overhead Size) bool {
	k.order = k.order[:0]
	for _, m := range h.Machines {
		k.order = append(k.order, m.Containers...)
		if g := k.groups[m.Project]; g != nil && !m.Own {
			for i, o := range g.at {
				if o == m {
					k.set(&g.fit, i, Size{-1, -1})
				}
			}
		}
	}
	start := len(k.undo)
	for _, large := range []func(s Size) float64{
		func(s Size) float64 { return s.share(h.Size) },
		func(s Size) float64 { return float64(s.CPU) },
		func(s Size) float64 { return float64(s.Memory) },
	} {
		slices.SortFunc(k.order, func(a, b *Container) int {
			return cmp.Or(cmp.Compare(large(b.Need), large(a.Need)), cmp.Compare(b.Need.share(h.Size), a.Need.share(h.Size)), cmp.Compare(a.ID, b.ID))
		})
		for _, k.tight = range []bool{false, true} {
			k.opened = k.opened[:0]
			k.making.reset()
			if !slices.ContainsFunc(k.order, func(c *Container) bool { return !k.place(c, overhead) }) {
				return true
			}
			k.rollbackTo(start)
		}
	}
	if !k.resizable || !k.enough() {
		return false // no search finds what is not there
	}
	k.making.reset()
	k.nodes = maxNodes
	return k.search(slices.Clone(k.order), overhead)
}

// place finds a free slot, room in a machine that the attempt booted, room beside
// a machine of the group that can grow, or room for a new machine.
func (k *cover) place(c *Container, overhead Size) bool {
	group := c.Machine.Project
	own := c.Machine.Own
	g := k.groups[group]
	if !own {
		if g != nil {
			if i := g.fit.first(c.Need); i >= 0 {
				k.take(&g.fit, i, c.Need)
				k.making.in(g.at[i], c.Need)
				return true
			}
		}
		for _, o := range k.opened {
			if o.group == group && c.Need.fits(k.hosts.at(o.host)) {
				k.take(&k.hosts, o.host, c.Need)
				k.making.on(k.hostAt[o.host], c.Need)
				return true
			}
		}
	}
	if k.resizable && !own && g != nil {
		if i := k.host(c.Need); i >= 0 && g.home[i] != nil {
			k.take(&k.hosts, i, c.Need)
			k.making.by(g.home[i], c.Need)
			return true
		}
	}
	i := k.host(c.Need.add(overhead))
	if i < 0 {
		return !own && k.resizable && g != nil && k.grow(c, g)
	}
	k.take(&k.hosts, i, c.Need.add(overhead))
	k.making.on(k.hostAt[i], c.Need.add(overhead))
	if !own {
		k.opened = append(k.opened, opened{group, i})
	}
	return true
}

// host is the first with room for s, or the one with the least.
func (k *cover) host(s Size) int {
	best := k.hosts.first(s)
	if !k.tight || best < 0 {
		return best
	}
	for i := best + 1; i < k.hosts.n; i++ {
		if free := k.hosts.at(i); s.fits(free) && leftover(free, k.hostAt[i].Size) < leftover(k.hosts.at(best), k.hostAt[best].Size) {
			best = i
		}
	}
	return best
}

// grow finds a running machine of the group whose host has room for c.
func (k *cover) grow(c *Container, g *slots) bool {
	for _, m := range g.at {
		if c.Need.fits(k.hosts.at(m.Host.pos)) {
			k.take(&k.hosts, m.Host.pos, c.Need)
			k.making.by(m, c.Need)
			return true
		}
	}
	return false
}

func (k *cover) take(f *fit, i int, s Size) { k.set(f, i, f.at(i).sub(s)) }

func (k *cover) set(f *fit, i int, s Size) {
	k.undo = append(k.undo, undone{f, i, f.at(i)})
	f.set(i, s)
}

func (k *cover) rollback() { k.rollbackTo(0) }

func (k *cover) rollbackTo(n int) {
	for i := len(k.undo) - 1; i >= n; i-- {
		u := k.undo[i]
		u.f.set(u.i, u.was)
	}
	k.undo = k.undo[:n]
}
