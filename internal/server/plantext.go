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
	inside                      map[string]int32 // containers by machine's id
	replace                     *strings.Replacer
}

func (s *Server) names(extra []*v1.Container, boots []planner.Action) *names {
	n := &names{containers: map[string]string{}, machines: map[string]string{}, hosts: map[string]string{}, inside: map[string]int32{}}
	for _, c := range append(store.List[*v1.Container](s.store, ""), extra...) {
		n.containers[c.Meta.Id] = c.Meta.Name
		n.inside[c.GetAssignment().GetMachineId()]++
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

// addPlan puts the planner's answer into words, and sums it up.
func (s *Server) addPlan(out *v1.Plan, p *planner.Plan, fresh []*v1.Container) {
	n := s.names(fresh, p.Actions)
	n.add(out, p)
}

func (n *names) add(out *v1.Plan, p *planner.Plan) {
	t := &v1.PlanTotals{}
	for _, a := range p.Actions {
		x := &v1.PlanAction{Kind: string(a.Kind), Container: n.of(a.Container), Machine: n.of(a.Machine), Host: n.of(a.Host), Reason: n.reason(control.Reason(a.Reason)),
			FromMachine: n.of(a.FromMachine), FromHost: n.of(a.FromHost), Seconds: a.Seconds, Bytes: a.Bytes}
		switch a.Kind {
		case planner.Boot, planner.Stop, planner.Grow, planner.Shrink, planner.Migrate, planner.Restart:
			x.To = toSize(a.To)
			if a.Kind != planner.Boot {
				x.From = toSize(a.From)
			}
		}
		x.Text = actionText(x)
		n.sum(t, a)
		out.Actions = append(out.Actions, x)
	}
	for _, u := range p.Unplaced {
		out.Unplaced = append(out.Unplaced, &v1.Unplaced{Container: n.of(u.Container), Reason: n.reason(control.Reason(u.Reason)), Remedy: n.replace.Replace(u.Remedy)})
	}
	t.Unplaced = int32(len(out.Unplaced))
	out.Totals = t
}

func toSize(z planner.Size) *v1.Size { return &v1.Size{CpuMilli: z.CPU, MemoryBytes: z.Memory} }

// actionText is one line for each kind of action.
func actionText(x *v1.PlanAction) string {
	into := "into machine " + x.Machine
	switch {
	case x.Machine == "":
		into = "onto host " + x.Host + " itself"
	case x.FromHost != "" && x.FromHost != x.Host:
		into += " on " + x.Host
	}
	from := "machine " + x.FromMachine
	switch {
	case x.FromMachine == "":
		from = "host " + x.FromHost + " itself"
	case x.FromHost != x.Host || x.Machine == "":
		from += " on " + x.FromHost
	}
	switch planner.Kind(x.Kind) {
	case planner.Boot:
		return fmt.Sprintf("start machine %s on %s with %s", x.Machine, x.Host, sizeText(x.To))
	case planner.Grow, planner.Shrink:
		return fmt.Sprintf("%s machine %s from %s to %s", x.Kind, x.Machine, sizeText(x.From), sizeText(x.To))
	case planner.Stop:
		return fmt.Sprintf("stop machine %s on %s, which is empty", x.Machine, x.Host)
	case planner.Move:
		return fmt.Sprintf("move %s (%s) from %s %s: it starts there before it stops here", x.Container, bytesText(x.Bytes), from, into)
	case planner.Migrate:
		return fmt.Sprintf("migrate machine %s (%s) from %s to %s while it runs", x.Machine, bytesText(x.Bytes), x.FromHost, x.Host)
	case planner.Restart:
		return fmt.Sprintf("start machine %s of %s again on %s with %s", x.Machine, x.FromHost, x.Host, sizeText(x.To))
	case planner.Evict:
		return fmt.Sprintf("stop %s in %s: it gives way", x.Container, from)
	case planner.PowerOn:
		return "switch host " + x.Host + " on"
	case planner.PowerOff:
		return "switch host " + x.Host + " off"
	case planner.Place, planner.PlaceM:
		if x.FromHost != "" {
			return fmt.Sprintf("start %s of %s again: put it %s", x.Container, x.FromHost, into)
		}
		return fmt.Sprintf("put %s %s", x.Container, into)
	}
	return strings.Join(slices.DeleteFunc([]string{x.Kind, x.Container, x.Machine, x.Host}, func(s string) bool { return s == "" }), " ")
}

func bytesText(n int64) string { return units.BytesSize(float64(n)) }

// sum counts one action.
func (n *names) sum(t *v1.PlanTotals, a planner.Action) {
	t.Seconds += a.Seconds
	switch a.Kind {
	case planner.Place, planner.PlaceM:
		t.Placed++
	case planner.Move:
		t.ContainerMoves++
		t.MoveBytes += a.Bytes
	case planner.Migrate:
		t.MachineMoves++
		t.ContainerMoves += n.inside[a.Machine]
		t.MoveBytes += a.Bytes
	case planner.Boot:
		t.Boots++
	case planner.Grow:
		t.Grown++
	case planner.Restart:
		t.Restarts++
	case planner.Evict:
		t.Evicted++
	case planner.Stop:
		t.Stops++
	case planner.PowerOn:
		t.HostsOn++
	case planner.PowerOff:
		t.HostsOff++
	}
}
