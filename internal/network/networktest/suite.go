// Package networktest is the contract of network.Network as a test suite: every
// implementation passes it, the real one and the fake.
//
//	func TestContract(t *testing.T) {
//		networktest.Run(t, func(t *testing.T) network.Network { return fake.New() })
//	}
package networktest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
)

// State is a valid state: two projects and an internal network, three machines, a
// container on metal that is in two networks, a published port, names.
func State() *network.State {
	return &network.State{
		Networks: []*v1.NetworkSpec{
			{Id: "na", Project: "a", Name: "default", Cidr: "10.64.0.0/24"},
			{Id: "nb", Project: "b", Name: "default", Cidr: "10.64.1.0/24"},
			{Id: "nc", Project: "a", Name: "back", Cidr: "10.64.2.0/24", Internal: true},
		},
		Machines: []network.Machine{
			{ID: "m-a1", MAC: "02:00:00:00:0a:01", Prefixes: []string{"10.64.0.0/28"}},
			{ID: "m-b1", MAC: "02:00:00:00:0b:01", Prefixes: []string{"10.64.1.0/28", "10.64.1.16/28"}},
			{ID: "m-c1", MAC: "02:00:00:00:0c:01", Prefixes: []string{"10.64.2.0/28"}},
		},
		Containers: []network.MetalContainer{{ID: "iron", IP: "10.64.0.250", Further: []string{"10.64.2.250"}}},
		Clients:    [][]string{{"10.64.0.250", "10.64.2.250"}},
		Ports: []*v1.PublishedPort{{Protocol: "tcp", HostPort: 18080, Backends: []*v1.Backend{
			{Ip: "10.64.0.1", Port: 80, ContainerId: "web", Ready: true}, {Ip: "10.64.1.1", Port: 80, ContainerId: "late"}}}},
		Names: []*v1.NameRecord{{Network: "na", Name: "web", Ips: []string{"10.64.0.1"}}, {Network: "nb", Name: "db", Ips: []string{"10.64.1.1"}}},
	}
}

// Run runs the suite. open makes a network that nothing was applied to, and sees to
// it that nothing of it is left at the test's end.
func Run(t *testing.T, open func(*testing.T) network.Network) {
	t.Run("names of links", func(t *testing.T) { linkNames(t, open(t)) })
	t.Run("apply", func(t *testing.T) { apply(t, open(t)) })
	t.Run("the state stays the caller's", func(t *testing.T) { callers(t, open(t)) })
	t.Run("invalid states", func(t *testing.T) { Invalid(t, open(t)) })
	t.Run("a context that has ended", func(t *testing.T) { ended(t, open(t)) })
	t.Run("many at once", func(t *testing.T) { concurrent(t, open(t)) })
	t.Run("closed", func(t *testing.T) { closed(t, open(t)) })
}

func linkNames(t *testing.T, n network.Network) {
	seen := map[string]string{}
	for _, id := range []string{"m-1", "m-2", "m-3f9c01d2e4a5", "m-3f9c01d2e4a6", strings.Repeat("x", 64), strings.Repeat("x", 63) + "y", "M-1", "m_1"} {
		for kind, name := range map[string]string{"tap": n.TapName(id), "veth": n.VethName(id)} {
			what := kind + " of " + id
			if name == "" || len(name) > 15 || strings.ContainsAny(name, "/ \t\n%") {
				t.Errorf("%s: the kernel takes no link %q", what, name)
			}
			if other, dup := seen[name]; dup {
				t.Errorf("%s and %s are both called %s", what, other, name)
			}
			seen[name] = what
		}
	}
	for name, what := range seen {
		kind, id, _ := strings.Cut(what, " of ")
		again := n.VethName(id)
		if kind == "tap" {
			again = n.TapName(id)
		}
		if again != name {
			t.Errorf("%s is called %s, then %s", what, name, again)
		}
	}
}

// must applies a state that has to be taken; an environment in which a port or name
// can't be had (Degraded) is no matter of the contract.
func must(t *testing.T, n network.Network, s *network.State) {
	t.Helper()
	var d *network.Degraded
	if err := n.Apply(context.Background(), s); err != nil && !errors.As(err, &d) {
		t.Fatal(err)
	}
}

func apply(t *testing.T, n network.Network) {
	must(t, n, &network.State{})
	must(t, n, State())
	must(t, n, State()) // again: nothing to do
	less := State()
	less.Machines, less.Containers, less.Ports = less.Machines[1:], nil, nil
	must(t, n, less)
	must(t, n, State())
	must(t, n, &network.State{})
	must(t, n, State())
	for range 2 { // also when nothing is there any more
		if err := n.Teardown(context.Background()); err != nil {
			t.Fatal("teardown:", err)
		}
	}
	must(t, n, State()) // goes on after a teardown
}

