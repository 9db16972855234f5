package planner

import "math"

// Weights turn the terms of a cost into seconds-equivalents: what one would wait
// to avoid it. They are few on purpose, and every option in a Reason shows its terms.
const (
	// WeightSecond is for each second until the container runs.
	WeightSecond = 1.0
	// WeightPinnedGiB is for each GiB bound for good beyond what the container
	// asks for: overheads of a new machine, and what steps round up.
	WeightPinnedGiB = 8.0
	// WeightSameHost is for each replica of the service already on the host: a
	// host is lost as a whole, so another host is worth a boot.
	WeightSameHost = 30.0
	// WeightSameMachine is for each replica already in the machine: it decides
	// between machines that are there, and is too small to pay for another one.
	WeightSameMachine = 0.25
	// WeightAskedSpread replaces the weight of the layer that Spread names.
	WeightAskedSpread = 1000.0
	// WeightFit is for what stays free on the host, as the mean of the squares of
	// its parts: full hosts become fuller and empty ones stay empty, so that they
	// can be switched off, and neither CPU nor memory is left alone.
	WeightFit = 16.0
	// WeightRest is for the part of the question's other containers of the same
	// project that would not fit beside this one.
	WeightRest = 4.0
	// WeightPowerOn is for a host that has to be switched on.
	WeightPowerOn = 1000.0
	// WeightCrowd is for each machine that is on the host already when another is
	// booted there, where hosts can be switched on instead; as much again where
	// nothing is free, in proportion. So a second one boots where more than a
	// seventh of the host is free, the roomiest first, and for a third one a host
	// is switched on: a few large machines.
	WeightCrowd = 540.0
	// WeightSparse is for a host that runs next to nothing, and twice of it for such
	// a machine, where hosts can be switched off; it wears off with e^(-n/10) for n
	// containers: what holds few empties by itself, or is cheap to empty, as long as
	// nothing is added.
	WeightSparse = 8.0
	// WeightMoveGiB is for each GiB that a move or a migration carries.
	WeightMoveGiB = 1.0
)

const gib = float64(1 << 30)

// candidate is an option under comparison; terms are in the order of termNames.
type candidate struct {
	kind    Kind // Place, Grow, Boot, PlaceM
	host    *host
	machine *machine // nil with Boot and PlaceM
	to      Size     // the machine's size after Grow or Boot
	grown   Size     // by how much it grew
	beside  int      // replicas of the service on the host
	seconds float64
	pinned  int64
	terms   [nTerms]float64
	cost    float64
}

const (
	termSeconds = iota
	termPinned
	termSpread
	termFit
	termRest
	termCrowd
	termSparse
	nTerms
)

var termNames = [nTerms]string{"seconds", "pinned", "spread", "fit", "rest", "crowd", "sparse"}

func (a *candidate) id() string {
	if a.machine != nil {
		return a.machine.ID
	}
	return a.host.ID
}

// less is a total order: cost, then the kinder action, then the id.
func (a *candidate) less(b *candidate) bool {
	if a.cost != b.cost {
		return a.cost < b.cost
	}
	if a.kind != b.kind {
		return rank(a.kind) < rank(b.kind)
	}
	return a.id() < b.id()
}

func rank(k Kind) int {
	switch k {
	case Place:
		return 0
	case Grow:
		return 1
	case PlaceM:
		return 2
	}
	return 3
}

// weigh fills in a feasible candidate's cost.
func (d *decision) weigh(c *container, a *candidate) {
	h, m := a.host, a.machine
	caps := &h.Capabilities
	switch a.kind {
	case Place:
		if m.fresh {
			a.seconds = caps.BootSeconds
		}
	case Grow:
		want := m.used().add(c.need)
		a.to = h.stepUp(m.Size, want)
		a.grown = a.to.sub(m.Size)
		a.pinned = max(0, a.to.Memory-max(want.Memory, m.Size.Memory))
		a.seconds = caps.GrowSeconds
		if m.fresh { // it starts in that size
			a.seconds = caps.BootSeconds
		}
	case Boot:
		a.to = bootSize(h, c.need)
		a.seconds = caps.BootSeconds
		a.pinned = max(0, a.to.Memory-c.need.Memory) + h.MachineExtra.Memory
	case PlaceM:
	}
	a.terms[termSeconds] = WeightSecond * a.seconds
	a.terms[termPinned] = WeightPinnedGiB * float64(a.pinned) / gib
	a.terms[termSpread] = d.spread(c, a)
	a.terms[termFit] = WeightFit * fit(c, a)
	a.terms[termRest] = d.rest(c, a)
	if d.switchable() {
		a.terms[termSparse] = d.sparse(c, a)
		if a.kind == Boot && c.Isolation == Project {
			a.terms[termCrowd] = crowd(h)
		}
	}
	cost := 0.0
	for i := range a.terms {
		cost += a.terms[i]
	}
	a.cost = cost
}

