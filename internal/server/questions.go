package server

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// What a question may contain at most: more than anybody plans for, and little
// enough that the answer takes seconds.
const (
	maxAddedHosts = 1000
	maxHostCPU    = 4096 * 1000 // thousandths of a core
	maxHostMemory = 64 << 40
	maxScaled     = 100    // services in one question
	maxWhatIf     = 20_000 // containers that a question adds
	maxRehearsed  = 256    // hosts whose loss is rehearsed one after the other
)

// Ask implements SystemService.
func (k *system) Ask(ctx context.Context, req *connect.Request[v1.AskRequest]) (*connect.Response[v1.AskResponse], error) {
	cp, release, err := k.s.ctl.Copy(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	a, _, err := k.s.answer(ctx, cp, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(a), nil
}

// CarryOut implements SystemService. The question is answered anew, which gives the
// same plan as long as nothing has changed.
func (k *system) CarryOut(ctx context.Context, req *connect.Request[v1.CarryOutRequest]) (*connect.Response[v1.CarryOutResponse], error) {
	r := req.Msg
	switch r.GetQuestion().GetQuestion().(type) {
	case *v1.AskRequest_Rebalance, *v1.AskRequest_Consolidate:
	default:
		return nil, fmt.Errorf("only the answers to rebalance and consolidate can be carried out: %w", errdefs.ErrInvalidArgument)
	}
	if r.Revision == 0 {
		return nil, fmt.Errorf("the plan's revision is missing: ask first, and give the revision of the answer: %w", errdefs.ErrInvalidArgument)
	}
	if err := k.s.ctl.Unchanged(r.Revision); err != nil {
		return nil, err
	}
	cp, release, err := k.s.ctl.Copy(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	a, plan, err := k.s.answer(ctx, cp, r.Question)
	if err != nil {
		return nil, err
	}
	if err := k.s.ctl.CarryOut(ctx, r.Revision, plan); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.CarryOutResponse{Plan: a.Plan}), nil
}

// stillAt is an error when something has changed since the revision of a plan that
// somebody looked at, in the project or in what the planner goes by; 0: nobody has.
func (d *diff) stillAt(revision uint64) error {
	if revision == 0 {
		return nil
	}
	if err := d.s.ctl.Unchanged(revision); err != nil {
		return err
	}
	ours := func(m *v1.Meta, name string) bool { return name == d.req.Project && m.GetRevision() > revision }
	for _, x := range d.snap.Projects {
		if ours(x.Meta, x.Meta.Name) {
			return control.Stale(revision)
		}
	}
	for _, x := range d.snap.Services {
		if ours(x.Meta, x.Meta.Project) {
			return control.Stale(revision)
		}
	}
	for _, x := range d.snap.Networks {
		if ours(x.Meta, x.Meta.Project) {
			return control.Stale(revision)
		}
	}
	for _, x := range d.snap.Volumes {
		if ours(x.Meta, x.Meta.Project) {
			return control.Stale(revision)
		}
	}
	return nil
}

// question is one that is being answered.
type question struct {
	s   *Server
	cp  *control.Copy
	out *v1.AskResponse
}

func (s *Server) answer(ctx context.Context, cp *control.Copy, r *v1.AskRequest) (*v1.AskResponse, *planner.Plan, error) {
	q := &question{s: s, cp: cp, out: &v1.AskResponse{Plan: &v1.Plan{Revision: cp.Revision}}}
	var ask planner.Question
	var err error
	switch x := r.GetQuestion().(type) {
	case *v1.AskRequest_Rebalance:
		b := budget(x.Rebalance.GetBudget())
		ask.Rebalance = &b
	case *v1.AskRequest_Consolidate:
		c := x.Consolidate
		if c.GetHosts() < 0 || c.GetKeepOn() < 0 {
			err = fmt.Errorf("consolidate: %d hosts to empty and %d to keep on: neither may be negative: %w", c.GetHosts(), c.GetKeepOn(), errdefs.ErrInvalidArgument)
		}
		ask.Consolidate = &planner.Consolidate{Budget: budget(c.GetBudget()), Hosts: int(c.GetHosts()), PowerOff: c.GetPowerOff(), KeepOn: int(c.GetKeepOn())}
	case *v1.AskRequest_Lose:
		if len(x.Lose.GetHosts()) > 0 {
			ask.HostLost, err = q.hosts(x.Lose.Hosts)
		}
	case *v1.AskRequest_Empty:
		if len(x.Empty.GetHosts()) == 0 {
			err = fmt.Errorf("no host named: `tandem host ls` lists them: %w", errdefs.ErrInvalidArgument)
		} else {
			ask.EmptyHost, err = q.hosts(x.Empty.Hosts)
		}
	case *v1.AskRequest_WhatIf:
		ask.WhatIf, err = q.whatIf(x.WhatIf)
	default:
		err = fmt.Errorf("an empty question: ask about rebalance, consolidate, lose, empty or what_if: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, nil, err
	}
	plan := &planner.Plan{}
	if r.GetLose() == nil || ask.HostLost != nil {
		if plan, err = cp.State.Decide(ask); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
		}
	}
	s.addPlan(q.out.Plan, plan, nil)
	if r.GetLose() != nil {
		if err := q.losses(ctx, ask.HostLost); err != nil {
			return nil, nil, err
		}
	}
	return q.out, plan, nil
}

func budget(b *v1.MoveBudget) planner.Budget {
	return planner.Budget{Containers: int(b.GetMoves()), Machines: int(b.GetMigrations()), Bytes: b.GetBytes()}
}

func (q *question) assume(format string, args ...any) {
	q.out.Assumptions = append(q.out.Assumptions, fmt.Sprintf(format, args...))
}

// hosts finds the ids of hosts named by id or name.
func (q *question) hosts(words []string) ([]string, error) {
	if len(words) > maxAddedHosts {
		return nil, fmt.Errorf("%d hosts named, at most %d: %w", len(words), maxAddedHosts, errdefs.ErrInvalidArgument)
	}
	var ids []string
	for _, w := range words {
		if w == "" {
			return nil, fmt.Errorf("a host without a name: `tandem host ls` lists them: %w", errdefs.ErrInvalidArgument)
		}
		h, err := q.s.host(w)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(ids, h.Meta.Id) {
			ids = append(ids, h.Meta.Id)
		}
	}
	return ids, nil
}

// losses rehearses the loss of every host by itself.
func (q *question) losses(ctx context.Context, named []string) error {
	snap := q.cp.Snapshot
	on := map[string]int32{}
	for _, x := range snap.Containers {
		on[x.GetAssignment().GetHostId()]++
	}
	c := &v1.LossCoverage{Covered: true}
	q.out.Losses = c
	hosts := slices.Clone(snap.Hosts)
	slices.SortFunc(hosts, func(a, b *v1.Host) int { return strings.Compare(a.Meta.Name, b.Meta.Name) })
	if len(hosts) > maxRehearsed {
		q.out.Plan.Warnings = append(q.out.Plan.Warnings, fmt.Sprintf("of %d hosts, the loss of the first %d and of those named was rehearsed", len(hosts), maxRehearsed))
	}
	for i, h := range hosts {
		if i >= maxRehearsed && !slices.Contains(named, h.Meta.Id) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		p, err := q.cp.State.Decide(planner.Question{HostLost: []string{h.Meta.Id}})
		if err != nil {
			return fmt.Errorf("rehearsing the loss of %s: %w", h.Meta.Name, err)
		}
		l := &v1.HostLoss{Host: h.Meta.Name, Containers: on[h.Meta.Id], Unplaced: int32(len(p.Unplaced)), Covered: len(p.Unplaced) == 0}
		c.Covered = c.Covered && l.Covered
		c.Losses = append(c.Losses, l)
	}
	return nil
}

// whatIf checks and translates changes that were not made.
func (q *question) whatIf(w *v1.WhatIfQuestion) (*planner.WhatIf, error) {
	out := &planner.WhatIf{}
	p := &problems{}
	added := int64(0)
	for _, a := range w.GetAddHosts() {
		z := a.GetSize()
		if z.GetCpuMilli() <= 0 || z.GetCpuMilli() > maxHostCPU || z.GetMemoryBytes() <= 0 || z.GetMemoryBytes() > maxHostMemory {
			p.add("a host of %s: between 1m CPU, 1 byte and %s are possible", sizeText(z), sizeText(&v1.Size{CpuMilli: maxHostCPU, MemoryBytes: maxHostMemory}))
		}
		if a.GetCount() < 1 {
			p.add("%d hosts of %s: at least 1", a.GetCount(), sizeText(z))
		}
		if len(a.GetZone()) > 253 {
			p.add("zone %.40q... is too long", a.Zone)
		}
		added += int64(max(0, a.GetCount()))
	}
	if added > maxAddedHosts {
		p.add("%d hosts to add, at most %d", added, maxAddedHosts)
	}
	p.count("services to scale", len(w.GetScale()), maxScaled)
	if len(w.GetAddHosts()) == 0 && len(w.GetRemoveHosts()) == 0 && len(w.GetScale()) == 0 {
		p.add("nothing to try: name hosts to add or to remove, or services to scale")
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	q.addHosts(out, w.AddHosts)
	var err error
	if out.RemoveHosts, err = q.hosts(w.RemoveHosts); err != nil {
		return nil, err
	}
	for _, id := range out.RemoveHosts {
		n, name := 0, id
		for _, x := range q.cp.Snapshot.Containers {
			if x.GetAssignment().GetHostId() == id {
				n++
			}
		}
		if h, err := q.s.host(id); err == nil {
			name = h.Meta.Name
		}
		q.assume("host %s is not there: its %d containers need another place", name, n)
	}
	return out, q.scale(out, w.Scale)
}

// addHosts makes hosts that are like the first one that there is, in another size.
func (q *question) addHosts(out *planner.WhatIf, list []*v1.AddedHosts) {
	pattern := planner.Host{Capabilities: planner.Capabilities{Grow: true, Shrink: true, BootSeconds: 6, GrowSeconds: 0.5, CPUStep: 1}}
	taken := map[string]bool{}
	like := ""
	for _, h := range q.cp.Snapshot.Hosts {
		taken[h.Meta.Id], taken[h.Meta.Name] = true, true
		if like == "" && h.Facts.GetCapacity() != nil {
			pattern, like = control.PlanHost(h), h.Meta.Name
		}
	}
	n := 0
	for _, a := range list {
		what := fmt.Sprintf("%d more hosts", a.Count)
		if a.Count == 1 {
			what = "one more host"
		}
		if like != "" {
			q.assume("%s with %s, otherwise like %s", what, sizeText(a.Size), like)
		} else {
			q.assume("%s with %s", what, sizeText(a.Size))
		}
		for range a.Count {
			for n++; taken[fmt.Sprintf("added-%d", n)]; n++ {
			}
			h := pattern
			h.ID, h.Zone, h.Labels = fmt.Sprintf("added-%d", n), a.Zone, nil
			h.Capacity = planner.Size{CPU: a.Size.CpuMilli, Memory: a.Size.MemoryBytes}
			h.Capabilities.MaxMachine = planner.Size{} // what the size of another host allows does not count
			h.Down, h.Cordoned, h.Off = false, false, false
			out.AddHosts = append(out.AddHosts, h)
		}
	}
}

// scale translates other numbers of replicas. A service that has no container yet
// gets a pattern from its definition.
func (q *question) scale(out *planner.WhatIf, list []*v1.ServiceReplicas) error {
	more := 0
	seen := map[string]bool{}
	for _, x := range list {
		at := x.GetProject() + "/" + x.GetService()
		if seen[at] {
			return fmt.Errorf("service %s is there twice: give one number: %w", at, errdefs.ErrInvalidArgument)
		}
		seen[at] = true
		if x.GetReplicas() < 0 || x.GetReplicas() > maxReplicas {
			return fmt.Errorf("service %s: %d containers are not possible, 0 to %d are: %w", at, x.GetReplicas(), maxReplicas, errdefs.ErrInvalidArgument)
		}
		sv, err := store.Get[*v1.Service](q.s.store, store.Key{Kind: store.Services, Project: x.Project, Name: x.Service})
		if err != nil || sv.Meta.Deleting {
			return fmt.Errorf("project %s has no service %s: `tandem ps -p %s` shows what it has: %w", x.Project, x.Service, x.Project, errdefs.ErrNotFound)
		}
		if x.Replicas > 1 && sv.ContainerName != "" {
			return fmt.Errorf("service %s has the fixed container_name %s: it can't have %d containers; take the name away first: %w", at, sv.ContainerName, x.Replicas, errdefs.ErrInvalidArgument)
		}
		have := 0
		for _, c := range q.cp.Snapshot.Containers {
			if c.Meta.Project == x.Project && c.Service == x.Service {
				if c.OneOff || c.GetAssignment().GetHostId() == "" && (c.Stopped || c.Meta.Deleting) {
					continue
				}
				have++
			}
		}
		if more += max(0, int(x.Replicas)-have); more > maxWhatIf {
			return fmt.Errorf("%d more containers, at most %d in one question: %w", more, maxWhatIf, errdefs.ErrResourceExhausted)
		}
		q.assume("service %s has %d containers instead of %d", at, x.Replicas, have)
		if have == 0 && x.Replicas > 0 {
			pattern := q.s.ctl.PlanContainer(q.s.ctl.NewContainer(sv, 1))
			pattern.ID = x.Service + "-what-if-1"
			if err := q.cp.State.SetContainer(pattern); err != nil {
				return fmt.Errorf("service %s: %w", at, err)
			}
		}
		if have > 0 || x.Replicas > 0 {
			out.Scale = append(out.Scale, planner.Scale{Project: x.Project, Service: x.Service, Replicas: int(x.Replicas)})
		}
	}
	return nil
}

// scaleText says why a service has as many containers as it has.
func scaleText(s *v1.ServiceScale) string {
	t := fmt.Sprintf("Service %s scales by itself and has %d of %d to %d containers: %s.\n", s.Service, s.Replicas, s.Policy.GetMin(), s.Policy.GetMax(), s.Now)
	if st := s.Status; st != nil {
		t += fmt.Sprintf("It went from %d to %d at %s: %s.\n", st.From, st.To, st.At.AsTime().UTC().Format("2006-01-02 15:04:05 UTC"), st.Reason)
	}
	return t
}