func callers(t *testing.T, n network.Network) {
	s := State()
	must(t, n, s)
	want := State()
	same := len(s.Networks) == len(want.Networks) && len(s.Ports) == len(want.Ports) && len(s.Names) == len(want.Names) &&
		reflect.DeepEqual(s.Machines, want.Machines) && reflect.DeepEqual(s.Containers, want.Containers) && reflect.DeepEqual(s.Clients, want.Clients)
	for i := range want.Networks {
		same = same && proto.Equal(s.Networks[i], want.Networks[i])
	}
	for i := range want.Ports {
		same = same && proto.Equal(s.Ports[i], want.Ports[i])
	}
	for i := range want.Names {
		same = same && proto.Equal(s.Names[i], want.Names[i])
	}
	if !same {
		t.Errorf("Apply changed what it was given: %+v", s)
	}
	// What the caller does to its state later is no matter: rubbish there would be
	// found by the next Apply of an implementation that kept it.
	s.Networks[0].Cidr, s.Machines[0].MAC, s.Machines[1].Prefixes[0], s.Names[0].Ips[0] = "x", "x", "x", "x"
	s.Containers[0].Further[0], s.Clients[0][0] = "x", "x"
	must(t, n, State())
}

// Invalid checks that states which can't be meant are InvalidArgument, and that the
// next one is taken as if nothing had been.
func Invalid(t *testing.T, n network.Network) {
	must(t, n, State())
	for name, change := range map[string]func(*network.State){
		"cidr":           func(s *network.State) { s.Networks[0].Cidr = "10.64.0.1/24" },
		"no cidr":        func(s *network.State) { s.Networks[0].Cidr = "" },
		"ipv6":           func(s *network.State) { s.Networks[0].Cidr = "fd00::/64" },
		"huge":           func(s *network.State) { s.Networks[0].Cidr = "0.0.0.0/0" },
		"link-local":     func(s *network.State) { s.Networks[0].Cidr = "169.254.0.0/16" },
		"overlap":        func(s *network.State) { s.Networks[0].Cidr = "10.64.0.0/15" },
		"twice":          func(s *network.State) { s.Networks[0].Id = "nb" },
		"no id":          func(s *network.State) { s.Networks[0].Id = "" },
		"mtu":            func(s *network.State) { s.Networks[0].Mtu = 1 << 30 },
		"mac":            func(s *network.State) { s.Machines[0].MAC = "01:00:00:00:00:01" },
		"no mac":         func(s *network.State) { s.Machines[0].MAC = "" },
		"gateway's mac":  func(s *network.State) { s.Machines[0].MAC = "ee:ee:ee:ee:ee:ee" },
		"machine twice":  func(s *network.State) { s.Machines[1].ID = s.Machines[0].ID },
		"prefix":         func(s *network.State) { s.Machines[0].Prefixes = []string{"x"} },
		"prefix twice":   func(s *network.State) { s.Machines[0].Prefixes = s.Machines[1].Prefixes },
		"container":      func(s *network.State) { s.Containers[0].IP = "127.0.0.1" },
		"another's":      func(s *network.State) { s.Containers[0].IP = "10.64.0.5" },
		"no address":     func(s *network.State) { s.Containers[0].IP = "" },
		"further":        func(s *network.State) { s.Containers[0].Further = []string{"x"} },
		"further, twice": func(s *network.State) { s.Containers[0].Further = []string{"10.64.0.250"} },
		"further, alien": func(s *network.State) { s.Containers[0].Further = []string{"10.64.2.5"} },
		"prefix too big": func(s *network.State) { s.Machines[0].Prefixes = []string{"10.64.0.0/33"} },
	} {
		s := State()
		change(s)
		if err := n.Apply(context.Background(), s); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, n, State())
}

func ended(t *testing.T, n network.Network) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := n.Apply(ctx, State()); !errors.Is(err, context.Canceled) {
		t.Errorf("Apply: %v", err)
	}
	must(t, n, State())
}

func concurrent(t *testing.T, n network.Network) {
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			s := State()
			s.Machines = s.Machines[:i%len(s.Machines)]
			var d *network.Degraded
			if err := n.Apply(context.Background(), s); err != nil && !errors.As(err, &d) {
				t.Error(err)
			}
			_ = n.TapName(fmt.Sprint("m-", i))
		})
	}
	wg.Wait()
	must(t, n, State())
}

func closed(t *testing.T, n network.Network) {
	must(t, n, State())
	for range 2 {
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Apply(context.Background(), State()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a closed network takes a state: %v", err)
	}
}
