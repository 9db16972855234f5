package planner

import (
	"slices"
	"strings"
)

// buckets is an index of things by their free capacity: a cell for each pair of
// classes (CPU, memory), inside a cell by id. A look-up visits the cells that may
// fit, tightest first, and never sees the others; an update touches two cells.
type buckets[T interface{ id() string }] struct {
	keys  []uint32 // of the cells in use, ascending
	cells map[uint32]*ordered[T]
	n     int
}

func key(free Size) uint32 { return class(free.CPU)<<16 | class(free.Memory) }

func (b *buckets[T]) add(k uint32, t T) {
	if b.cells == nil {
		b.cells = map[uint32]*ordered[T]{}
	}
	cell := b.cells[k]
	if cell == nil {
		cell = &ordered[T]{}
		b.cells[k] = cell
	}
	if cell.n == 0 {
		i, _ := slices.BinarySearch(b.keys, k)
		b.keys = slices.Insert(b.keys, i, k)
	}
	cell.insert(t)
	b.n++
}

func (b *buckets[T]) remove(k uint32, t T) {
	cell := b.cells[k]
	cell.remove(t)
	b.n--
	if cell.n > 0 {
		return // an empty cell stays for the next that comes: no garbage
	}
	if i, ok := slices.BinarySearch(b.keys, k); ok {
		b.keys = slices.Delete(b.keys, i, i+1)
	}
}

// fitting calls yield with what may have room for need, tightest cells first,
// until it says stop.
func (b *buckets[T]) fitting(need Size, yield func(T) bool) {
	cpu, mem := class(need.CPU), class(need.Memory)
	i, _ := slices.BinarySearch(b.keys, cpu<<16)
	for _, k := range b.keys[i:] {
		if k&0xffff >= mem && !b.cells[k].all(yield) {
			return
		}
	}
}

// roomiest calls yield with what may have room for need, the largest cells first.
func (b *buckets[T]) roomiest(need Size, yield func(T) bool) {
	cpu, mem := class(need.CPU), class(need.Memory)
	for i := len(b.keys) - 1; i >= 0 && b.keys[i]>>16 >= cpu; i-- {
		if k := b.keys[i]; k&0xffff >= mem && !b.cells[k].all(yield) {
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
			yield(b.cells[k])
		}
	}
}

// ordered is a set in the order of ids, kept in short runs so that a change moves
// little whatever its size.
type ordered[T interface{ id() string }] struct {
	runs [][]T
	n    int
}

const maxRun = 128

// run is where id belongs.
func (o *ordered[T]) run(id string) int {
	lo, hi := 0, len(o.runs)-1
	for lo < hi {
		mid := (lo + hi) / 2
		if r := o.runs[mid]; r[len(r)-1].id() < id {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

func (o *ordered[T]) insert(t T) {
	o.n++
	if len(o.runs) == 0 {
		o.runs = append(o.runs, append(make([]T, 0, 4), t))
		return
	}
	i := o.run(t.id())
	r := insertByID(o.runs[i], t)
	o.runs[i] = r
	if len(r) > maxRun {
		right := append(make([]T, 0, maxRun), r[maxRun/2:]...)
		clear(r[maxRun/2:])
		o.runs[i] = r[:maxRun/2]
		o.runs = slices.Insert(o.runs, i+1, right)
	}
}

func (o *ordered[T]) remove(t T) {
	if len(o.runs) == 0 {
		return
	}
	i := o.run(t.id())
	before := len(o.runs[i])
	r := removeByID(o.runs[i], t)
	o.n -= before - len(r)
	o.runs[i] = r
	if len(r) == 0 && len(o.runs) > 1 {
		o.runs = slices.Delete(o.runs, i, i+1)
	} else if len(r) == 0 {
		o.runs = nil
	}
}

// has says whether the one with that id is in.
func (o *ordered[T]) has(id string) bool {
	if o.n == 0 {
		return false
	}
	_, ok := slices.BinarySearchFunc(o.runs[o.run(id)], id, compareID[T])
	return ok
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
		for _, t := range r {
			if !yield(t) {
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
	members  []*container // by id
	services map[serviceKey]int
	anti     []*container // those with anti rules, by id
}

func (b *box) add(c *container) {
	b.members = insertByID(b.members, c)
	if c.Service != "" {
		if b.services == nil {
			b.services = map[serviceKey]int{}
		}
		b.services[c.service()]++
	}
	if len(c.Anti) > 0 {
		b.anti = insertByID(b.anti, c)
	}
}

func (b *box) remove(c *container) {
	b.members = removeByID(b.members, c)
	if c.Service != "" {
		if k := c.service(); b.services[k] > 1 {
			b.services[k]--
		} else {
			delete(b.services, k)
		}
	}
	if len(c.Anti) > 0 {
		b.anti = removeByID(b.anti, c)
	}
}

func (b *box) count(k serviceKey) int {
	if k.service == "" {
		return 0
	}
	return b.services[k]
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
