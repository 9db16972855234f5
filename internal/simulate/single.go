package simulate

import (
	"slices"
	"time"
)

// single is a VM for each container, as one orders VMs: sized to the container,
// placed on the host where it leaves least, stopped with it. Hosts are switched
// off as soon as they are empty.
type single struct {
	pending []*Container
}

// Name is the policy's key.
func (*single) Name() string { return "vm-per-container" }

// Times are those of a VM that boots from its image.
func (*single) Times(o *Options) (time.Duration, bool) { return o.BaselineBoot, false }

// Isolates says that nobody shares a machine.
func (*single) Isolates(*Options) string { return IsolationOwn }

// Handle places at once, or as soon as something leaves.
func (s *single) Handle(w *World, e Event) int {
	switch e.Kind {
	case Arrived:
		s.place(w, e.Container)
		return 1
	case Left:
		if e.Machine != nil {
			h := e.Machine.Host
			w.Stop(e.Machine)
			s.retry(w)
			if len(h.Machines) == 0 {
				w.PowerOff(h)
			}
		}
	case HostLost:
		for _, c := range e.Lost {
			s.place(w, c)
		}
		return len(e.Lost)
	}
	return 0
}

func (s *single) place(w *World, c *Container) {
	if !w.CanEver(c) {
		w.Refuse(c, "larger than any host")
	} else if !s.boot(w, c) {
		s.pending = append(s.pending, c)
	}
}

func (s *single) boot(w *World, c *Container) bool {
	size := c.Need.add(w.Overhead)
	h := bestHost(w, size)
	if h == nil {
		return false
	}
	w.Place(c, w.Boot(h, w.Group(c), true, size))
	return true
}

func (s *single) retry(w *World) {
	s.pending = slices.DeleteFunc(s.pending, func(c *Container) bool { return c.Done || s.boot(w, c) })
}

// bestHost is the host on which a machine of a size leaves least, switched on if
// need be.
func bestHost(w *World, size Size) *Host {
	var best *Host
	least := 0.0
	for _, h := range w.Hosts() {
		if free := h.Free(); size.fits(free) {
			if left := leftover(free.sub(size), h.Size); best == nil || left < least {
				best, least = h, left
			}
		}
	}
	if best == nil {
		best = w.PowerOn(size)
	}
	return best
}

// leftover is what stays free, as parts of the whole.
func leftover(free, whole Size) float64 {
	return part(free.CPU, whole.CPU) + part(free.Memory, whole.Memory)
}
