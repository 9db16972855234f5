package control

import (
	"cmp"
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/docker/go-units"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/planner"
	"tandem/internal/store"
)

// userMachineCPU is what a machine reserves whose maker said nothing, in thousandths.
const userMachineCPU = 100

// CreateMachine makes a machine that a user asked for, on host h. What is not
// said is the host's base size and the largest ceiling it allows.
func (c *Controller) CreateMachine(ctx context.Context, r *v1.CreateMachineRequest, project string, h *v1.Host) (*v1.Machine, error) {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	snap := c.store.Snapshot()
	f := h.GetFacts()
	size := &v1.Size{CpuMilli: cmp.Or(r.GetSize().GetCpuMilli(), userMachineCPU), MemoryBytes: cmp.Or(r.GetSize().GetMemoryBytes(), f.GetBaseMemoryBytes())}
	top := maxMachine(f)
	ceiling := &v1.Size{CpuMilli: cmp.Or(r.GetCeiling().GetCpuMilli(), max(top.CpuMilli, size.CpuMilli)), MemoryBytes: cmp.Or(r.GetCeiling().GetMemoryBytes(), max(top.MemoryBytes, size.MemoryBytes))}
	if size.CpuMilli > ceiling.CpuMilli || size.MemoryBytes > ceiling.MemoryBytes {
		return nil, fmt.Errorf("a size of %s is above the ceiling of %s: %w", text(size), text(ceiling), errdefs.ErrInvalidArgument)
	}
	if ceiling.CpuMilli > top.CpuMilli || ceiling.MemoryBytes > top.MemoryBytes {
		return nil, fmt.Errorf("a machine on host %s can become %s at most: %w", h.Meta.Name, text(top), errdefs.ErrInvalidArgument)
	}
	if err := fitsHost(snap, h, "", size); err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, m := range snap.Machines {
		names[m.Meta.Name] = true
	}
	if names[r.Name] {
		return nil, fmt.Errorf("there is a machine %s already: %w", r.Name, errdefs.ErrAlreadyExists)
	}
	iso := r.Isolation
	if iso == v1.Isolation_ISOLATION_UNSPECIFIED {
		iso = v1.Isolation_ISOLATION_PROJECT
	}
	m := c.newMachine(names, project, iso, size, ceiling, h.Meta.Id)
	if r.Name != "" {
		m.Meta.Name = r.Name
	}
	m.ByUser, m.MinSize = true, clone(size)
	m.Reason = &v1.Reason{Summary: "made by a user"}
	_, err := c.store.Create(store.Growing(ctx), m)
	return m, err
}

// maxMachine is the most that a machine on a host can be.
func maxMachine(f *v1.HostFacts) *v1.Size {
	top := &v1.Size{CpuMilli: f.GetCapacity().GetCpuMilli() - f.GetMachineOverhead().GetCpuMilli(), MemoryBytes: f.GetCapacity().GetMemoryBytes() - f.GetMachineOverhead().GetMemoryBytes()}
	if l := f.GetCapabilities().GetMaxMachine(); l != nil {
		if l.CpuMilli > 0 {
			top.CpuMilli = min(top.CpuMilli, l.CpuMilli)
		}
		if l.MemoryBytes > 0 {
			top.MemoryBytes = min(top.MemoryBytes, l.MemoryBytes)
		}
	}
	return top
}

// fitsHost says whether a machine of this size has room beside all others; id is
// the machine's own, when it is there already.
func fitsHost(snap *store.Snapshot, h *v1.Host, id string, size *v1.Size) error {
	f := h.GetFacts()
	free := clone(f.GetCapacity())
	if free == nil {
		free = &v1.Size{}
	}
	o := f.GetMachineOverhead()
	for _, m := range snap.Machines {
		if m.HostId == h.Meta.Id && m.Meta.Id != id {
			free.CpuMilli -= m.GetSize().GetCpuMilli() + o.GetCpuMilli()
			free.MemoryBytes -= m.GetSize().GetMemoryBytes() + o.GetMemoryBytes()
		}
	}
	for _, x := range snap.Containers {
		if x.GetAssignment().GetHostId() == h.Meta.Id && x.Assignment.MachineId == "" {
			z := Request(x.GetSpec().GetResources())
			free.CpuMilli -= z.CpuMilli
			free.MemoryBytes -= z.MemoryBytes
		}
	}
	free.CpuMilli -= o.GetCpuMilli()
	free.MemoryBytes -= o.GetMemoryBytes()
	if size.CpuMilli > free.CpuMilli || size.MemoryBytes > free.MemoryBytes {
		return fmt.Errorf("host %s has room for a machine of %s at most, not %s: %w", h.Meta.Name,
			text(&v1.Size{CpuMilli: max(free.CpuMilli, 0), MemoryBytes: max(free.MemoryBytes, 0)}), text(size), errdefs.ErrResourceExhausted)
	}
	return nil
}

func text(s *v1.Size) string {
	return fmt.Sprintf("%g CPU, %s", float64(s.GetCpuMilli())/1000, units.BytesSize(float64(s.GetMemoryBytes())))
}

