// Package planner decides where containers run and what machines become: one
// decision over containers, machines and hosts. It is pure: no I/O, no clock, no
// randomness, no goroutine; the same events and the same question give the same
// plan.
//
// # Use
//
// A State mirrors what the caller knows. Feed it hosts first, then machines, then
// containers (placed or not), and keep it up to date with the same calls:
//
//	s := planner.New()
//	err := s.SetHost(planner.Host{ID: "h-1", Capacity: planner.Size{CPU: 8000, Memory: 32 << 30}, ...})
//	err = s.SetContainer(planner.Container{ID: "shop-web-1", Project: "shop", Service: "web"})
//
// Then ask. Several containers in one question are decided together: a machine
// that must be booted is booted once, in the size that all of them need.
//
//	plan, err := s.Decide(planner.Question{Place: []string{"shop-web-1", "shop-api-1"}})
//	for _, a := range plan.Actions {
//		fmt.Println(a.Kind, a.Container, a.Machine, a.Host, a.Reason.Summary)
//	}
//	for _, u := range plan.Unplaced {
//		fmt.Println(u.Container, u.Reason.Summary, u.Remedy)
//	}
//
// Decide changes nothing. Either feed back what came of the actions with the Set
// calls, or let Commit apply the plan at once: a plan of the present revision is
// carried out exactly as it was tried, an older one step by step as far as every
// rule and the guarantee still hold, else not at all (ErrStale). A booted machine is
// called "new-1", "new-2", ... until the caller gives it its name in Commit's rename.
//
// The other questions, one at a time: Trim (shrink and stop what holds too little),
// Fold (empty machines into others by moves),
// HostLost (where does it all start again), EmptyHost (maintenance), Rebalance and
// Consolidate within a budget of moves, WhatIf (hosts and replicas that are not
// there yet). Their plans are made of the same actions and applied the same way.
//
// A State is not safe for concurrent use, not even for several Decide calls at a
// time (a decision is tried out on the state and taken back). Clone gives a copy
// for what-if questions.
//
// # Surviving the loss of a host
//
// After SetPolicy(Policy{HostLosses: 1}) every covered container has a standby host
// (see State.Standby) that keeps room for it, and no plan places what would have
// none. Room is shared between losses that can't happen together. Survives says
// whether the proof is whole; HostLost turns it into actions. Not covered are
// containers that say so, that are bound to one host by a pin or a disk, or that
// must be near others.
//
// # Hosts that are off
//
// Hosts with Off set are switched on (PowerOn) when nothing that is on will do, for
// room or for the guarantee. Consolidate empties hosts and switches them off.
//
// # Rules (never broken by a plan)
//
//   - Host: sum of machine sizes + MachineExtra for each + requests of metal
//     containers + what is kept back for losses <= Capacity. Machine: GuestExtra +
//     sum of requests <= Size. A container that reserves no memory counts as
//     DefaultMemory, one that reserves no CPU as none.
//   - A machine grows in steps (MemoryStep, CPUStep) and to its Ceiling at most,
//     and only where the back end can; it migrates only between hosts that can.
//   - Isolation: Project containers share machines of their project, Shared ones
//     share with all Shared ones, Own has a machine alone, Metal runs on a host
//     that has the capability.
//   - Hosts that are down, off or cordoned and machines that stop take nothing new.
//   - Hosts and zones asked for; a volume that is on a host pins to it, and a volume
//     in use in a machine pins to that machine (its disk is attached to one at a
//     time).
//   - A published port (protocol, number, overlapping address) belongs to one
//     service on a host; replicas of the same service share it, as the traffic is
//     balanced over them. Port 0 is picked later and conflicts with nothing.
//   - Company: at most so many of a service beside (Anti), seen from both sides, and
//     who must be near (Near); per machine, host or zone. They hold after a loss too.
//   - Quotas of projects; limits and reservations of pools, nested by path.
//   - Batch containers are evicted only where the policy says so, and for a latency
//     container that fits nowhere else.
//
// # Cost (in seconds-equivalents; least wins, ties go to the lower id)
//
// See the Weight constants: seconds until the container runs, memory bound for
// good, replicas of the same service nearby, what stays free on the host, what of
// the rest of the question would no longer fit, and switching a host on. All terms
// are kept in Reason.Options.
package planner
