package simulate

import (
	"cmp"
	"slices"
	"time"
)

// The cluster autoscaler's settings, all at their documented defaults but one: it
// does not wait ten minutes after each scale-up before it scales down, which in a
// cluster that is never quiet would keep it from ever doing so.
const (
	kubeScan       = Time(10 * 1000)      // --scan-interval
	kubeIdle       = Time(10 * 60 * 1000) // --scale-down-unneeded-time
	kubeThreshold  = 0.5                  // --scale-down-utilization-threshold
	kubeCandidates = 30                   // --scale-down-non-empty-candidates-count
	kubeDrains     = 10                   // --max-scale-down-parallelism
)

// kube is Kubernetes in VMs of fixed shapes: a scheduler that binds a pod to a
// node that is ready, the emptiest (its default) or the fullest (best fit), and a
// cluster autoscaler that adds nodes for pods that wait and takes away nodes that
// are empty or whose pods fit elsewhere. The nodes' VMs are placed on the hosts
// best fit. Each project has nodes of its own, unless machines are shared.
type kube struct {
	name   string
	shapes []Size // of the nodes' VMs, the preferred first
	large  Size   // for a pod that no shape holds
	spread bool
	groups map[string]*kubeGroup
	order  []*kubeGroup // by first use
	nodes  map[*Machine]*node
}

type kubeGroup struct {
	name     string
	nodes    []*node
	pending  []*Container
	promised map[*Container]*node     // pending, with a booting node in view
	services map[string]map[*node]int // with spread: where a service's pods are
}

type node struct {
	m        *Machine
	pos      int
	whole    Size // allocatable
	idle     Time // unneeded since; -1: needed
	taken    Size // by the attempt to empty another node
	promised Size // to pods that wait for it to be ready
}

func newKube(name string, spread bool, large Size, shapes ...Size) *kube {
	return &kube{name: name, shapes: shapes, large: large, spread: spread, groups: map[string]*kubeGroup{}, nodes: map[*Machine]*node{}}
}

// Name is the policy's key.
func (k *kube) Name() string { return k.name }

// Times are those of a VM that boots and joins; it can't grow.
func (k *kube) Times(o *Options) (time.Duration, bool) { return o.BaselineBoot, false }

// Isolates says that pods share nodes: with isolation own as well, as Kubernetes
// has no node for a pod alone.
func (k *kube) Isolates(o *Options) string {
	if o.Isolation == IsolationOwn {
		return IsolationProject
	}
	return o.Isolation
}

// Handle schedules at once and scales at each scan.
func (k *kube) Handle(w *World, e Event) int {
	switch e.Kind {
	case Arrived:
		k.arrive(w, e.Container)
		w.Wake((w.Now()/kubeScan + 1) * kubeScan)
		return 1
	case Left:
		if e.Machine != nil {
			n := k.nodes[e.Machine]
			g := k.groups[e.Machine.Project]
			g.count(e.Container, n, -1)
			k.freed(w, g, n)
		} else { // it waited
			g := k.group(w.Group(e.Container))
			g.unpromise(e.Container)
			g.pending = slices.DeleteFunc(g.pending, func(c *Container) bool { return c == e.Container })
		}
	case Booted:
		k.freed(w, k.groups[e.Machine.Project], k.nodes[e.Machine])
	case HostLost:
		for _, g := range k.order {
			for i := len(g.nodes) - 1; i >= 0; i-- {
				if n := g.nodes[i]; n.m.Gone {
					for _, c := range g.pending {
						if g.promised[c] == n {
							g.unpromise(c)
						}
					}
					k.forget(g, n)
				}
			}
		}
		for _, c := range e.Lost {
			k.arrive(w, c)
		}
		return len(e.Lost)
	case Tick:
		for _, g := range k.order {
			k.scaleUp(w, g)
			k.scaleDown(w, g)
		}
		w.Wake(w.Now() + kubeScan)
	}
	return 0
}

func (k *kube) group(name string) *kubeGroup {
	g := k.groups[name]
	if g == nil {
		g = &kubeGroup{name: name, promised: map[*Container]*node{}, services: map[string]map[*node]int{}}
		k.groups[name] = g
		k.order = append(k.order, g)
	}
	return g
}

func (k *kube) arrive(w *World, c *Container) {
	g := k.group(w.Group(c))
	if n := k.pick(g, c, nil); n != nil {
		k.bind(w, g, c, n)
	} else if !c.Need.add(w.Overhead).fits(k.large) && !k.shaped(w, c) {
		w.Refuse(c, "larger than any node")
	} else {
		g.pending = append(g.pending, c)
	}
}

// shaped says whether one of the shapes holds c.
func (k *kube) shaped(w *World, c *Container) bool {
	return slices.ContainsFunc(k.shapes, func(s Size) bool { return c.Need.add(w.Overhead).fits(s) })
}

