package simulate

import (
	"cmp"
	"slices"
)

// maxNodes bounds how many places the search with second thoughts tries.
const maxNodes = 400

// enough says whether the hosts have as much left in all as k.order needs, and
// each of it fits somewhere.
func (k *cover) enough() bool {
	var have, need Size
	for i := range k.hosts.n {
		have = have.add(k.hosts.at(i).max(Size{}))
	}
	for _, c := range k.order {
		need = need.add(c.Need)
		if k.hosts.first(c.Need) < 0 {
			return false
		}
	}
	return need.fits(have)
}

// search places what is in todo in the free part of hosts, with second thoughts:
// always the container next that the fewest hosts have room for, on the host first
// that it leaves the least of.
func (k *cover) search(todo []*Container, overhead Size) bool {
	if len(todo) == 0 {
		return true
	}
	next, fewest := 0, k.hosts.n+1
	for i, c := range todo {
		if i > 0 && c.Need == todo[i-1].Need && c.Machine == todo[i-1].Machine {
			continue
		}
		n := 0
		for j := range k.hosts.n {
			if k.needOn(c, j, overhead).fits(k.hosts.at(j)) {
				n++
			}
		}
		if n < fewest {
			next, fewest = i, n
		}
	}
	c := todo[next]
	var places []int
	for j := range k.hosts.n {
		if k.needOn(c, j, overhead).fits(k.hosts.at(j)) {
			places = append(places, j)
		}
	}
	slices.SortFunc(places, func(a, b int) int {
		return cmp.Or(cmp.Compare(leftover(k.hosts.at(a), k.hostAt[a].Size), leftover(k.hosts.at(b), k.hostAt[b].Size)), cmp.Compare(a, b))
	})
	rest := slices.Delete(slices.Clone(todo), next, next+1)
	for _, j := range places {
		if k.nodes--; k.nodes < 0 {
			return false
		}
		need, mark := k.needOn(c, j, overhead), len(k.undo)
		k.take(&k.hosts, j, need)
		if k.search(rest, overhead) {
			if m := k.home(c, j); m != nil {
				k.making.by(m, need)
			} else {
				k.making.on(k.hostAt[j], need)
			}
			return true
		}
		k.rollbackTo(mark)
	}
	return false
}

// home is a running machine on host j that c may share, or nil.
func (k *cover) home(c *Container, j int) *Machine {
	if g := k.groups[c.Machine.Project]; g != nil && !c.Machine.Own {
		return g.home[j]
	}
	return nil
}

// needOn is what c takes of host j: its machine's overhead, too, where it has none.
func (k *cover) needOn(c *Container, j int, overhead Size) Size {
	if k.home(c, j) != nil {
		return c.Need
	}
	return c.Need.add(overhead)
}
