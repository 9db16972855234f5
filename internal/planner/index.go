package planner

import (
	"slices"
	"strings"
)

// item is what an index holds: it is found by its id, whose beginning it knows.
type item interface {
	id() string
	order() order
	space() Size // what a search looks at first; the same as long as it is in
}

// order is the first 16 bytes of an id, as numbers that compare like them: two ids are
// mostly told apart without a look at either.
type order struct{ a, b uint64 }

func orderOf(id string) order {
	var x [2]uint64
	for i := range min(len(id), 16) {
		x[i/8] |= uint64(id[i]) << (56 - i%8*8)
	}
	return order{x[0], x[1]}
}

// before says whether id x, which begins with a, comes before id y, which begins with b.
func before[T, U item](a order, x T, b order, y U) bool {
	if a.a != b.a {
		return a.a < b.a
	}
	if a.b != b.b {
		return a.b < b.b
	}
	return x.id() < y.id()
}

// buckets is an index of things by their free capacity: a cell for each pair of
// classes (CPU, memory), inside a cell by id. A look-up visits the cells that may
// fit, tightest first, and never sees the others; an update touches two cells.
type buckets[T item] struct {
	keys  []uint32      // of the cells in use, ascending
	cells []*ordered[T] // theirs
	spare []*ordered[T] // empty ones, for the next that comes: no garbage
	n     int
}

// maxSpare bounds the empty cells that are kept.
const maxSpare = 8

func key(free Size) uint32 { return class(free.CPU)<<16 | class(free.Memory) }

func (b *buckets[T]) add(k uint32, t T) {
	i, ok := slices.BinarySearch(b.keys, k)
	if !ok {
		var cell *ordered[T]
		if last := len(b.spare) - 1; last >= 0 {
			cell, b.spare = b.spare[last], b.spare[:last]
		} else {
			cell = &ordered[T]{}
		}
		b.keys = slices.Insert(b.keys, i, k)
		b.cells = slices.Insert(b.cells, i, cell)
	}
	b.cells[i].insert(t)
	b.n++
}

func (b *buckets[T]) remove(k uint32, t T) {
	i, ok := slices.BinarySearch(b.keys, k)
	if !ok {
		return
	}
	cell := b.cells[i]
	cell.remove(t)
	b.n--
	if cell.n > 0 {
		return
	}
	b.keys = slices.Delete(b.keys, i, i+1)
	b.cells = slices.Delete(b.cells, i, i+1)
	if len(b.spare) < maxSpare {
		b.spare = append(b.spare, cell)
	}
}

// fitting calls yield with what may have room for need, tightest cells first,
// until it says stop.
func (b *buckets[T]) fitting(need Size, yield func(T) bool) {
	cpu, mem := class(need.CPU), class(need.Memory)
	i, _ := slices.BinarySearch(b.keys, cpu<<16)
	for ; i < len(b.keys); i++ {
		if b.keys[i]&0xffff >= mem && !b.cells[i].all(yield) {
			return
		}
	}
}

// entries calls yield with the entries of what may have room for need, tightest cells
// first, until it says stop.
func (b *buckets[T]) entries(need Size, yield func(*entry[T]) bool) {
	cpu, mem := class(need.CPU), class(need.Memory)
	i, _ := slices.BinarySearch(b.keys, cpu<<16)
	for ; i < len(b.keys); i++ {
		if b.keys[i]&0xffff < mem {
			continue
		}
		for _, r := range b.cells[i].runs {
			for j := range r {
				if !yield(&r[j]) {
					return
				}
			}
		}
	}
}

// roomiest calls yield with what may have room for need, the largest cells first.
func (b *buckets[T]) roomiest(need Size, yield func(T) bool) {
	cpu, mem := class(need.CPU), class(need.Memory)
	for i := len(b.keys) - 1; i >= 0 && b.keys[i]>>16 >= cpu; i-- {
		if b.keys[i]&0xffff >= mem && !b.cells[i].all(yield) {
			return
		}
	}
}

// lacking calls yield with the cells that surely have no room for need, the
// nearest misses first.
func (b *buckets[T]) lacking(need Size, yield func(*ordered[T])) {
	cpu, mem := class(need.CPU), class(need.Memory)
	for i := len(b.keys) - 1; i >= 0; i-- {
		if k := b.keys[i]; k>>16 < cpu || k&0xffff < mem {
			yield(b.cells[i])
		}
	}
}

// ordered is a set in the order of ids, kept in short runs so that a change moves
// little whatever its size.
type ordered[T item] struct {
	runs [][]entry[T] // none is empty, unless it is the only one
	n    int
}

// entry has what most searches ask beside the pointer: they go over many, and follow
// few.
type entry[T item] struct {
	order order
	space Size
	t     T
}

const maxRun = 128

