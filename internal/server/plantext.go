package server

import (
	"fmt"
	"slices"
	"strings"

	"github.com/docker/go-units"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// names puts names in the place of ids.
type names struct {
	containers, machines, hosts map[string]string
	replace                     *strings.Replacer
}

func (s *Server) names(extra []*v1.Container, boots []planner.Action) *names {
	n := &names{containers: map[string]string{}, machines: map[string]string{}, hosts: map[string]string{}}
	for _, c := range append(store.List[*v1.Container](s.store, ""), extra...) {
		n.containers[c.Meta.Id] = c.Meta.Name
	}
	taken := map[string]bool{}
	for _, m := range store.List[*v1.Machine](s.store, "") {
		n.machines[m.Meta.Id] = m.Meta.Name
		taken[m.Meta.Name] = true
	}
	for _, h := range store.List[*v1.Host](s.store, "") {
		n.hosts[h.Meta.Id] = h.Meta.Name
	}
	next := 1
	for _, a := range boots {
		if a.Kind != planner.Boot {
			continue
		}
		for taken[fmt.Sprintf("m-%d", next)] {
			next++
		}
		n.machines[a.Machine] = fmt.Sprintf("m-%d", next)
		next++
	}
	var pairs []string
	for _, m := range []map[string]string{n.containers, n.machines, n.hosts} {
		for k := range m {
			pairs = append(pairs, k)
		}
	}
	slices.SortFunc(pairs, func(a, b string) int {
		if len(a) != len(b) {
			return len(b) - len(a)
		}
		return strings.Compare(a, b)
	})
	args := make([]string, 0, 2*len(pairs))
	for _, k := range pairs {
		args = append(args, k, n.of(k))
	}
	n.replace = strings.NewReplacer(args...)
	return n
}

// of is the name behind an id; the id itself when it is unknown.
func (n *names) of(id string) string {
	for _, m := range []map[string]string{n.machines, n.containers, n.hosts} {
		if x := m[id]; x != "" {
			return x
		}
	}
	return id
}

func (n *names) reason(r *v1.Reason) *v1.Reason {
	r.Summary = n.replace.Replace(r.Summary)
	for _, o := range r.Options {
		o.Machine, o.Host = n.of(o.Machine), n.of(o.Host)
	}
	for _, e := range r.Exclusions {
		e.Detail = n.replace.Replace(e.Detail)
	}
	return r
}

func sizeText(s *v1.Size) string {
	return fmt.Sprintf("%g CPU, %s", float64(s.GetCpuMilli())/1000, units.BytesSize(float64(s.GetMemoryBytes())))
}

// addPlan puts the planner's answer into words.
func (s *Server) addPlan(out *v1.Plan, p *planner.Plan, fresh []*v1.Container) {
	n := s.names(fresh, p.Actions)
	toSize := func(z planner.Size) *v1.Size { return &v1.Size{CpuMilli: z.CPU, MemoryBytes: z.Memory} }
	for _, a := range p.Actions {
		x := &v1.PlanAction{Kind: string(a.Kind), Container: n.of(a.Container), Machine: n.of(a.Machine), Host: n.of(a.Host), Reason: n.reason(control.Reason(a.Reason))}
		switch a.Kind {
		case planner.Boot:
			x.To = toSize(a.To)
			x.Text = fmt.Sprintf("start machine %s on %s with %s", x.Machine, x.Host, sizeText(x.To))
		case planner.Grow, planner.Shrink:
			x.From, x.To = toSize(a.From), toSize(a.To)
			x.Text = fmt.Sprintf("%s machine %s from %s to %s", a.Kind, x.Machine, sizeText(x.From), sizeText(x.To))
		case planner.Stop:
			x.Text = "stop machine " + x.Machine
		case planner.PlaceM:
			x.Text = fmt.Sprintf("put %s on host %s itself", x.Container, x.Host)
		default:
			x.Text = fmt.Sprintf("put %s into machine %s", x.Container, x.Machine)
		}
		out.Actions = append(out.Actions, x)
	}
	for _, u := range p.Unplaced {
		out.Unplaced = append(out.Unplaced, &v1.Unplaced{Container: n.of(u.Container), Reason: n.reason(control.Reason(u.Reason)), Remedy: n.replace.Replace(u.Remedy)})
	}
}
