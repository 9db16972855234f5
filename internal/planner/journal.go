package planner

import "slices"

// journal is what was done to the state, one primitive change a step, so that it can
// be taken back, and done again by Commit exactly as it was tried.
type journal []step

type step struct{ do, undo func() }

// note adds a step that has been done; a nil journal keeps nothing.
func (j *journal) note(do, undo func()) {
	if j != nil {
		*j = append(*j, step{do, undo})
	}
}

// rollback takes back all steps from number to on.
func rollback(j *journal, to int) {
	for i := len(*j) - 1; i >= to; i-- {
		(*j)[i].undo()
	}
	*j = (*j)[:to]
}

// maxTriedPlans bounds how many plans of one revision keep the way there.
const maxTriedPlans = 4

// tried is a plan that a state has made, with the way there.
type tried struct {
	plan    *Plan
	actions int
	rev     uint64
	steps   journal
	booted  map[string]*machine // by temporary name
}

// remember keeps the way to p, for a Commit that follows.
func (d *decision) remember(p *Plan) {
	t := tried{plan: p, actions: len(p.Actions), rev: d.s.rev, steps: d.undo}
	for _, a := range p.Actions {
		if a.Kind == Boot {
			if t.booted == nil {
				t.booted = map[string]*machine{}
			}
			t.booted[a.Machine] = d.s.machines[a.Machine]
		}
	}
	s := d.s
	s.tried = slices.DeleteFunc(s.tried, func(x tried) bool { return x.rev != s.rev })
	if len(s.tried) == maxTriedPlans {
		s.tried = slices.Delete(s.tried, 0, 1)
	}
	s.tried = append(s.tried, t)
}

// replay does again what made p, when nothing has changed since.
func (s *State) replay(p *Plan, rename map[string]string) bool {
	i := slices.IndexFunc(s.tried, func(x tried) bool { return x.plan == p && x.rev == s.rev && x.actions == len(p.Actions) })
	if i < 0 {
		return false
	}
	t := s.tried[i]
	seen := map[string]bool{}
	for temporary := range t.booted {
		id := named(temporary, rename)
		if s.machines[id] != nil || seen[id] {
			return false // the slow way has the right error
		}
		seen[id] = true
	}
	for temporary, m := range t.booted {
		m.ID = named(temporary, rename)
	}
	for _, x := range t.steps {
		x.do()
	}
	s.tried = nil
	return true
}
