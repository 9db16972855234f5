package control

import (
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// setPolicy gives the planner what holds for the whole cluster. A policy that can't be
// read is no reason to forget the one before: see dropPolicy.
func (p *planState) setPolicy(now *v1.Policy) error {
	if err := p.state.SetPolicy(planner.Policy{Evict: true, HostLosses: int(now.GetHostLosses())}); err != nil {
		return err
	}
	pools, quotas := map[string]planner.Pool{}, map[string]planner.Quota{}
	for _, x := range now.GetPools() {
		pools[x.Path] = planner.Pool{Path: x.Path, Reservation: size(x.Reservation), Limit: size(x.Limit), Shares: x.Shares}
	}
	for _, x := range now.GetQuotas() {
		quotas[x.Project] = planner.Quota{Request: size(x.Reserved), Containers: int(x.Containers), Machines: int(x.Machines)}
	}
	for _, x := range p.policy.GetPools() {
		if _, ok := pools[x.Path]; !ok {
			pools[x.Path] = planner.Pool{Path: x.Path} // its bounds go; containers may still name it
		}
	}
	for _, x := range p.policy.GetQuotas() {
		if _, ok := quotas[x.Project]; !ok {
			quotas[x.Project] = planner.Quota{}
		}
	}
	for _, path := range slices.Sorted(maps.Keys(pools)) {
		if err := p.state.SetPool(pools[path]); err != nil {
			return err
		}
	}
	for _, project := range slices.Sorted(maps.Keys(quotas)) {
		if err := p.state.SetQuota(project, quotas[project]); err != nil {
			return err
		}
	}
	p.policy = now
	return nil
}

// dropPolicy: the record is gone, or can't be read; then the last that could be read
// holds on.
func (p *planState) dropPolicy() {
	snap := p.c.store.Snapshot()
	last := &v1.Policy{}
	if snap.Broken(store.PolicyKey) {
		last = p.policy
		for _, r := range snap.Last {
			if x, ok := r.(*v1.Policy); ok && last == nil {
				last = x
			}
		}
	}
	if err := p.setPolicy(last); err != nil {
		p.c.log.Warn("planner can't take the policy", "err", err)
	}
}

// setService tells the planner of a service's containers anew when what it asks of
// their places has changed.
func (p *planState) setService(was, now *v1.Service) error {
	if was == nil || now == nil || samePlacing(was, now) {
		return nil
	}
	for _, x := range store.List[*v1.Container](p.c.store, now.Meta.Project) {
		if x.Service != now.Meta.Name || x.OneOff {
			continue
		}
		if err := p.state.SetContainer(p.container(x)); err != nil {
			return err
		}
	}
	return nil
}

func samePlacing(a, b *v1.Service) bool {
	return a.Spread == b.Spread && a.Uncovered == b.Uncovered &&
		slices.EqualFunc(a.Company, b.Company, func(x, y *v1.CompanyRule) bool { return proto.Equal(x, y) })
}

// placing puts into a container what its service asks of its place.
func placing(out *planner.Container, s *v1.Service) {
	switch s.Spread {
	case "host", "machine", "zone":
		out.Spread = s.Spread
	}
	out.Uncovered = out.Uncovered || s.Uncovered
	for _, r := range s.Company {
		if r.Near {
			out.Near = append(out.Near, planner.NearRule{Service: r.Service, Layer: r.Layer})
		} else {
			out.Anti = append(out.Anti, planner.AntiRule{Service: r.Service, Layer: r.Layer, Max: int(r.AtMost)})
		}
	}
}

// promise tells the planner that its plan was carried out, as it was planned: which
// hosts keep what back for whom stands in no record, and the records that come back
// to it then change nothing. What was carried out otherwise it learns from them.
func (w *placement) promise(plan *planner.Plan) {
	if w.c.plan.policy.GetHostLosses() == 0 || len(plan.Actions) == 0 {
		return
	}
	names := map[string]string{}
	for _, a := range plan.Actions {
		switch a.Kind {
		case planner.Evict:
			return // in steps: see evictions
		case planner.Boot:
			names[a.Machine] = w.machines[a.Machine].GetMeta().GetId()
		}
	}
	if err := w.c.plan.state.Commit(plan, names); err != nil {
		w.c.log.Debug("the plan was carried out otherwise than planned", "err", err)
	}
}

// Guarantee is how the guarantee for host losses is kept.
type Guarantee struct {
	Covered int      // containers with a place kept for the loss of their host
	Exposed []string // ids of those that should have one and have none
}

// Guarantee says how the guarantee is kept now.
func (c *Controller) Guarantee() Guarantee {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	c.plan.sync()
	_, exposed := c.plan.state.Survives()
	return Guarantee{Covered: c.plan.state.Covered() - len(exposed), Exposed: exposed}
}

// Standby is the hosts on which a container starts again when its own is lost.
func (c *Controller) Standby(id string) []string {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	c.plan.sync()
	return c.plan.state.Standby(id)
}