func (k *kube) bind(w *World, g *kubeGroup, c *Container, n *node) {
	w.Place(c, n.m)
	g.count(c, n, 1)
}

// count keeps where a service's pods are.
func (g *kubeGroup) count(c *Container, n *node, by int) {
	if c.Service == "" || n == nil {
		return
	}
	on := g.services[c.Service]
	if on == nil {
		on = map[*node]int{}
		g.services[c.Service] = on
	}
	if on[n] += by; on[n] <= 0 {
		delete(on, n)
		if len(on) == 0 {
			delete(g.services, c.Service)
		}
	}
}

// freed gives pods that wait a node that has room now: those it was booted for
// first, then in the order of their arrival.
func (k *kube) freed(w *World, g *kubeGroup, n *node) {
	if len(g.pending) == 0 || !n.m.Up {
		return
	}
	for _, own := range []bool{true, false} {
		g.pending = slices.DeleteFunc(g.pending, func(c *Container) bool {
			if own && g.promised[c] != n || !c.Need.fits(n.m.Free()) {
				return false
			}
			g.unpromise(c)
			k.bind(w, g, c, n)
			return true
		})
	}
}

func (g *kubeGroup) promise(c *Container, n *node) {
	g.promised[c] = n
	n.promised = n.promised.add(c.Need)
}

func (g *kubeGroup) unpromise(c *Container) {
	if n := g.promised[c]; n != nil {
		delete(g.promised, c)
		n.promised = n.promised.sub(c.Need)
	}
}

// pick is the ready node with the best score: with spread LeastAllocated,
// BalancedAllocation and PodTopologySpread over nodes (weights 1, 1 and 2, as in
// the default profile), else the one that is fullest afterwards.
func (k *kube) pick(g *kubeGroup, c *Container, not *node) *node {
	var best *node
	most := 0.0
	on := g.services[c.Service]
	top := 0
	if k.spread {
		for _, v := range on { // a maximum: order does not matter
			top = max(top, v)
		}
	}
	for _, n := range g.nodes {
		free := n.m.Size.sub(n.m.Used)
		if !n.m.Up || n == not || !c.Need.fits(free) {
			continue
		}
		left := free.sub(c.Need)
		cpu, mem := part(left.CPU, n.whole.CPU), part(left.Memory, n.whole.Memory)
		score := -(cpu + mem)
		if k.spread {
			lopsided := (cpu - mem) / 2
			if lopsided < 0 {
				lopsided = -lopsided
			}
			score = (cpu+mem)/2 + 1 - lopsided
			if top > 0 {
				score += 2 * float64(top-on[n]) / float64(top)
			}
		}
		if best == nil || score > most {
			best, most = n, score
		}
	}
	return best
}

// scaleUp boots nodes for the pods that fit on no node, booting ones included.
func (k *kube) scaleUp(w *World, g *kubeGroup) {
	if len(g.pending) == len(g.promised) {
		return
	}
	rest := slices.DeleteFunc(slices.Clone(g.pending), func(c *Container) bool { return g.promised[c] != nil })
	slices.SortStableFunc(rest, func(a, b *Container) int {
		return cmp.Compare(b.Need.share(k.shapes[0]), a.Need.share(k.shapes[0]))
	})
	var booting []*node
	for _, n := range g.nodes {
		if !n.m.Up {
			booting = append(booting, n)
		}
	}
	rest = g.promiseAll(rest, booting)
	for len(rest) > 0 {
		shape, n := k.expand(w, rest)
		var added []*node
		for len(added) < n {
			h := bestHost(w, shape)
			if h == nil {
				break
			}
			m := w.Boot(h, g.name, false, shape)
			nd := &node{m: m, pos: len(g.nodes), whole: m.Free(), idle: -1}
			g.nodes = append(g.nodes, nd)
			k.nodes[m] = nd
			added = append(added, nd)
		}
		rest = g.promiseAll(rest, added)
		if len(added) < n || n == 0 {
			return // no more hosts
		}
	}
}

// promiseAll promises booting nodes to pods, first fit, and returns the pods left.
func (g *kubeGroup) promiseAll(pods []*Container, nodes []*node) []*Container {
	return slices.DeleteFunc(pods, func(c *Container) bool {
		for _, n := range nodes {
			if c.Need.fits(n.m.Free().sub(n.promised)) {
				g.promise(c, n)
				return true
			}
		}
		return false
	})
}

