package planner

import "strings"

// keptOptions bounds how many options a Reason keeps: the cheapest, the chosen one and
// the best of each action.
const keptOptions = maxOptions + 4

// placed is a container with the option that won, and those that did not.
type placed struct {
	c       *container
	chosen  *candidate
	weighed []*candidate
	near    *missed
}

// reason keeps what was weighed for a placement. Machines are named as they are
// in the plan; see Plan.Rename.
func (f *finder) reason(chosen int) Reason {
	var numbers [keptOptions]int
	keep := f.notable(numbers[:0], chosen)
	var kept [keptOptions]*candidate
	p := placed{c: f.c, chosen: &f.found[chosen], weighed: kept[:len(keep)], near: f.nearest()}
	n := 0
	for j, i := range keep {
		kept[j] = &f.found[i]
		for _, v := range kept[j].terms {
			if v != 0 {
				n++
			}
		}
	}
	r := Reason{Options: make([]Option, len(keep))}
	terms := make([]Term, 0, n)
	for j, i := range keep {
		a := &f.found[i]
		o := &r.Options[j]
		o.Action, o.Host, o.Cost, o.Seconds, o.Pinned, o.Chosen = string(a.kind), a.host.ID, a.cost, a.seconds, a.pinned, i == chosen
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
	}
	r.Exclusions, r.Summary = f.list(p.appendSummary)
	return r
}

// appendSummary appends one sentence: what was done, what the next best would have
// cost, and who nearly made it.
func (p *placed) appendSummary(b []byte) []byte {
	a := p.chosen
	switch host := a.host.ID; a.kind {
	case Place:
		if a.machine.fresh {
			b = appends(b, "shares the machine that this plan boots on ", host, ": no overhead of its own")
		} else {
			b = appends(b, "took a free slot of ", a.machine.ID, " on ", host, ": no wait and nothing bound")
		}
	case Grow:
		if a.machine.fresh {
			b = appends(b, "shares the machine that this plan boots on ", host, ", made ")
			b = append(a.grown.appendTo(b), " larger for it: no overhead of its own"...)
		} else {
			b = appends(b, "grew ", a.machine.ID, " by ")
			b = appends(a.grown.appendTo(b), " on ", host, ": ")
			b = append(appendSeconds(b, a.seconds), " and no new overhead"...)
		}
	case Boot:
		over := a.to.sub(p.c.need).Memory + a.host.MachineExtra.Memory
		b = appends(b, "booted a machine on ", host, ": ")
		b = append(appendSeconds(b, a.seconds), " and "...)
		b = append(appendMemory(b, max(0, over)), " beside what it asks for"...)
	case PlaceM:
		b = appends(b, "runs on ", host, " itself: no machine, no overhead")
	}
	b = p.appendAlternative(b)
	if p.near != nil {
		b = p.near.appendSentence(append(b, "; "...))
	}
	return b
}

// appendAlternative appends what the best option of another action, or else of another
// place, would have cost.
func (p *placed) appendAlternative(b []byte) []byte {
	var alt *candidate
	for _, o := range p.weighed {
		if o == p.chosen {
			continue
		}
		if o.kind != p.chosen.kind {
			alt = o
			break
		}
		if alt == nil {
			alt = o
		}
	}
	if alt == nil {
		return b
	}
	b = append(b, "; "...)
	switch alt.kind {
	case Place:
		b = appends(b, "a free slot of ", alt.machine.ID)
	case Grow:
		b = appends(b, "growing ", alt.machine.ID)
	case Boot:
		if p.chosen.kind == Boot || alt.host != p.chosen.host {
			b = appends(b, "booting a machine on ", alt.host.ID)
		} else {
			b = append(b, "booting another machine"...)
		}
	case PlaceM:
		b = append(b, alt.host.ID...)
	}
	more := alt.pinned - p.chosen.pinned
	spread := alt.terms[termSpread] - p.chosen.terms[termSpread]
	var costs [3]bool
	costs[0], costs[1], costs[2] = more != 0, alt.seconds != p.chosen.seconds, spread != 0
	left := 0
	for _, x := range costs {
		if x {
			left++
		}
	}
	if left == 0 {
		return append(b, " would have fitted less tightly"...)
	}
	b = append(b, " would have "...)
	for i, x := range costs {
		if !x {
			continue
		}
		switch {
		case i == 0 && more > 0:
			b = append(appendMemory(append(b, "pinned "...), more), " more"...)
		case i == 0:
			b = append(appendMemory(append(b, "pinned "...), -more), " less"...)
		case i == 1:
			b = appendSeconds(append(b, "taken "...), alt.seconds)
		case spread > 0:
			b = appends(b, "put more replicas of ", p.c.Service, " together")
		default:
			b = appends(b, "spread ", p.c.Service, " better")
		}
		switch left--; left {
		case 0:
		case 1:
			b = append(b, " and "...)
		default:
			b = append(b, ", "...)
		}
	}
	return b
}

func appends(b []byte, parts ...string) []byte {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
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
