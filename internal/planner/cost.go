package planner

// Weights turn the terms of a cost into seconds-equivalents: what one would wait
// to avoid it. They are few on purpose, and every option in a Reason shows its terms.
const (
	// WeightSecond is for each second until the container runs.
	WeightSecond = 1.0
	// WeightPinnedGiB is for each GiB bound for good: the machine's growth, or a
	// new machine with its overheads. A free slot binds nothing.
	WeightPinnedGiB = 8.0
	// WeightSameHost is for each replica of the service already on the host: a
	// host is lost as a whole, so another host is worth a boot.
	WeightSameHost = 30.0
	// WeightSameMachine is for each replica already in the machine: it decides
	// between machines that are there, and is too small to pay for another one.
	WeightSameMachine = 0.25
	// WeightAskedSpread replaces the weight of the layer that Spread names.
	WeightAskedSpread = 1000.0
	// WeightFragmentation is for what stays free being large (tight fits first)
	// and lopsided (much CPU without memory, or the reverse).
	WeightFragmentation = 0.25
	// WeightRest is for the part of the question's other containers of the same
	// project that would not fit beside this one.
	WeightRest = 4.0
)

const gib = float64(1 << 30)

// candidate is an option under comparison; terms are in the order of termNames.
type candidate struct {
	kind    Kind // Place, Grow, Boot, PlaceM
	host    *host
	machine *machine // nil with Boot and PlaceM
	to      Size     // the machine's size after Grow or Boot
	grown   Size     // by how much it grew
	seconds float64
	pinned  int64
	terms   [nTerms]float64
	cost    float64
}

const (
	termSeconds = iota
	termPinned
	termSpread
	termFragmentation
	termRest
	nTerms
)

var termNames = [nTerms]string{"seconds", "pinned", "spread", "fragmentation", "rest"}

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
	var left, whole Size
	switch a.kind {
	case Place:
		left, whole = m.free().sub(c.need), m.Size
		if m.fresh {
			a.seconds = caps.BootSeconds
		}
	case Grow:
		a.to = h.stepUp(m.Size, m.used().add(c.need))
		a.grown = a.to.sub(m.Size)
		a.pinned = a.grown.Memory
		a.seconds = caps.GrowSeconds
		if m.fresh { // it starts in that size
			a.seconds = caps.BootSeconds
		}
		left, whole = h.free().sub(a.grown), h.Capacity
	case Boot:
		a.to = bootSize(h, c.need)
		a.seconds = caps.BootSeconds
		a.pinned = a.to.Memory + h.MachineExtra.Memory
		left, whole = h.free().sub(a.to).sub(h.MachineExtra), h.Capacity
	case PlaceM:
		a.pinned = c.need.Memory
		left, whole = h.free().sub(c.need), h.Capacity
	}
	a.terms[termSeconds] = WeightSecond * a.seconds
	a.terms[termPinned] = WeightPinnedGiB * float64(a.pinned) / gib
	a.terms[termSpread] = d.spread(c, a)
	a.terms[termFragmentation] = WeightFragmentation * fragmentation(left, whole)
	a.terms[termRest] = d.rest(c, a)
	a.cost = 0
	for _, t := range a.terms {
		a.cost += t
	}
}

// spread charges for replicas of the same service nearby: hosts first, then machines.
func (d *decision) spread(c *container, a *candidate) float64 {
	if c.Service == "" || d.loose {
		return 0
	}
	k := c.service()
	onHost, inMachine := a.host.all.count(k), 0
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
		cost += perZone * float64(d.inZone(k, a.host.Zone))
	}
	return cost
}

func (d *decision) inZone(k serviceKey, zone string) int {
	n := 0
	for h, count := range d.s.services[k] { // a sum: order does not matter
		if h.Zone == zone {
			n += count
		}
	}
	return n
}

// fragmentation is 0 (full) to 1.5 (empty and lopsided).
func fragmentation(left, whole Size) float64 {
	cpu, mem := share(left.CPU, whole.CPU), share(left.Memory, whole.Memory)
	lopsided := cpu - mem
	if lopsided < 0 {
		lopsided = -lopsided
	}
	return (cpu+mem)/2 + lopsided/2
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
			top := a.host.ceiling().min(a.host.free().sub(a.host.MachineExtra))
			room = top.sub(a.host.GuestExtra).sub(c.need)
		case PlaceM:
			room = a.host.free().sub(c.need)
		default:
			room = a.machine.room().sub(c.need)
		}
		out := left.shortOf(room)
		return WeightRest * max(share(out.CPU, left.CPU), share(out.Memory, left.Memory))
	}
	return 0
}
