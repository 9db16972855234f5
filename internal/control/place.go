package control

import (
	"context"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// unplaced says that a container needs a place: it is to run and has none.
func unplaced(x *v1.Container) bool {
	return x.GetAssignment().GetHostId() == "" && !x.Meta.Deleting && !x.Stopped
}

// place asks the planner where containers go and writes its answer, in one
// transaction that relies on all it has read.
func (c *Controller) place(ctx context.Context) (time.Duration, error) {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	if err := c.vacate(ctx); err != nil {
		return 0, err
	}
	snap := c.store.Snapshot()
	c.plan.sync() // after the snapshot: the planner knows at least as much
	giving := giving(snap)
	waiting := slices.DeleteFunc(slices.Clone(snap.Containers), func(x *v1.Container) bool { return !unplaced(x) || giving[x.Meta.Id] })
	if len(waiting) == 0 {
		return 0, nil
	}
	claimed := c.claims(snap)
	w := newPlacement(c, snap, claimed)
	var ids []string
	for _, x := range waiting {
		if err := claimed.blocks(x); err != nil {
			w.unplaced(x.Meta.Id, &v1.Reason{Summary: err.Error()}, "")
			continue
		}
		ids = append(ids, x.Meta.Id)
		// Services and volumes it refers to may have come after it.
		if err := c.plan.state.SetContainer(c.plan.container(x)); err != nil {
			return 0, err
		}
	}
	if len(ids) == 0 {
		return 0, w.commit(ctx)
	}
	plan, err := c.plan.state.Decide(planner.Question{Place: ids})
	if err != nil {
		return 0, fmt.Errorf("placing %d containers: %w", len(ids), err)
	}
	w.evictions(plan.Actions)
	for _, u := range plan.Unplaced {
		w.unplaced(u.Container, Reason(u.Reason), u.Remedy)
	}
	if err := w.commit(ctx); err != nil {
		return 0, err
	}
	w.promise(plan)
	return 0, nil
}

// placement turns a plan into records.
type placement struct {
	c          *Controller
	snap       *store.Snapshot
	tx         *store.Txn
	ipam       *ipam
	ports      map[portKey]bool
	hosts      map[string]*v1.Host
	machines   map[string]*v1.Machine // by id and, booted ones, by the plan's name
	fresh      map[string]bool        // booted by this plan
	changed    map[string]*v1.Machine // by id
	order      []string
	checked    map[string]bool
	containers map[string]*v1.Container
	networks   map[string]*v1.Network
	volumes    map[string]*v1.Volume
	names      map[string]bool
	replacer   *strings.Replacer
	by         string // who carries the plan out
	said       []decision
	err        error // of an action that can't be carried out: nothing is written
}

func newPlacement(c *Controller, snap *store.Snapshot, k *claims) *placement {
	w := &placement{c: c, by: "place", snap: snap, tx: c.store.Txn(), ipam: newIPAM(k.containers, k.machines, k.addresses...), ports: takenPorts(k.containers),
		hosts: map[string]*v1.Host{}, machines: map[string]*v1.Machine{}, fresh: map[string]bool{}, changed: map[string]*v1.Machine{},
		checked: map[string]bool{}, containers: map[string]*v1.Container{}, networks: map[string]*v1.Network{}, volumes: map[string]*v1.Volume{}, names: map[string]bool{}}
	for _, h := range snap.Hosts {
		w.hosts[h.Meta.Id] = h
	}
	for _, m := range snap.Machines {
		w.machines[m.Meta.Id] = m
		w.names[m.Meta.Name] = true
	}
	for _, x := range snap.Containers {
		w.containers[x.Meta.Id] = x
	}
	for _, n := range snap.Networks {
		w.networks[n.Meta.Project+"/"+n.Meta.Name] = n
	}
	for _, v := range snap.Volumes {
		w.volumes[v.Meta.Project+"/"+v.Meta.Name] = v
	}
	return w
}

// edit is the copy of a machine that this transaction writes.
func (w *placement) edit(ref string) *v1.Machine {
	m := w.machines[ref]
	if m == nil {
		return nil
	}
	id := m.Meta.Id
	if w.changed[id] == nil {
		if !w.fresh[id] {
			m = clone(m)
		}
		w.changed[id] = m
		w.order = append(w.order, id)
		w.machines[id] = m
	}
	return w.changed[id]
}

func (w *placement) action(a planner.Action) {
	switch a.Kind {
	case planner.Boot:
		m := w.c.newMachine(w.names, a.Project, isolationsBack[a.Isolation], fromSize(a.To), fromSize(a.Ceiling), a.Host)
		m.Reason = w.named(Reason(a.Reason))
		w.fresh[m.Meta.Id] = true
		w.machines[a.Machine], w.machines[m.Meta.Id] = m, m
		w.replacer = nil
		w.edit(m.Meta.Id)
		w.say(m.Meta.Name, fmt.Sprintf("boots on %s with %s, at most %s", w.hostName(a.Host), text(m.Size), text(m.Ceiling)), m.Reason)
		if h := w.hosts[a.Host]; h != nil && !w.checked[a.Host] {
			w.checked[a.Host] = true
			w.tx.Check(h)
		}
	case planner.Grow:
		if m := w.edit(a.Machine); m != nil {
			was := text(m.Size)
			m.Size = fromSize(a.To)
			m.Meta.Generation++
			w.say(m.Meta.Name, "grows from "+was+" to "+text(m.Size), w.named(Reason(a.Reason)))
		}
	case planner.Place, planner.PlaceM:
		w.put(a)
	case planner.Move:
		w.fail(w.move(a))
	case planner.Restart:
		w.fail(w.restart(a))
	case planner.Shrink:
		if m := w.edit(a.Machine); m != nil {
			m.Size = fromSize(a.To)
			m.Meta.Generation++
		}
	default:
		w.fail(refusal(a))
	}
}

func (w *placement) fail(err error) {
	if w.err == nil {
		w.err = err
	}
}

// newMachine is a machine's record, with the lowest number that is free as name.
func (c *Controller) newMachine(names map[string]bool, project string, iso v1.Isolation, size, ceiling *v1.Size, host string) *v1.Machine {
	n := 1
	for names[fmt.Sprintf("m-%d", n)] {
		n++
	}
	name := fmt.Sprintf("m-%d", n)
	names[name] = true
	mac, _ := hex.DecodeString(c.NewID(5))
	return &v1.Machine{
		Meta:      &v1.Meta{Id: "m-" + c.NewID(6), Project: project, Name: name, CreatedAt: stamp(c.clock.Now()), Generation: 1},
		Isolation: iso, Size: size, Ceiling: ceiling, HostId: host,
		Mac:    fmt.Sprintf("02:%02x:%02x:%02x:%02x:%02x", mac[0], mac[1], mac[2], mac[3], mac[4]),
		Status: &v1.MachineStatus{State: v1.MachineState_MACHINE_STATE_PENDING},
	}
}

// put writes one container's assignment.
func (w *placement) put(a planner.Action) {
	x := w.containers[a.Container]
	if x == nil {
		return
	}
	reason := w.named(Reason(a.Reason))
	x = clone(x)
	x.GivesWayTo = ""
	x.Assignment = &v1.Assignment{HostId: a.Host, Reason: reason, At: stamp(w.c.clock.Now())}
	var m *v1.Machine
	if a.Kind == planner.Place {
		if m = w.machines[a.Machine]; m == nil {
			w.c.log.Error("the plan names a machine that is not there", "machine", a.Machine, "container", x.Meta.Name)
			return
		}
		x.Assignment.MachineId, x.Assignment.HostId = m.Meta.Id, m.HostId
	}
	if err := w.address(x, m); err != nil {
		w.unplaced(x.Meta.Id, &v1.Reason{Summary: err.Error()}, "")
		return
	}
	x.Assignment.Ports = choosePorts(x.Spec.GetPorts(), w.ports)
	for _, name := range NamedVolumes(x.Spec) {
		v := w.volumes[x.Meta.Project+"/"+name]
		if v != nil && v.HostId == "" {
			v = clone(v)
			v.HostId = x.Assignment.HostId
			w.volumes[x.Meta.Project+"/"+name] = v
			w.tx.Update(v)
		}
	}
	if x.Status == nil {
		x.Status = &v1.ContainerStatus{}
	}
	x.Status.State, x.Status.Message = v1.ContainerState_CONTAINER_STATE_PENDING, ""
	x.Status.HostId, x.Status.MachineId, x.Status.Ip = x.Assignment.HostId, x.Assignment.MachineId, x.Assignment.Ip
	x.Status.Ips = further(x)
	w.tx.Update(x)
	where := w.hostName(x.Assignment.HostId) + " itself"
	if m != nil {
		where = m.Meta.Name
	}
	w.say(x.Meta.Name, "goes to "+where+", "+strings.Join(ips(x.Assignment.Addresses), ", "), reason)
	if m != nil && w.changed[m.Meta.Id] == nil && !w.checked[m.Meta.Id] {
		w.checked[m.Meta.Id] = true
	}
}

// address gives a container an address in each of its networks, in machine m (nil:
// metal), or in none.
func (w *placement) address(x *v1.Container, m *v1.Machine) error {
	e, before := m, 0
	if m != nil {
		before = len(m.Prefixes)
		if w.changed[m.Meta.Id] == nil {
			e = clone(m) // kept only when it gets a further block
		}
	}
	var got []*v1.NetworkAddress
	for i, name := range attachments(x) {
		n := w.networks[x.Meta.Project+"/"+name]
		if n == nil {
			w.release(got)
			return fmt.Errorf("network %s is not there", name)
		}
		fixed := ""
		if i < len(x.Spec.Networks) {
			fixed = x.Spec.Networks[i].Ipv4
		}
		ip, err := w.ipam.pick(n, e, fixed)
		if err != nil {
			w.release(got)
			return err
		}
		got = append(got, &v1.NetworkAddress{NetworkId: n.Meta.Id, Network: name, Ip: ip})
	}
	if m != nil && len(e.Prefixes) > before {
		w.edit(m.Meta.Id).Prefixes = e.Prefixes
	}
	if len(got) > 0 {
		x.Assignment.Ip, x.Assignment.NetworkId, x.Assignment.Addresses = got[0].Ip, got[0].NetworkId, got
	}
	return nil
}

// release takes addresses back that were picked for nothing. Their blocks stay with
// the machine.
func (w *placement) release(list []*v1.NetworkAddress) {
	for _, a := range list {
		if ip, err := netip.ParseAddr(a.Ip); err == nil {
			delete(w.ipam.used, ip)
		}
	}
}

// further is all addresses of a container that has several.
func further(x *v1.Container) []string {
	if list := x.GetAssignment().GetAddresses(); len(list) > 1 {
		return ips(list)
	}
	return nil
}

func ips(list []*v1.NetworkAddress) []string {
	out := make([]string, 0, len(list))
	for _, a := range list {
		out = append(out, a.Ip)
	}
	return out
}

func (w *placement) say(whom, what string, r *v1.Reason) {
	w.said = append(w.said, decision{whom, what, r.GetSummary()})
}

func (w *placement) hostName(id string) string {
	if h := w.hosts[id]; h != nil {
		return h.Meta.Name
	}
	return id
}

// named gives machines and hosts the names that people know, in place of ids.
func (w *placement) named(r *v1.Reason) *v1.Reason {
	if w.replacer == nil {
		w.replacer = nameReplacer(w.machines, w.hosts)
	}
	r.Summary = w.replacer.Replace(r.Summary)
	for _, e := range r.Exclusions {
		e.Detail = w.replacer.Replace(e.Detail)
	}
	for _, o := range r.Options {
		if m := w.machines[o.Machine]; m != nil {
			o.Machine = m.Meta.Name
		}
		if h := w.hosts[o.Host]; h != nil {
			o.Host = h.Meta.Name
		}
	}
	return r
}

// unplaced keeps the reason where people look for it.
func (w *placement) unplaced(id string, r *v1.Reason, remedy string) {
	x := w.containers[id]
	if x == nil {
		return
	}
	r = w.named(r)
	r.Summary = strings.ReplaceAll(r.Summary, id, x.Meta.Name)
	w.c.plan.unplaced[id] = r
	msg := "no place: " + r.Summary
	if remedy != "" {
		remedy = w.replacer.Replace(remedy)
		msg += "; " + remedy
	}
	if x.GetStatus().GetMessage() == msg && x.Status.State == v1.ContainerState_CONTAINER_STATE_PENDING {
		return
	}
	x = clone(x)
	if x.Status == nil {
		x.Status = &v1.ContainerStatus{}
	}
	x.Status.State, x.Status.Message = v1.ContainerState_CONTAINER_STATE_PENDING, msg
	w.tx.Update(x)
	w.said = append(w.said, decision{x.Meta.Name, "has no place", strings.TrimPrefix(msg, "no place: ")})
}

func (w *placement) commit(ctx context.Context) error {
	if w.err != nil {
		return w.err
	}
	for _, id := range w.order {
		m := w.changed[id]
		if w.fresh[id] {
			w.tx.Create(m)
		} else {
			w.tx.Update(m)
		}
		delete(w.checked, id)
	}
	for id := range w.checked {
		if m := w.machines[id]; m != nil && w.hosts[id] == nil {
			w.tx.Check(m)
		}
	}
	_, err := w.tx.Commit(ctx)
	if err == nil {
		w.c.tell(w.by, w.said)
	}
	return err
}

// nameReplacer puts names in the place of ids in sentences; longer ids first, so
// that none is taken for the beginning of another.
func nameReplacer(machines map[string]*v1.Machine, hosts map[string]*v1.Host) *strings.Replacer {
	var pairs [][2]string
	for ref, m := range machines {
		pairs = append(pairs, [2]string{ref, m.Meta.Name})
	}
	for ref, h := range hosts {
		pairs = append(pairs, [2]string{ref, h.Meta.Name})
	}
	slices.SortFunc(pairs, func(a, b [2]string) int {
		if len(a[0]) != len(b[0]) {
			return len(b[0]) - len(a[0])
		}
		return strings.Compare(a[0], b[0])
	})
	var args []string
	for _, p := range pairs {
		args = append(args, p[0], p[1])
	}
	return strings.NewReplacer(args...)
}