// expand chooses the shape of the next nodes and their number, as the least-waste
// expander does: of the shapes that hold any of the pods the one whose nodes, packed
// with all that it holds, are fullest; the preferred when equal. The large shape is
// for what no other holds.
func (k *kube) expand(w *World, pods []*Container) (Size, int) {
	var best Size
	count, least := 0, 0.0
	for _, s := range append(slices.Clone(k.shapes), k.large) {
		if count > 0 && s == k.large && !slices.Contains(k.shapes, s) || !w.hostable(s) {
			continue
		}
		room := s.sub(w.Overhead)
		var bins []Size
		var packed Size
		for _, c := range pods {
			if !c.Need.fits(room) {
				continue
			}
			if !firstFit(bins, c.Need) {
				bins = append(bins, room.sub(c.Need))
			}
			packed = packed.add(c.Need)
		}
		if len(bins) == 0 {
			continue
		}
		whole := Size{room.CPU * int64(len(bins)), room.Memory * int64(len(bins))}
		waste := 1 - (part(packed.CPU, whole.CPU)+part(packed.Memory, whole.Memory))/2
		if count == 0 || waste < least-1e-9 {
			best, count, least = s, len(bins), waste
		}
	}
	return best, count
}

func firstFit(bins []Size, need Size) bool {
	for i := range bins {
		if need.fits(bins[i]) {
			bins[i] = bins[i].sub(need)
			return true
		}
	}
	return false
}

// scaleDown takes away nodes that have not been needed for ten minutes.
func (k *kube) scaleDown(w *World, g *kubeGroup) {
	now := w.Now()
	looked, drained := 0, 0
	for i := len(g.nodes) - 1; i >= 0; i-- {
		if i >= len(g.nodes) {
			continue
		}
		n := g.nodes[i]
		if !n.m.Up {
			continue
		}
		if len(n.m.Containers) == 0 {
			if n.idle < 0 {
				n.idle = now
			} else if now-n.idle >= kubeIdle {
				k.remove(w, g, n)
			}
			continue
		}
		if n.m.Used.sub(w.Overhead).share(n.whole) >= kubeThreshold || drained >= kubeDrains {
			n.idle = -1
			continue
		}
		if looked >= kubeCandidates {
			continue // as it was: looked at in another scan
		}
		looked++
		if !k.fitElsewhere(g, n) {
			n.idle = -1
		} else if n.idle < 0 {
			n.idle = now
		} else if now-n.idle >= kubeIdle && k.drain(w, g, n) {
			drained++
		}
	}
}

// fitElsewhere tries n's pods on the other ready nodes.
func (k *kube) fitElsewhere(g *kubeGroup, n *node) bool {
	pods := slices.Clone(n.m.Containers)
	slices.SortFunc(pods, func(a, b *Container) int {
		return cmp.Or(cmp.Compare(b.Need.share(n.whole), a.Need.share(n.whole)), cmp.Compare(a.ID, b.ID))
	})
	var touched []*node
	ok := true
	for _, c := range pods {
		i := slices.IndexFunc(g.nodes, func(o *node) bool {
			return o != n && o.m.Up && len(o.m.Containers) > 0 && c.Need.fits(o.m.Free().sub(o.taken))
		})
		if i < 0 {
			ok = false
			break
		}
		g.nodes[i].taken = g.nodes[i].taken.add(c.Need)
		touched = append(touched, g.nodes[i])
	}
	for _, o := range touched {
		o.taken = Size{}
	}
	return ok
}

// drain evicts n's pods, which the scheduler binds elsewhere, and removes n.
func (k *kube) drain(w *World, g *kubeGroup, n *node) bool {
	pods := slices.Clone(n.m.Containers)
	slices.SortFunc(pods, func(a, b *Container) int {
		return cmp.Or(cmp.Compare(b.Need.share(n.whole), a.Need.share(n.whole)), cmp.Compare(a.ID, b.ID))
	})
	for _, c := range pods {
		to := k.pick(g, c, n)
		if to == nil || !c.Running {
			return false
		}
		w.Move(c, to.m)
		g.count(c, n, -1)
		g.count(c, to, 1)
	}
	k.remove(w, g, n)
	return true
}

func (k *kube) remove(w *World, g *kubeGroup, n *node) {
	h := n.m.Host
	w.Stop(n.m)
	k.forget(g, n)
	if len(h.Machines) == 0 {
		w.PowerOff(h)
	}
}

func (k *kube) forget(g *kubeGroup, n *node) {
	delete(k.nodes, n.m)
	for _, on := range g.services { // the same for each: order does not matter
		delete(on, n)
	}
	last := len(g.nodes) - 1
	g.nodes[n.pos] = g.nodes[last]
	g.nodes[n.pos].pos = n.pos
	g.nodes = g.nodes[:last]
}

// hostable says whether some host could hold a machine of that size.
func (w *World) hostable(size Size) bool {
	return slices.ContainsFunc(w.pools, func(p poolState) bool { return size.fits(p.Size) })
}
