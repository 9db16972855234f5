package planner

import (
	"fmt"
	"strings"
)

// placed is a container with the option that won, and those that did not.
type placed struct {
	c       *container
	chosen  *candidate
	machine *machine
	weighed []*candidate
	near    string // "m-5 was 1.2 CPU short"
}

// reason keeps what was weighed for a placement. Machines are named as they are
// in the plan; see Plan.Rename.
func (f *finder) reason(chosen int, m *machine) Reason {
	p := placed{c: f.c, chosen: &f.found[chosen], machine: m, near: f.nearest()}
	keep := f.notable(chosen)
	p.weighed = make([]*candidate, len(keep))
	r := Reason{Exclusions: f.list(), Options: make([]Option, len(keep))}
	terms := make([]Term, 0, len(keep)*nTerms)
	for j, i := range keep {
		a := &f.found[i]
		p.weighed[j] = a
		o := Option{Action: string(a.kind), Host: a.host.ID, Cost: a.cost, Seconds: a.seconds, Pinned: a.pinned, Chosen: i == chosen}
		if a.machine != nil {
			o.Machine = a.machine.ID
		}
		start := len(terms)
		for t, v := range a.terms {
			if v != 0 {
				terms = append(terms, Term{Name: termNames[t], Value: v})
			}
		}
		if len(terms) > start {
			o.Terms = terms[start:len(terms):len(terms)]
		}
		r.Options[j] = o
	}
	r.Summary = p.summary()
	return r
}

// summary is one sentence: what was done, what the next best would have cost, and
// who nearly made it.
func (p *placed) summary() string {
	a := p.chosen
	var parts []string
	switch a.kind {
	case Place:
		if a.machine.fresh {
			parts = append(parts, fmt.Sprintf("shares the machine that this plan boots on %s: no overhead of its own", a.host.ID))
		} else {
			parts = append(parts, fmt.Sprintf("took a free slot of %s on %s: no wait and nothing bound", a.machine.ID, a.host.ID))
		}
	case Grow:
		if a.machine.fresh {
			parts = append(parts, fmt.Sprintf("shares the machine that this plan boots on %s, made %s larger for it: no overhead of its own", a.host.ID, a.grown))
		} else {
			parts = append(parts, fmt.Sprintf("grew %s by %s on %s: %s and no new overhead", a.machine.ID, a.grown, a.host.ID, secondsText(a.seconds)))
		}
	case Boot:
		over := a.to.sub(p.c.need).Memory + a.host.MachineExtra.Memory
		parts = append(parts, fmt.Sprintf("booted a machine on %s: %s and %s beside what it asks for",
			a.host.ID, secondsText(a.seconds), memoryText(max(0, over))))
	case PlaceM:
		parts = append(parts, fmt.Sprintf("runs on %s itself: no machine, no overhead", a.host.ID))
	}
	if alt := p.alternative(); alt != "" {
		parts = append(parts, alt)
	}
	if p.near != "" {
		parts = append(parts, p.near)
	}
	return strings.Join(parts, "; ")
}

// alternative says what the best option of another action, or else of another
// place, would have cost.
func (p *placed) alternative() string {
	var alt *candidate
	for _, b := range p.weighed {
		if b == p.chosen {
			continue
		}
		if b.kind != p.chosen.kind {
			alt = b
			break
		}
		if alt == nil {
			alt = b
		}
	}
	if alt == nil {
		return ""
	}
	var what string
	switch alt.kind {
	case Place:
		what = "a free slot of " + alt.machine.ID
	case Grow:
		what = "growing " + alt.machine.ID
	case Boot:
		what = "booting another machine"
		if p.chosen.kind == Boot || alt.host != p.chosen.host {
			what = "booting a machine on " + alt.host.ID
		}
	case PlaceM:
		what = alt.host.ID
	}
	var costs []string
	switch more := alt.pinned - p.chosen.pinned; {
	case more > 0:
		costs = append(costs, "pinned "+memoryText(more)+" more")
	case more < 0:
		costs = append(costs, "pinned "+memoryText(-more)+" less")
	}
	if alt.seconds != p.chosen.seconds {
		costs = append(costs, "taken "+secondsText(alt.seconds))
	}
	if x, y := alt.terms[termSpread], p.chosen.terms[termSpread]; x > y {
		costs = append(costs, "put more replicas of "+p.c.Service+" together")
	} else if x < y {
		costs = append(costs, "spread "+p.c.Service+" better")
	}
	if len(costs) == 0 {
		return what + " would have fitted less tightly"
	}
	return what + " would have " + join(costs)
}

func join(list []string) string {
	if len(list) == 1 {
		return list[0]
	}
	return strings.Join(list[:len(list)-1], ", ") + " and " + list[len(list)-1]
}

// Rename gives booted machines their names, in actions, reasons and sentences.
func (p *Plan) Rename(names map[string]string) {
	for i := range p.Actions {
		a := &p.Actions[i]
		a.Machine = named(a.Machine, names)
		a.Reason.rename(names)
	}
	for i := range p.Unplaced {
		p.Unplaced[i].Reason.rename(names)
		p.Unplaced[i].Remedy = renameText(p.Unplaced[i].Remedy, names)
	}
}

func (r *Reason) rename(names map[string]string) {
	r.Summary = renameText(r.Summary, names)
	for j := range r.Options {
		r.Options[j].Machine = named(r.Options[j].Machine, names)
	}
	for j := range r.Exclusions {
		r.Exclusions[j].Detail = renameText(r.Exclusions[j].Detail, names)
	}
}

// renameText replaces whole words that are temporary names.
func renameText(text string, names map[string]string) string {
	if !strings.Contains(text, "new-") {
		return text
	}
	words := strings.Split(text, " ")
	for i, w := range words {
		core := strings.Trim(w, "(),;:.")
		if n, ok := names[core]; ok {
			words[i] = strings.Replace(w, core, n, 1)
		}
	}
	return strings.Join(words, " ")
}
