package simulate

import (
	"maps"
	"slices"

	"tandem/internal/planner"
)

// flight is a machine that migrates, or is about to: to the planner it is where it
// shall be already, and takes nothing new until it is there.
type flight struct {
	from, to string
	begun    bool
	// keeps says that its old host stays on: what it still takes there is kept in
	// the planner's books by a machine of that size.
	keeps bool
}

// still is the name of what stands for a machine where it leaves.
func still(machine string) string { return "leaving " + machine }

// flies notes a migration that was decided.
func (t *tandem) flies(w *World, a *planner.Action) {
	m, ok := t.s.Machine(a.Machine)
	w.must(ok, "the planner migrates machine %q, which it does not know", a.Machine)
	f := &flight{from: a.FromHost, to: a.Host, keeps: t.rooming}
	t.flights[a.Machine] = f
	m.Stopping = true
	t.must(w, t.s.SetMachine(m), "machine "+a.Machine)
	if f.keeps {
		t.must(w, t.s.SetMachine(planner.Machine{ID: still(a.Machine), Host: f.from, Project: m.Project, Isolation: m.Isolation,
			Size: m.Size, Ceiling: m.Size, Stopping: true}), "machine "+a.Machine)
	}
}

// landed looks which migrations are over.
func (t *tandem) landed(w *World) {
	if len(t.flights) == 0 {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(t.flights)) {
		f, m := t.flights[id], t.machines[id]
		if _, known := t.s.Machine(id); !known || f.begun && m != nil && m.target == nil && m.Host.ID == f.to {
			t.endFlight(w, id)
		}
	}
}

func (t *tandem) endFlight(w *World, id string) {
	if t.flights[id].keeps {
		t.s.RemoveMachine(still(id))
	}
	delete(t.flights, id)
	if m, ok := t.s.Machine(id); ok {
		m.Stopping = false
		t.must(w, t.s.SetMachine(m), "machine "+id)
	}
}

// stranded takes back, when a host fails, the migrations from and to it: the
// machine is, or was, where it came from.
func (t *tandem) stranded(w *World, failed string) {
	for _, id := range slices.Sorted(maps.Keys(t.flights)) {
		f := t.flights[id]
		if f.from != failed && f.to != failed {
			continue
		}
		t.forget(func(a *planner.Action) bool { return a.Kind == planner.Migrate && a.Machine == id })
		off := false
		t.forget(func(a *planner.Action) bool {
			if a.Kind == planner.PowerOff && a.Host == f.from {
				off = true
			}
			return a.Kind == planner.PowerOff && a.Host == f.from
		})
		if off {
			t.tell(w, t.known[f.from], false, false)
		}
		t.endFlight(w, id)
		if m, ok := t.s.Machine(id); ok {
			m.Host = f.from
			t.must(w, t.s.SetMachine(m), "machine "+id)
		}
	}
}

// roomFor asks, after an arrival, that there be room for another one twice the usual
// size in a machine of the same group.
func (t *tandem) roomFor(w *World, c *Container) {
	if w.Isolation != IsolationProject || w.Now() < t.lacking[c.Project] {
		return
	}
	room := Size{2 * t.asked.CPU / t.arrived, 2 * t.asked.Memory / t.arrived}
	plan, err := t.s.Decide(planner.Question{Room: &planner.Room{Isolation: planner.Project, Project: c.Project, Size: planner.Size(room),
		Budget: planner.Budget{Machines: 1, Bytes: tandemRoom}}})
	t.must(w, err, "a question")
	if len(plan.Unplaced) > 0 {
		t.lacking[c.Project] = w.Now() + tandemScan
		return
	}
	t.rooming = true
	t.carryOut(w, plan)
	t.rooming = false
}

// foldMachines asks which machines, to which nothing has come for a while, could be
// emptied into others of their group. Where all share, a machine is a host, and
// emptying hosts is another question.
func (t *tandem) foldMachines(w *World) {
	if w.Isolation != IsolationProject {
		return
	}
	var from []string
	for _, h := range w.Hosts() {
		for _, m := range h.Machines {
			id := t.names[m]
			if len(h.Machines) > 1 && len(m.Containers) > 0 && t.flights[id] == nil && w.Now()-t.newest[id] >= tandemSettle {
				from = append(from, id)
			}
		}
	}
	if len(from) == 0 {
		return
	}
	plan, err := t.s.Decide(planner.Question{Fold: &planner.Fold{Budget: planner.Budget{Containers: t.budget(w).Containers, Bytes: -1}, From: from}})
	t.must(w, err, "a question")
	t.carryOut(w, plan)
}

// carry is what one stream of migrations copies between two questions.
func (t *tandem) carry(w *World) int64 { return w.migrateRate * int64(tandemFold/1000) }

// budget is what may be disturbed now.
func (t *tandem) budget(w *World) planner.Budget {
	b := planner.Budget{Containers: int(t.credit), Machines: -1, Bytes: t.carry(w)}
	if t.o.Budget < 0 {
		b.Containers = -1
	}
	return b
}
