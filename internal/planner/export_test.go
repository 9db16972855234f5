package planner

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// Consistent compares every index with one built anew from the same facts.
func (s *State) Consistent() error {
	n := s.Clone()
	if a, b := summary(s), summary(n); !reflect.DeepEqual(a, b) {
		for k := range b {
			if !reflect.DeepEqual(a[k], b[k]) {
				return fmt.Errorf("index %s is %v, want %v", k, a[k], b[k])
			}
		}
		return fmt.Errorf("indexes are %v, want %v", a, b)
	}
	return nil
}

func ids[T interface{ id() string }](list []T) []string {
	out := []string{}
	for _, t := range list {
		out = append(out, t.id())
	}
	return out
}

func cells[T item](b *buckets[T]) map[string]any {
	out := map[string]any{"n": b.n, "keys": slices.Clone(b.keys)}
	for i, k := range b.keys {
		c := b.cells[i]
		out[fmt.Sprint("cell", k)] = slices.Clone(b.keys)
		delete(out, fmt.Sprint("cell", k))
		if c.n > 0 {
			list := []string{}
			c.all(func(t T) bool { list = append(list, t.id()); return true })
			out[fmt.Sprint("cell", k)] = list
		}
	}
	if len(b.keys) == 0 {
		out["keys"] = []uint32{}
	}
	return out
}

func (b *box) summary() any {
	return []any{ids(b.byID()), fmt.Sprint(b.services.all()), ids(b.anti)}
}

func summary(s *State) map[string]any {
	out := map[string]any{"open": cells(&s.open), "antis": fmt.Sprint(s.antis), "kinds": s.perKind, "volumes": fmt.Sprint(s.volumes)}
	for id, h := range s.hosts {
		ports := []string{}
		for k, list := range h.ports {
			ports = append(ports, fmt.Sprint(k, ids(list)))
		}
		slices.Sort(ports)
		out["host "+id] = []any{h.machinesSize, h.metalSize, ids(h.machines), h.all.summary(), h.metal.summary(), ports, h.indexed}
		claims := []string{}
		for _, x := range h.claims {
			claims = append(claims, fmt.Sprint(x.from.ID, x.size, h.breaks(x.from)))
		}
		slices.Sort(claims)
		out["guarantee "+id] = []any{claims, h.reserve, ids(h.shadows), ids(h.broken.first(h.broken.n))}
	}
	for id, m := range s.machines {
		if m.indexed && (m.slot != m.free() || m.reach != m.room()) {
			out["stale "+id] = []any{m.slot, m.free(), m.reach, m.room()}
		}
		out["machine "+id] = []any{m.Machine, m.sum, m.in.summary(), m.indexed}
	}
	for id, c := range s.containers {
		out["container "+id] = []any{c.machineID(), c.hostID(), c.need}
	}
	for v, list := range s.users {
		out["users "+v] = ids(list)
	}
	for k, on := range s.services {
		list := []string{}
		for h, n := range on {
			list = append(list, fmt.Sprint(h.ID, n))
		}
		slices.Sort(list)
		out[fmt.Sprint("service ", k)] = list
	}
	out["exposed"], out["breakers"], out["standing"] = ids(s.exposed.first(s.exposed.n)), ids(s.breakers), ids(s.standing)
	keys := slices.SortedFunc(maps.Keys(s.groups), func(a, b groupKey) int {
		return cmp.Or(cmp.Compare(a.isolation, b.isolation), cmp.Compare(a.project, b.project))
	})
	for _, k := range keys {
		g := s.groups[k]
		out[fmt.Sprint("group ", k)] = []any{cells(&g.free), cells(&g.room), g.closed}
	}
	return out
}