// crowd charges for another machine on a host.
func crowd(h *host) float64 {
	free := h.avail()
	room := min(share(free.CPU, h.Capacity.CPU), share(free.Memory, h.Capacity.Memory))
	return WeightCrowd * float64(len(h.machines)) * (2 - room)
}

// sparse charges for adding to what holds little.
func (d *decision) sparse(c *container, a *candidate) float64 {
	cost := WeightSparse * decay(len(a.host.all.members))
	if c.Isolation != Project {
		return cost // the machines are few and large
	}
	n := 0
	if a.machine != nil {
		n = len(a.machine.in.members)
	}
	return cost + 2*WeightSparse*decay(n)
}

// decay is e^(-n/10).
func decay(n int) float64 {
	if n >= len(decays) {
		return 0
	}
	return decays[n]
}

var decays = func() (d [64]float64) {
	for n := range d {
		d[n] = math.Exp(-float64(n) / 10)
	}
	return d
}()

// fit is 0 (nothing stays free on the host) to 1 (empty). What machines hold free
// counts as free: it can be given back.
func fit(c *container, a *candidate) float64 {
	left := a.host.idle().sub(c.need)
	if a.kind == Boot {
		left = left.sub(a.host.GuestExtra).sub(a.host.MachineExtra)
	}
	cpu, mem := share(left.CPU, a.host.Capacity.CPU), share(left.Memory, a.host.Capacity.Memory)
	return (cpu*cpu + mem*mem) / 2
}

// spread charges for replicas of the same service nearby: hosts first, then machines.
func (d *decision) spread(c *container, a *candidate) float64 {
	if c.Service == "" || d.loose {
		return 0
	}
	onHost, inMachine := a.beside, 0
	if onHost == 0 && c.Spread != "zone" {
		return 0 // nor in any of its machines
	}
	k := c.service()
	if a.machine != nil {
		inMachine = a.machine.in.count(k)
	}
	if a.kind == PlaceM {
		inMachine = a.host.metal.count(k)
	}
	perHost, perMachine, perZone := WeightSameHost, WeightSameMachine, 0.0
	switch c.Spread {
	case "host":
		perHost = WeightAskedSpread
	case "machine":
		perMachine = WeightAskedSpread
	case "zone":
		perZone = WeightAskedSpread
	}
	if a.kind == Boot && c.Spread != "machine" {
		inMachine = onHost // a boot earns nothing by being a fresh machine
	}
	cost := perHost*float64(onHost) + perMachine*float64(inMachine)
	if perZone > 0 {
		cost += perZone * float64(d.s.inZone(k, a.host.Zone))
	}
	return cost
}

func share(part, whole int64) float64 {
	if whole <= 0 || part <= 0 {
		return 0
	}
	return min(1, float64(part)/float64(whole))
}

// rest charges for what of the question's remaining containers of the same kind
// would not fit beside c with this option.
func (d *decision) rest(c *container, a *candidate) float64 {
	left := d.left[groupOf(c.Isolation, c.Project)].sub(c.need)
	if !left.positive().fits(Size{}) && c.Isolation != Own {
		var room Size
		switch a.kind {
		case Boot:
			top := a.host.top.min(a.host.avail().sub(a.host.MachineExtra))
			room = top.sub(a.host.GuestExtra).sub(c.need)
		case PlaceM:
			room = a.host.avail().sub(c.need)
		default:
			room = a.machine.room().sub(c.need)
		}
		out := left.shortOf(room)
		return WeightRest * max(share(out.CPU, left.CPU), share(out.Memory, left.Memory))
	}
	return 0
}
