package simulate

// fit finds the first of a row of sizes with room for another: a tree of maxima.
type fit struct {
	n, base int
	tree    []Size
}

func (f *fit) reset(n int) {
	f.n, f.base = n, 1
	for f.base < n {
		f.base *= 2
	}
	if cap(f.tree) < 2*f.base {
		f.tree = make([]Size, 2*f.base)
	}
	f.tree = f.tree[:2*f.base]
	for i := range f.tree {
		f.tree[i] = Size{-1, -1}
	}
}

func (f *fit) init(i int, s Size) { f.tree[f.base+i] = s }

func (f *fit) build() {
	for i := f.base - 1; i > 0; i-- {
		f.tree[i] = f.tree[2*i].max(f.tree[2*i+1])
	}
}

func (f *fit) at(i int) Size { return f.tree[f.base+i] }

func (f *fit) set(i int, s Size) {
	i += f.base
	f.tree[i] = s
	for i /= 2; i > 0; i /= 2 {
		f.tree[i] = f.tree[2*i].max(f.tree[2*i+1])
	}
}

// first is the lowest index with room for s, or -1.
func (f *fit) first(s Size) int {
	if f.n == 0 {
		return -1
	}
	return f.find(1, s)
}

func (f *fit) find(i int, s Size) int {
	if !s.fits(f.tree[i]) {
		return -1
	}
	if i >= f.base {
		return i - f.base
	}
	if j := f.find(2*i, s); j >= 0 {
		return j
	}
	return f.find(2*i+1, s)
}
