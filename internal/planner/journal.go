package planner

import "slices"

// journal is what was done to the state, one primitive change a step, so that it can
// be taken back, and done again by Commit exactly as it was tried.
type journal []step

// step is a change with its inverse: one of the frequent ones, or two functions.
type step struct {
	op       op
	slot     int
	c        *container
	h        *host
	m        *machine
	from, to Size
	again    func()
	back     func()
}

type op uint8

const (
	opFunc   op = iota // again, and back
	opPlace            // c into m, or onto h itself
	opStand            // h is standby host number slot of c
	opResize           // m, from one size to another
)

// note adds a step that has been done; a nil journal keeps nothing.
func (j *journal) note(do, undo func()) { j.step(step{again: do, back: undo}) }

func (j *journal) step(x step) {
	if j != nil {
		*j = append(*j, x)
	}
}

func (s *State) redo(x *step) {
	switch x.op {
	case opPlace:
		s.place(x.c, x.h, x.m)
	case opStand:
		s.stand(x.c, x.slot, x.h)
	case opResize:
		s.resize(x.m, x.to)
	default:
		x.again()
	}
}

func (s *State) undo(x *step) {
	switch x.op {
	case opPlace:
		s.unplace(x.c)
	case opStand:
		s.unstand(x.c, x.slot)
	case opResize:
		s.resize(x.m, x.from)
	default:
		x.back()
	}
}

// rollback takes back all steps from number to on.
func (s *State) rollback(j *journal, to int) {
	for i := len(*j) - 1; i >= to; i-- {
		s.undo(&(*j)[i])
	}
	*j = (*j)[:to]
}

// maxTriedPlans bounds how many plans of one revision keep the way there.
const maxTriedPlans = 4

// maxSpareSteps bounds the journals whose memory is used again.
const maxSpareSteps = 64

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
	for i := range p.Actions {
		if a := &p.Actions[i]; a.Kind == Boot {
			if t.booted == nil {
				t.booted = map[string]*machine{}
			}
			t.booted[a.Machine] = d.s.machines[a.Machine]
		}
	}
	s := d.s
	if len(s.tried) > 0 && s.tried[0].rev != s.rev {
		s.forgetTried(len(s.tried))
	}
	if len(s.tried) == maxTriedPlans {
		s.forgetTried(1)
	}
	s.tried = append(s.tried, t)
}

// forgetTried drops the n oldest plans that were tried; the memory of one small journal
// is for the next decision.
func (s *State) forgetTried(n int) {
	for i := range s.tried[:n] {
		if j := s.tried[i].steps; cap(j) <= maxSpareSteps {
			clear(j)
			s.spare = j[:0]
		}
	}
	s.tried = slices.Delete(s.tried, 0, n)
}

// replay does again what made p, when nothing has changed since.
func (s *State) replay(p *Plan, rename map[string]string) bool {
	i := slices.IndexFunc(s.tried, func(x tried) bool { return x.plan == p && x.rev == s.rev && x.actions == len(p.Actions) })
	if i < 0 {
		return false
	}
	t := &s.tried[i]
	if len(t.booted) > 0 && !s.christen(t.booted, rename) {
		return false
	}
	for i := range t.steps {
		s.redo(&t.steps[i])
	}
	s.forgetTried(len(s.tried))
	return true
}

// christen gives booted machines their names, unless those are taken.
func (s *State) christen(booted map[string]*machine, rename map[string]string) bool {
	seen := map[string]bool{}
	for temporary := range booted {
		id := named(temporary, rename)
		if s.machines[id] != nil || seen[id] {
			return false // the slow way has the right error
		}
		seen[id] = true
	}
	for temporary, m := range booted {
		m.ID = named(temporary, rename)
	}
	return true
}
