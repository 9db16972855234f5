package control

import (
	"cmp"
	"slices"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// planState keeps the planner's state in step with the store: changes are fed in
// as they come, nothing is built anew for a decision. Controller.planMu guards it.
type planState struct {
	c        *Controller
	state    *planner.State
	sub      *store.Subscription
	unplaced map[string]*v1.Reason // container id -> why it has no place
	moved    uint64                // store revision of the last change that plans rely on
	policy   *v1.Policy            // that the state has
	covered  uint64                // moved, when standby hosts were last looked for anew
}

func newPlanState(c *Controller) *planState {
	p := &planState{c: c, state: planner.New(), unplaced: map[string]*v1.Reason{}, moved: c.store.Revision(),
		sub: c.store.Subscribe(true, store.Policies, store.Hosts, store.Machines, store.Volumes, store.Services, store.Containers)}
	p.dropPolicy() // until the record comes, if there is one
	return p
}

// maxCovered bounds the hosts whose containers' standby hosts are looked for anew at a time.
const maxCovered = 16

// feedOrder: what others refer to comes first, removals in the other direction.
var feedOrder = map[store.Kind]int{store.Policies: 0, store.Hosts: 1, store.Machines: 2, store.Volumes: 3, store.Services: 4, store.Containers: 5}

// sync feeds in what has changed.
func (p *planState) sync() {
	changes := p.sub.Take()
	slices.SortStableFunc(changes, func(a, b store.Change) int {
		rank := func(c store.Change) int {
			if c.New == nil {
				return 10 - feedOrder[c.Key.Kind]
			}
			return feedOrder[c.Key.Kind]
		}
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Key.Project, b.Key.Project), cmp.Compare(a.Key.Name, b.Key.Name))
	})
	kept := map[string]bool{} // a record that got another name is no other one
	for _, ch := range changes {
		if ch.New != nil {
			kept[ch.New.GetMeta().GetId()] = true
		}
	}
	for _, ch := range changes {
		p.note(ch)
		if ch.Old != nil && (ch.New == nil || ch.New.GetMeta().GetId() != ch.Old.GetMeta().GetId()) && !kept[ch.Old.GetMeta().GetId()] {
			p.drop(ch.Old)
		}
		if ch.New == nil {
			continue
		}
		if err := p.set(ch.Old, ch.New); err != nil {
			p.c.log.Warn("planner can't take a record", "record", ch.Key.String(), "err", err)
		}
	}
	if p.policy.GetHostLosses() > 0 && p.covered != p.moved { // once for each change that may matter
		p.covered = p.moved
		p.state.Cover(maxCovered)
	}
}

func (p *planState) drop(r store.Record) {
	switch x := r.(type) {
	case *v1.Host:
		p.state.RemoveHost(x.Meta.Id)
	case *v1.Machine:
		p.state.RemoveMachine(x.Meta.Id)
	case *v1.Container:
		p.state.RemoveContainer(x.Meta.Id)
		delete(p.unplaced, x.Meta.Id)
	case *v1.Volume:
		p.state.SetVolume(x.Meta.Id, "")
	case *v1.Policy:
		p.dropPolicy()
	}
}

func (p *planState) set(old, r store.Record) error {
	switch x := r.(type) {
	case *v1.Policy:
		return p.setPolicy(x)
	case *v1.Service:
		was, _ := old.(*v1.Service)
		return p.setService(was, x)
	case *v1.Host:
		return p.state.SetHost(planHost(x))
	case *v1.Machine:
		return p.state.SetMachine(planMachine(x))
	case *v1.Volume:
		p.state.SetVolume(x.Meta.Id, x.HostId)
	case *v1.Container:
		if x.GetAssignment().GetHostId() != "" {
			delete(p.unplaced, x.Meta.Id)
		}
		return p.state.SetContainer(p.container(x))
	}
	return nil
}

func size(s *v1.Size) planner.Size {
	return planner.Size{CPU: s.GetCpuMilli(), Memory: s.GetMemoryBytes()}
}

func fromSize(s planner.Size) *v1.Size { return &v1.Size{CpuMilli: s.CPU, MemoryBytes: s.Memory} }

// planHost translates a host's facts.
func planHost(h *v1.Host) planner.Host {
	f := h.GetFacts()
	k := f.GetCapabilities()
	boot := 6.0
	if k.GetClone() {
		boot = 0.6
	}
	return planner.Host{
		ID: h.Meta.Id, Zone: f.GetZone(), Capacity: size(f.GetCapacity()),
		MachineExtra: size(f.GetMachineOverhead()), GuestExtra: size(f.GetGuestOverhead()),
		// A machine's CPU is what it reserves of the host, as on other hypervisors;
		// the agent gives it the whole CPUs that hold this, at least one.
		Base:     planner.Size{CPU: f.GetGuestOverhead().GetCpuMilli(), Memory: f.GetBaseMemoryBytes()},
		Cordoned: h.Cordoned, Down: !h.Connected,
		Capabilities: planner.Capabilities{
			Grow: k.GetGrowCpu() && k.GetGrowMemory(), Shrink: k.GetShrinkMemory(), Metal: k.GetMetal(),
			MaxMachine: size(k.GetMaxMachine()), MemoryStep: k.GetMemoryStepBytes(), CPUStep: 1,
			BootSeconds: boot, GrowSeconds: 0.5,
		},
	}
}

