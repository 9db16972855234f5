package planner

// tops keeps the two largest of a list of sizes, for CPU and memory by themselves: a
// tournament whose leaf number i is the size number i. A change costs the height of
// the tree.
type tops struct {
	nodes  []top // nodes[1] is the root, nodes[leaves+i] is leaf i
	leaves int   // a power of two; 0: none yet
}

type top struct{ one, two Size }

func (a top) merge(b top) top {
	return top{
		one: a.one.max(b.one),
		two: a.one.min(b.one).max(a.two.max(b.two)),
	}
}

// set makes size number i that; the zero size counts for nothing.
func (t *tops) set(i int, size Size) {
	if i >= t.leaves {
		if size.zero() {
			return
		}
		t.widen(i + 1)
	}
	n := t.leaves + i
	t.nodes[n] = top{one: size}
	for n /= 2; n > 0; n /= 2 {
		now := t.nodes[2*n].merge(t.nodes[2*n+1])
		if t.nodes[n] == now {
			return
		}
		t.nodes[n] = now
	}
}

func (t *tops) widen(n int) {
	leaves := max(1, t.leaves)
	for leaves < n {
		leaves *= 2
	}
	nodes := make([]top, 2*leaves)
	copy(nodes[leaves:], t.nodes[min(t.leaves, len(t.nodes)):])
	for i := leaves - 1; i > 0; i-- {
		nodes[i] = nodes[2*i].merge(nodes[2*i+1])
	}
	t.nodes, t.leaves = nodes, leaves
}

// root is the largest two of all.
func (t *tops) root() top {
	if t.leaves == 0 {
		return top{}
	}
	return t.nodes[1]
}

// without is the largest two when number i is left out; -1 leaves out none.
func (t *tops) without(i int) top {
	if i < 0 || i >= t.leaves {
		return t.root()
	}
	var out top
	for n := t.leaves + i; n > 1; n /= 2 {
		out = out.merge(t.nodes[n^1])
	}
	return out
}

// above calls yield with the number of each size that does not fit into limit.
func (t *tops) above(limit Size, yield func(i int)) {
	if t.leaves > 0 {
		t.descend(1, limit, yield)
	}
}

func (t *tops) descend(n int, limit Size, yield func(i int)) {
	if t.nodes[n].one.fits(limit) {
		return
	}
	if n >= t.leaves {
		yield(n - t.leaves)
		return
	}
	t.descend(2*n, limit, yield)
	t.descend(2*n+1, limit, yield)
}

// together is what the largest that may be called in at once need.
func (a top) together(losses int) Size {
	if losses > 1 {
		return a.one.add(a.two)
	}
	return a.one
}