// run is where t belongs.
func (o *ordered[T]) run(t T, at order) int {
	lo, hi := 0, len(o.runs)-1
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if r := o.runs[mid]; before(r[len(r)-1].order, r[len(r)-1].t, at, t) {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

// find is where in a run t is, or belongs.
func find[T item](r []entry[T], t T, at order) int {
	lo, hi := 0, len(r)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if before(r[mid].order, r[mid].t, at, t) {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

func (o *ordered[T]) insert(t T) {
	o.n++
	at := t.order()
	if len(o.runs) == 0 {
		o.runs = append(o.runs, append(make([]entry[T], 0, 4), entry[T]{at, t.space(), t}))
		return
	}
	i := o.run(t, at)
	r := o.runs[i]
	r = slices.Insert(r, find(r, t, at), entry[T]{at, t.space(), t})
	o.runs[i] = r
	if len(r) > maxRun {
		right := append(make([]entry[T], 0, maxRun), r[maxRun/2:]...)
		clear(r[maxRun/2:])
		o.runs[i] = r[:maxRun/2]
		o.runs = slices.Insert(o.runs, i+1, right)
	}
}

func (o *ordered[T]) remove(t T) {
	if o.n == 0 {
		return
	}
	at := t.order()
	i := o.run(t, at)
	r := o.runs[i]
	j := find(r, t, at)
	if j == len(r) || r[j].order != at || r[j].t.id() != t.id() {
		return
	}
	o.n--
	o.runs[i] = slices.Delete(r, j, j+1)
	switch {
	case len(r) > 1:
	case len(o.runs) > 1:
		o.runs = slices.Delete(o.runs, i, i+1)
	case cap(r) > 8: // a large one is not worth keeping
		o.runs = nil
	}
}

// has says whether t is in.
func (o *ordered[T]) has(t T) bool {
	if o.n == 0 {
		return false
	}
	at := t.order()
	r := o.runs[o.run(t, at)]
	j := find(r, t, at)
	return j < len(r) && r[j].order == at && r[j].t.id() == t.id()
}

// first is the first n in order, fewer if there are not so many.
func (o *ordered[T]) first(n int) []T {
	out := make([]T, 0, min(n, o.n))
	o.all(func(t T) bool {
		if len(out) < n {
			out = append(out, t)
		}
		return len(out) < n
	})
	return out
}

// all calls yield with each in order until it says stop, and says whether it did not.
func (o *ordered[T]) all(yield func(T) bool) bool {
	for _, r := range o.runs {
		for i := range r {
			if !yield(r[i].t) {
				return false
			}
		}
	}
	return true
}

func compareID[T interface{ id() string }](t T, id string) int {
	return strings.Compare(t.id(), id)
}

func insertByID[T interface{ id() string }](list []T, t T) []T {
	i, _ := slices.BinarySearchFunc(list, t.id(), compareID[T])
	return slices.Insert(list, i, t)
}

func removeByID[T interface{ id() string }](list []T, t T) []T {
	if i, ok := slices.BinarySearchFunc(list, t.id(), compareID[T]); ok {
		return slices.Delete(list, i, i+1)
	}
	return list
}

type serviceKey struct{ project, service string }

// box counts who is inside something: a machine, a host, a host's own kernel.
type box struct {
	services tallies
	members  []*container // in any order; see byID
	anti     []*container // those with anti rules, by id
	level    uint8        // which of its places a member has here
	sorted   bool         // members are by id
}

// The levels of boxes: a container is in one of each at most.
const (
	levelHost   = iota // host.all
	levelKernel        // machine.in, or host.metal
)

func (b *box) add(c *container) {
	c.place[b.level] = int32(len(b.members))
	b.members = append(b.members, c)
	b.sorted = len(b.members) == 1
	if c.Service != "" {
		b.services.add(c.service())
	}
	if len(c.Anti) > 0 {
		b.anti = insertByID(b.anti, c)
	}
}

func (b *box) remove(c *container) {
	i, last := int(c.place[b.level]), len(b.members)-1
	if i < last { // the last one takes its place
		o := b.members[last]
		b.members[i], o.place[b.level] = o, int32(i)
		b.sorted = false
	}
	b.members[last] = nil
	b.members = b.members[:last]
	if c.Service != "" {
		b.services.remove(c.service())
	}
	if len(c.Anti) > 0 {
		b.anti = removeByID(b.anti, c)
	}
}

// byID is the members in the order of ids. It sorts them when they are not: what only
// reads the state goes over members instead.
func (b *box) byID() []*container {
	if !b.sorted {
		slices.SortFunc(b.members, func(x, y *container) int { return strings.Compare(x.ID, y.ID) })
		for i, c := range b.members {
			c.place[b.level] = int32(i)
		}
		b.sorted = true
	}
	return b.members
}

func (b *box) count(k serviceKey) int {
	if k.service == "" {
		return 0
	}
	return b.services.count(k)
}

type groupKey struct {
	isolation Isolation
	project   string
}

func groupOf(i Isolation, project string) groupKey {
	if i == Shared {
		project = ""
	}
	return groupKey{i, project}
}

// group is the machines whose kernel a kind of container may share.
type group struct {
	free   buckets[*machine] // by what is free now
	room   buckets[*machine] // by what could be free after growing
	closed int               // stopping, or on a host that takes nothing new
}

func (g *group) size() int {
	if g == nil {
		return 0
	}
	return g.room.n + g.closed
}

type portKey struct {
	protocol string
	port     uint16
}

func (p Port) key() portKey {
	if p.Protocol == "" {
		return portKey{"tcp", p.Port}
	}
	return portKey{strings.ToLower(p.Protocol), p.Port}
}

func (p Port) anyAddress() bool { return p.IP == "" || p.IP == "0.0.0.0" || p.IP == "::" }

func (p Port) overlaps(q Port) bool {
	return p.key() == q.key() && p.Port != 0 && (p.anyAddress() || q.anyAddress() || p.IP == q.IP)
}
