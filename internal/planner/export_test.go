package planner

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
)

// Consistent compares every index with one built anew from the same facts, and with a
// copy's.
func (s *State) Consistent() error {
	if err := s.same(s.anew()); err != nil {
		return err
	}
	if err := s.indifference(); err != nil {
		return err
	}
	n := s.Clone()
	if err := s.same(n); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	if err := s.apart(n); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	if err := n.same(n.anew()); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return nil
}

// indifference checks that where no rules matter none turns a container away.
func (s *State) indifference() error {
	for _, c := range s.containers {
		for _, h := range s.hosts {
			if !s.indifferent(c, h) {
				continue
			}
			x := []miss{s.hostRules(c, h), s.volumeRule(c, h, noMachine), s.nearRule(c, &noMachine.in, "", "machine"), s.residentRule(c, h)}
			for _, m := range h.machines {
				x = append(x, s.volumeRule(c, h, m), antiRule(c, &m.in, "machine"), s.nearRule(c, &m.in, "", "machine"))
			}
			for _, x := range x {
				if !x.ok() {
					return fmt.Errorf("rules should not matter between %s and %s, but %s does: %s", c.ID, h.ID, x.rule, x.detail)
				}
			}
		}
	}
	return nil
}

// apart checks that n points at nothing of s.
func (s *State) apart(n *State) error {
	seen := map[uintptr]bool{}
	walk(reflect.ValueOf(s).Elem(), seen, nil)
	var shared string
	walk(reflect.ValueOf(n).Elem(), map[uintptr]bool{}, func(v reflect.Value) {
		if seen[v.Pointer()] && v.Type() != reflect.TypeFor[*demands]() && shared == "" {
			shared = v.Type().String()
		}
	})
	if shared != "" {
		return fmt.Errorf("a %s is shared with the original", shared)
	}
	return nil
}

// walk calls found with each pointer and map that v leads to; demands never change.
func walk(v reflect.Value, seen map[uintptr]bool, found func(reflect.Value)) {
	switch v.Kind() {
	case reflect.Pointer, reflect.Map:
		if v.IsNil() || v.Type() == reflect.TypeFor[*demands]() {
			return
		}
		if seen[v.Pointer()] {
			return
		}
		seen[v.Pointer()] = true
		if found != nil {
			found(v)
		}
		if v.Kind() == reflect.Pointer {
			walk(v.Elem(), seen, found)
			return
		}
		for i := v.MapRange(); i.Next(); {
			walk(i.Key(), seen, found)
			walk(i.Value(), seen, found)
		}
	case reflect.Slice:
		if v.Len() > 0 && v.Type().Elem().Kind() != reflect.Uint8 && !seen[v.Pointer()] {
			if found != nil {
				found(v)
			}
			for i := range v.Len() {
				walk(v.Index(i), seen, found)
			}
			seen[v.Pointer()] = true
		}
	case reflect.Array:
		for i := range v.Len() {
			walk(v.Index(i), seen, found)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			walk(v.Field(i), seen, found)
		}
	}
}

// anew makes the same state from the facts alone.
func (s *State) anew() *State {
	n := New()
	for _, id := range slices.Sorted(maps.Keys(s.hosts)) {
		h := newHost(s.hosts[id].Host)
		h.Labels = maps.Clone(h.Labels)
		n.hosts[id] = h
		n.indexHost(h)
	}
	for _, id := range slices.Sorted(maps.Keys(s.machines)) {
		n.addMachine(&machine{Machine: s.machines[id].Machine})
	}
	for _, id := range slices.Sorted(maps.Keys(s.containers)) {
		c := s.containers[id]
		k := &container{
			ID: c.ID, Project: n.name(c.Project), Service: n.name(c.Service), need: c.need, demands: c.demands, quota: n.quota(c.Project),
			Isolation: c.Isolation, Class: c.Class, Uncovered: c.Uncovered, Stateful: c.Stateful, plain: c.plain,
		}
		n.containers[c.ID] = k
		if c.host != nil {
			n.place(k, n.hosts[c.host.ID], n.machines[c.machineID()])
		}
	}
	maps.Copy(n.volumes, s.volumes)
	n.policy = s.policy
	for _, id := range slices.Sorted(maps.Keys(s.containers)) {
		c, k := s.containers[id], n.containers[id]
		for slot, g := range c.standby {
			if g != nil {
				n.stand(k, slot, n.hosts[g.ID])
			}
		}
		n.setExposed(k, c.exposed)
	}
	for _, h := range s.breakers {
		var from []*host
		h.broken.all(func(f *host) bool { from = append(from, n.hosts[f.ID]); return true })
		n.breakClaims(n.hosts[h.ID], from, true)
	}
	for _, p := range slices.Sorted(maps.Keys(s.pools)) {
		n.setPool(s.pools[p].Pool)
	}
	for k, q := range s.quotas {
		n.quota(k).Quota = q.Quota
	}
	n.rev = s.rev
	return n
}

func (s *State) same(n *State) error {
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

// counts is how many there are on each host, by id.
func counts(on map[*host]int) []string {
	list := []string{}
	for h, n := range on {
		list = append(list, fmt.Sprint(h.ID, n))
	}
	slices.Sort(list)
	return list
}

func summary(s *State) map[string]any {
	out := map[string]any{"open": cells(&s.open), "kinds": s.perKind, "volumes": fmt.Sprint(s.volumes)}
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
		out[fmt.Sprint("service ", k)] = counts(on)
	}
	for project, on := range s.wary {
		out["wary "+project] = counts(on)
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