// Resize changes a machine's size within its ceiling, its containers' needs and
// its host's room. A dimension that is zero in want stays. The size becomes the
// least that the machine is shrunk to later.
func (c *Controller) Resize(ctx context.Context, find func() (*v1.Machine, error), want *v1.Size, needs func(*v1.Machine, string) *v1.Size) (*v1.Machine, error) {
	c.planMu.Lock()
	defer c.planMu.Unlock()
	found, err := find()
	if err != nil {
		return nil, err
	}
	return store.Update(ctx, c.store, store.KeyOf(found), func(m *v1.Machine) error {
		to := &v1.Size{CpuMilli: cmp.Or(want.CpuMilli, m.GetSize().GetCpuMilli()), MemoryBytes: cmp.Or(want.MemoryBytes, m.GetSize().GetMemoryBytes())}
		need := needs(m, "")
		h, err := store.ByID[*v1.Host](c.store, store.Hosts, m.HostId)
		if err != nil {
			return err
		}
		k := h.GetFacts().GetCapabilities()
		grows := to.CpuMilli > m.Size.GetCpuMilli() || to.MemoryBytes > m.Size.GetMemoryBytes()
		shrinks := to.CpuMilli < m.Size.GetCpuMilli() || to.MemoryBytes < m.Size.GetMemoryBytes()
		switch {
		case m.Meta.Deleting:
			return fmt.Errorf("machine %s is being removed: %w", m.Meta.Name, errdefs.ErrFailedPrecondition)
		case to.CpuMilli > m.Ceiling.GetCpuMilli() || to.MemoryBytes > m.Ceiling.GetMemoryBytes():
			return fmt.Errorf("machine %s can become %s at most (its ceiling is fixed when it starts), not %s: %w", m.Meta.Name, text(m.Ceiling), text(to), errdefs.ErrFailedPrecondition)
		case to.CpuMilli < need.CpuMilli || to.MemoryBytes < need.MemoryBytes:
			return fmt.Errorf("the containers of machine %s need %s, so %s is too little: %w", m.Meta.Name, text(need), text(to), errdefs.ErrFailedPrecondition)
		case to.CpuMilli%1000 != 0:
			return fmt.Errorf("a machine has whole CPUs, not %g: %w", float64(to.CpuMilli)/1000, errdefs.ErrInvalidArgument)
		case to.MemoryBytes < h.GetFacts().GetBaseMemoryBytes():
			return fmt.Errorf("a machine on host %s has at least %s of memory: %w", h.Meta.Name, units.BytesSize(float64(h.Facts.BaseMemoryBytes)), errdefs.ErrFailedPrecondition)
		case !m.Stopped && grows && !(k.GetGrowCpu() && k.GetGrowMemory()), !m.Stopped && shrinks && !(k.GetShrinkCpu() && k.GetShrinkMemory()):
			return fmt.Errorf("host %s can't change a running machine that way: stop it first: %w", h.Meta.Name, errdefs.ErrFailedPrecondition)
		}
		if step := k.GetMemoryStepBytes(); step > 0 {
			base := h.Facts.GetBaseMemoryBytes()
			to.MemoryBytes = base + (to.MemoryBytes-base+step-1)/step*step
		}
		if grows {
			if err := fitsHost(c.store.Snapshot(), h, m.Meta.Id, to); err != nil {
				return err
			}
		}
		m.Size, m.MinSize = to, clone(to)
		m.Meta.Generation++
		return nil
	})
}

// Needs is what the containers of a machine reserve, with the guest's own
// overhead; the container with id except is left out.
func Needs(snap *store.Snapshot, m *v1.Machine, except string) *v1.Size {
	need := &v1.Size{}
	for _, h := range snap.Hosts {
		if h.Meta.Id == m.HostId {
			o := h.GetFacts().GetGuestOverhead()
			need.CpuMilli, need.MemoryBytes = o.GetCpuMilli(), o.GetMemoryBytes()
		}
	}
	for _, x := range snap.Containers {
		if x.GetAssignment().GetMachineId() == m.Meta.Id && x.Meta.Id != except {
			z := Request(x.GetSpec().GetResources())
			need.CpuMilli += z.CpuMilli
			need.MemoryBytes += cmp.Or(z.MemoryBytes, planner.DefaultMemory)
		}
	}
	return need
}

// refit grows machines whose containers reserve more than when they were placed
// (`tandem update`), as far as ceiling and host allow.
func refit(snap *store.Snapshot, tx *store.Txn) (did map[string]bool, said []decision) {
	did = map[string]bool{}
	for _, m := range snap.Machines {
		if m.Meta.Deleting {
			continue
		}
		need := Needs(snap, m, "")
		if need.CpuMilli <= m.GetSize().GetCpuMilli() && need.MemoryBytes <= m.GetSize().GetMemoryBytes() {
			continue
		}
		for _, h := range snap.Hosts {
			if h.Meta.Id != m.HostId || !h.Connected {
				continue
			}
			to := fitted(h.GetFacts(), m, need)
			if (to.CpuMilli > m.Size.GetCpuMilli() || to.MemoryBytes > m.Size.GetMemoryBytes()) && fitsHost(snap, h, m.Meta.Id, to) == nil {
				m = clone(m)
				was := text(m.Size)
				m.Size = to
				m.Meta.Generation++
				tx.Update(m)
				did[m.Meta.Id] = true
				said = append(said, decision{m.Meta.Name, "grows from " + was + " to " + text(to), "its containers reserve more"})
			}
		}
	}
	return did, said
}

// fitted is the size of a machine that holds need, in memory steps,
// at most its ceiling, never smaller than it is.
func fitted(f *v1.HostFacts, m *v1.Machine, need *v1.Size) *v1.Size {
	to := &v1.Size{CpuMilli: need.CpuMilli, MemoryBytes: need.MemoryBytes}
	base, step := f.GetBaseMemoryBytes(), max(f.GetCapabilities().GetMemoryStepBytes(), 1)
	if to.MemoryBytes > base {
		to.MemoryBytes = base + (to.MemoryBytes-base+step-1)/step*step
	}
	to.CpuMilli = max(min(to.CpuMilli, m.Ceiling.GetCpuMilli()), m.Size.GetCpuMilli())
	to.MemoryBytes = max(min(to.MemoryBytes, m.Ceiling.GetMemoryBytes()), m.Size.GetMemoryBytes())
	return to
}
