// Package control holds the controllers of a Tandem server: loops that compare
// what users want with what is, and write down the next step. They share nothing
// but the store: each is a reconcile that is woken by changes, decides from one
// snapshot, and writes one transaction guarded by revisions. A kill at any
// instruction loses no step; the next run takes it again.
//
//	deploy.go    services -> containers: create, scale, replace, stop in order
//	place.go     containers without a place -> hosts and machines (package planner)
//	trim.go      machines that are empty or too large -> stopped, smaller
//	fold.go      half-empty machines -> moves of what is in them
//	moves.go     moves under way -> their next step
//	restart.go   hosts that stay away -> what may run elsewhere does
//	collect.go   records that are to go and of which nothing is left -> gone
//	scale.go     what services use -> how many replicas they have
//	recommend.go what services use, remembered -> what they should reserve
//	questions.go copies of the planner's state for questions; stale plans
//	hosts.go     sessions of agents: facts, statuses in; intent (HostSpec) out
//
// Beside them are pure functions over a snapshot: hostspec.go (what one host
// shall run), ports.go and names.go (published ports, DNS), depends.go
// (conditions of depends_on), ipam.go (addresses).
//
//	c, err := control.New(control.Options{Store: st, Logger: log})
//	go c.Run(ctx)                          // leader only
//	err = c.Serve(ctx, hostID, client)     // for each agent that connects
package control
