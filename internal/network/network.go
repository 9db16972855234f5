// Package network is the network of one host: a tap per machine, a veth per
// metal container, routes, anti-spoofing, separation of projects, NAT for
// egress, published ports and names. Package endpoint, below it, is the part
// that runs wherever a container does (guest and metal alike).
//
// The design is routed (L3): every container has a /32 in its project's
// network; a machine owns one or more prefixes; the host routes them to its tap;
// the gateway is 169.254.1.1 on every link.
//
// All of it is a reconcile: Apply takes the whole wanted state, changes what
// differs (also what an earlier process left), and removes the rest.
//
//	n, err := hostnet.New(hostnet.Options{...})
//	err = n.Apply(ctx, state)     // *Degraded: all but what it names is so
//	tap := n.TapName("m-1")       // is there now
package network

import (
	"context"

	v1 "tandem/api/tandem/v1"
)

// Gateway is every endpoint's next hop and name server.
const Gateway = "169.254.1.1"

// Machine is a machine's link.
type Machine struct {
	ID       string
	MAC      string
	Prefixes []string // CIDRs of its containers
}

// MetalContainer is a container's link on the host itself.
type MetalContainer struct {
	ID      string
	IP      string
	Further []string // its addresses in further networks, on the same link
}

// State is everything one host's network shall be.
type State struct {
	Networks   []*v1.NetworkSpec
	Machines   []Machine
	Containers []MetalContainer
	Ports      []*v1.PublishedPort
	Names      []*v1.NameRecord
	// Clients are the addresses of each container (in machines too) that is in
	// several networks, in its order: it sees the names of all of them.
	Clients [][]string
}

// Degraded is Apply's error when links, routes, filters and all other ports are as
// wanted, so that machines may start, but Err names published ports that can't be
// had (another program listens there) or says why there is no name server. Show
// it, and apply again later.
type Degraded struct{ Err error }

// Error implements error.
func (d *Degraded) Error() string { return d.Err.Error() }

// Unwrap gives errors.Is the errdefs classes below.
func (d *Degraded) Unwrap() error { return d.Err }

// Network programs one host.
type Network interface {
	// Apply makes the host's network what s says. Taps of new machines exist
	// when it returns nil or a *Degraded.
	Apply(ctx context.Context, s *State) error
	// TapName is the tap of a machine (deterministic, at most 15 bytes).
	TapName(machineID string) string
	// VethName is the host's end of a metal container's link.
	VethName(containerID string) string
	// Close stops the name server; the kernel's state stays.
	Close() error
	// Teardown removes everything Tandem made on this host.
	Teardown(ctx context.Context) error
}
