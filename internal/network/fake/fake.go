// Package fake is a network.Network that keeps what it was told, for tests of
// what stands above it.
//
//	n := fake.New()
//	...                 // give n to an agent
//	n.Last()            // the state that was applied last
//	n.Fail(err)         // Apply fails until Fail(nil)
package fake

import (
	"context"
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"tandem/internal/network"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/hostnet"
)

// Network records states. Its methods may be called from any goroutine.
type Network struct {
	mu      sync.Mutex
	states  []*network.State
	err     error
	closed  bool
	changed chan struct{}
}

var _ network.Network = (*Network)(nil)

// New returns a network that nothing was applied to.
func New() *Network { return &Network{changed: make(chan struct{})} }

// Apply implements network.Network: it keeps a deep copy of s. A state that the
// real one would not take is refused, and one that fails is not kept.
func (n *Network) Apply(ctx context.Context, s *network.State) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := hostnet.Check(s); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return fmt.Errorf("the host's network is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if n.err != nil {
		return n.err
	}
	n.states = append(n.states, clone(s))
	close(n.changed)
	n.changed = make(chan struct{})
	return nil
}

// TapName implements network.Network.
func (n *Network) TapName(machineID string) string {
	return endpoint.Name(endpoint.DefaultPrefix, 't', machineID)
}

// VethName implements network.Network.
func (n *Network) VethName(containerID string) string {
	return endpoint.Name(endpoint.DefaultPrefix, 'v', containerID)
}

// Close implements network.Network.
func (n *Network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	return nil
}

// Teardown implements network.Network: it applies an empty state.
func (n *Network) Teardown(ctx context.Context) error { return n.Apply(ctx, &network.State{}) }

// Fail makes Apply fail with err, or work again with nil.
func (n *Network) Fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.err = err
}

// Last is the state applied last; nil if there was none.
func (n *Network) Last() *network.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.states) == 0 {
		return nil
	}
	return clone(n.states[len(n.states)-1])
}

// States are all states in the order applied.
func (n *Network) States() []*network.State {
	n.mu.Lock()
	defer n.mu.Unlock()
	out := make([]*network.State, len(n.states))
	for i, s := range n.states {
		out[i] = clone(s)
	}
	return out
}

// Closed tells whether Close was called.
func (n *Network) Closed() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.closed
}

// Changed is closed at the next Apply that succeeds.
func (n *Network) Changed() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.changed
}

func clone(s *network.State) *network.State {
	out := &network.State{
		Machines:   append([]network.Machine(nil), s.Machines...),
		Containers: append([]network.MetalContainer(nil), s.Containers...),
	}
	for i := range out.Containers {
		out.Containers[i].Further = append([]string(nil), out.Containers[i].Further...)
	}
	for _, x := range s.Clients {
		out.Clients = append(out.Clients, append([]string(nil), x...))
	}
	for i := range out.Machines {
		out.Machines[i].Prefixes = append([]string(nil), out.Machines[i].Prefixes...)
	}
	for _, x := range s.Networks {
		out.Networks = append(out.Networks, proto.CloneOf(x))
	}
	for _, x := range s.Ports {
		out.Ports = append(out.Ports, proto.CloneOf(x))
	}
	for _, x := range s.Names {
		out.Names = append(out.Names, proto.CloneOf(x))
	}
	return out
}
