package planner

// Question is what is asked; exactly one field is set.
type Question struct {
	// Place asks where to put these containers (IDs known to the state, not placed).
	Place []string
	// Trim asks which machines to shrink or stop because they are larger than
	// what they hold; idle names machines that have been empty for long enough
	// to be stopped.
	Trim *Trim
	// HostLost names hosts that are gone for good, all at once: where do their
	// machines and containers start again? The hosts count as down.
	HostLost []string
	// EmptyHost names hosts that shall run nothing: what goes where? They take
	// nothing new in the meantime.
	EmptyHost []string
	// Rebalance asks for what makes the state better without emptying hosts:
	// broken rules and guarantees mended, replicas spread, the fullest relieved.
	Rebalance *Budget
	// Consolidate asks how to need fewer machines and hosts.
	Consolidate *Consolidate
	// Fold asks how to need fewer machines: which can be emptied into others.
	Fold *Fold
	// Room asks for room in machines that are there, before it is needed.
	Room *Room
	// WhatIf asks what would happen after changes that were not made.
	WhatIf *WhatIf
}

// Trim bounds what a Trim question may do.
type Trim struct {
	Idle   []string // empty machines that may stop now
	Shrink bool     // shrink machines to what they hold (down to base)
	Only   []string // look only at these machines for shrinking; nil: at all
}

// Budget bounds the disruption of a plan. Zero means none of that kind, a
// negative number any amount.
type Budget struct {
	Containers int   // moved by start-before-stop
	Machines   int   // migrated while they run, and all that is in them
	Bytes      int64 // memory that migrations copy; what moves starts anew
}

// Consolidate bounds what a Consolidate question may do.
type Consolidate struct {
	Budget Budget
	// Hosts bounds how many hosts may be emptied in one plan; 0: any number.
	Hosts int
	// Leave is the part of what is switched on, 0 to 1, beyond which unused capacity
	// is worth any move of the budget. While less is unused, load that comes back
	// soon would undo the work: a host is emptied only if it holds few containers,
	// the fewer the less is unused (12 x (unused / Leave)²). Hosts that run nothing
	// are switched off whatever it says. 0.08 does well on clusters with a daily swing.
	Leave float64
	// PowerOff lets the plan switch off hosts that run nothing and that the
	// guarantee does without.
	PowerOff bool
	// KeepOn is how many empty hosts stay on in any case.
	KeepOn int
}

// WhatIf is a set of changes to try: hosts first, then services. The plan places
// all that is not placed then, those of removed hosts included.
type WhatIf struct {
	AddHosts    []Host
	RemoveHosts []string
	Scale       []Scale
}

// Scale sets a service's number of containers: more are made like the first by
// id, the last by id are taken away.
type Scale struct {
	Project, Service string
	Replicas         int
}

// Policy holds for the whole state; see State.SetPolicy.
type Policy struct {
	// HostLosses is how many hosts may be lost at the same time (0, 1 or 2)
	// with a destination that fits kept for everything that is covered.
	HostLosses int
	// Evict lets batch work be evicted for latency work that fits nowhere else: the
	// caller must carry out Evict and Shrink actions in a Place plan.
	Evict bool
}

// Pool is a share of the cluster, nested by its path: "/a/b" is inside "/a". A
// container counts in its pool and in all above.
type Pool struct {
	Path        string
	Reservation Size  // kept for the pool's containers; zero: none
	Limit       Size  // most that they reserve; a zero dimension: no limit
	Shares      int64 // weight against its siblings when not all fits; 0: 1000
}

// Quota bounds a project. Zero fields do not bound.
type Quota struct {
	Request    Size // sum of what its placed containers reserve
	Containers int  // placed
	Machines   int
}