var isolations = map[v1.Isolation]planner.Isolation{
	v1.Isolation_ISOLATION_UNSPECIFIED: planner.Project, v1.Isolation_ISOLATION_PROJECT: planner.Project,
	v1.Isolation_ISOLATION_SHARED: planner.Shared, v1.Isolation_ISOLATION_OWN: planner.Own, v1.Isolation_ISOLATION_METAL: planner.Metal,
}

var isolationsBack = map[planner.Isolation]v1.Isolation{
	planner.Project: v1.Isolation_ISOLATION_PROJECT, planner.Shared: v1.Isolation_ISOLATION_SHARED,
	planner.Own: v1.Isolation_ISOLATION_OWN, planner.Metal: v1.Isolation_ISOLATION_METAL,
}

func planMachine(m *v1.Machine) planner.Machine {
	return planner.Machine{
		ID: m.Meta.Id, Host: m.HostId, Project: m.Meta.Project, Isolation: isolations[m.Isolation], Size: size(m.Size),
		Min: size(m.MinSize), Ceiling: size(m.Ceiling), Pinned: m.ByUser, Stopping: m.Meta.Deleting || m.Stopped,
	}
}

// Request is what a container reserves, for the planner: its reservation, else
// its limit.
func Request(r *v1.Resources) *v1.Size {
	return &v1.Size{
		CpuMilli:    cmp.Or(r.GetCpuMilliReservation(), r.GetCpuMilliLimit()),
		MemoryBytes: cmp.Or(r.GetMemoryBytesReservation(), r.GetMemoryBytesLimit()),
	}
}

func (p *planState) container(x *v1.Container) planner.Container {
	spec := x.GetSpec()
	out := planner.Container{
		ID: x.Meta.Id, Project: x.Meta.Project, Isolation: isolations[spec.GetIsolation()], Request: size(Request(spec.GetResources())),
		Machine: x.GetAssignment().GetMachineId(), Host: x.GetAssignment().GetHostId(), Stateful: !movable(x), Uncovered: !restartable(x), Pool: spec.GetPool(), Zones: spec.GetZoneAffinity(),
	}
	if spec.GetWorkClass() == v1.WorkClass_WORK_CLASS_BATCH {
		out.Class = planner.Batch
	}
	if x.Service != "" && !x.OneOff {
		out.Service = x.Service
		if s, err := store.Get[*v1.Service](p.c.store, store.Key{Kind: store.Services, Project: x.Meta.Project, Name: x.Service}); err == nil {
			placing(&out, s)
		}
	}
	for _, m := range spec.GetPorts() {
		if m.HostPort != 0 {
			out.Ports = append(out.Ports, planner.Port{Protocol: Protocol(m), Port: uint16(m.HostPort), IP: m.HostIp})
		}
	}
	for _, n := range NamedVolumes(spec) {
		if v, err := store.Get[*v1.Volume](p.c.store, store.Key{Kind: store.Volumes, Project: x.Meta.Project, Name: n}); err == nil {
			out.Volumes = append(out.Volumes, v.Meta.Id)
		}
	}
	if len(spec.GetHostAffinity()) > 0 {
		want := map[string]bool{}
		for _, n := range spec.HostAffinity {
			want[n] = true
		}
		for _, h := range store.List[*v1.Host](p.c.store, "") {
			if want[h.Meta.Name] || want[h.Meta.Id] || want[h.GetFacts().GetHostname()] {
				out.Hosts = append(out.Hosts, h.Meta.Id)
			}
		}
		if len(out.Hosts) == 0 {
			out.Hosts = spec.HostAffinity // names of no host: fits nowhere, and the reason says so
		}
	}
	return out
}

// preview decides on a copy.
func (p *planState) preview(fresh []*v1.Container, gone []string) (*planner.Plan, error) {
	p.c.planMu.Lock()
	p.sync()
	s := p.state.Clone()
	p.c.planMu.Unlock()
	for _, id := range gone {
		s.RemoveContainer(id)
	}
	var ids []string
	for _, x := range fresh {
		if err := s.SetContainer(p.container(x)); err != nil {
			return nil, err
		}
		ids = append(ids, x.Meta.Id)
	}
	if len(ids) == 0 {
		return &planner.Plan{}, nil
	}
	return s.Decide(planner.Question{Place: ids})
}

// Unplaced is why a container has no place; nil when nothing is known.
func (c *Controller) Unplaced(id string) *v1.Reason {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	return c.plan.unplaced[id]
}

// Reason translates the planner's.
func Reason(r planner.Reason) *v1.Reason {
	out := &v1.Reason{Summary: r.Summary}
	for _, o := range r.Options {
		x := &v1.Option{Action: o.Action, Machine: o.Machine, Host: o.Host, Cost: o.Cost, Seconds: o.Seconds, PinnedBytes: o.Pinned, Chosen: o.Chosen}
		for _, t := range o.Terms {
			if x.Terms == nil {
				x.Terms = map[string]float64{}
			}
			x.Terms[t.Name] = t.Value
		}
		out.Options = append(out.Options, x)
	}
	for _, e := range r.Exclusions {
		out.Exclusions = append(out.Exclusions, &v1.Exclusion{Rule: e.Rule, Layer: e.Layer, Count: int32(e.Count), Detail: e.Detail})
	}
	return out
}
