package fake_test

import (
	"context"
	"errors"
	"testing"

	"tandem/internal/network"
	"tandem/internal/network/fake"
	"tandem/internal/network/networktest"
)

func TestContract(t *testing.T) {
	networktest.Run(t, func(*testing.T) network.Network { return fake.New() })
}

// TestItKeepsWhatItWasTold: deep copies, in order, and none of what failed.
func TestItKeepsWhatItWasTold(t *testing.T) {
	ctx := context.Background()
	n := fake.New()
	if n.Last() != nil || len(n.States()) != 0 || n.Closed() {
		t.Error("a new one was told something")
	}
	changed := n.Changed()
	s := networktest.State()
	if err := n.Apply(ctx, s); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	s.Networks[0].Cidr, s.Machines[1].Prefixes[0], s.Ports[0].Backends[0].Ip, s.Names[0].Ips[0], s.Containers[0].IP = "x", "x", "x", "x", "x"
	s.Containers[0].Further[0], s.Clients[0][0] = "x", "x"
	n.Last().Networks[0].Cidr = "y"
	l := n.Last()
	if l.Networks[0].Cidr != "10.64.0.0/24" || l.Machines[1].Prefixes[0] != "10.64.1.0/28" || l.Ports[0].Backends[0].Ip != "10.64.0.1" || l.Names[0].Ips[0] != "10.64.0.1" || l.Containers[0].IP != "10.64.0.250" ||
		l.Containers[0].Further[0] != "10.64.2.250" || l.Clients[0][0] != "10.64.0.250" {
		t.Errorf("it kept no copy: %+v", l)
	}
	broken := errors.New("no netlink")
	n.Fail(broken)
	if err := n.Apply(ctx, networktest.State()); !errors.Is(err, broken) || len(n.States()) != 1 {
		t.Error(err, len(n.States()))
	}
	n.Fail(nil)
	if err := n.Teardown(ctx); err != nil || len(n.States()) != 2 || len(n.Last().Machines) != 0 {
		t.Error(err, n.States())
	}
	if err := n.Close(); err != nil || !n.Closed() {
		t.Error(err)
	}
}
