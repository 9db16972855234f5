package planner

import (
	"fmt"
	"maps"
	"slices"
)

// trim stops machines that are empty for long enough and shrinks those larger
// than what they hold. When to ask, and what is long enough, is the caller's.
func (s *State) trim(t *Trim) (*Plan, error) {
	p := &Plan{Revision: s.rev}
	stopped := map[*machine]bool{}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(t.Idle))) {
		m := s.machines[id]
		if m == nil || m.Stopping || m.Pinned || len(m.in.members) > 0 || m.host.Down {
			continue // no longer as the caller saw it
		}
		stopped[m] = true
		p.Actions = append(p.Actions, Action{Kind: Stop, Machine: id, Host: m.Host, From: m.Size,
			Reason: Reason{Summary: fmt.Sprintf("%s is empty: stopping it frees %s on %s", id, m.Size.add(m.host.MachineExtra), m.Host)}})
	}
	if !t.Shrink {
		return p, nil
	}
	ids := slices.Compact(slices.Sorted(slices.Values(t.Only)))
	if t.Only == nil {
		ids = slices.Sorted(maps.Keys(s.machines))
	}
	for _, id := range ids {
		m := s.machines[id]
		if m == nil || stopped[m] || m.Stopping || m.host.Down || !m.host.Capabilities.Shrink {
			continue
		}
		to := m.shrunk()
		if to == m.Size {
			continue
		}
		p.Actions = append(p.Actions, Action{Kind: Shrink, Machine: id, Host: m.Host, From: m.Size, To: to,
			Reason: Reason{Summary: fmt.Sprintf("%s holds %s: shrinking it frees %s on %s", id, m.used(), m.Size.sub(to), m.Host)}})
	}
	return p, nil
}

// shrunk is the least size in steps below the present one that holds its
// containers, not below the host's base nor the user's minimum.
func (m *machine) shrunk() Size {
	want := m.used().max(m.host.Base).max(m.Min)
	st := m.host.steps()
	down := func(from, want, step int64) int64 {
		if want >= from {
			return from
		}
		return from - (from-want)/step*step
	}
	return Size{down(m.Size.CPU, want.CPU, st.CPU), down(m.Size.Memory, want.Memory, st.Memory)}
}
