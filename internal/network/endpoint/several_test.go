package endpoint_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/internal/bed"
)

const frontNet, backNet = "10.64.0.0/24", "10.64.1.0/24"

// in is a network of addresses and their networks, in turn.
func in(pairs ...string) *v1.RuntimeNetwork {
	n := routed(pairs[0])
	for i := 0; i < len(pairs); i += 2 {
		n.Addresses = append(n.Addresses, &v1.RuntimeAddress{Address: pairs[i] + "/32", Network: pairs[i+1]})
	}
	return n
}

func apart(t *testing.T) *endpoint.Manager {
	t.Helper()
	m, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(t.TempDir(), "netns"), Separate: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ids, _ := m.List()
		for _, id := range ids {
			if err := m.Teardown(context.Background(), id); err != nil {
				t.Error(err)
			}
		}
		if got := borders(t); got != "" {
			t.Errorf("left: %s", got)
		}
		m.Close()
	})
	return m
}

// borders are the rules and routes that keep networks apart.
func borders(t *testing.T) string {
	t.Helper()
	rules, err := netlink.RuleList(netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, r := range rules {
		if r.Src != nil {
			out = append(out, fmt.Sprint(r.Priority, " ", r.Src, " ", r.Dst, " ", r.Table))
		}
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Type == unix.RTN_PROHIBIT {
			out = append(out, fmt.Sprint("no ", r.Dst))
		}
	}
	return strings.Join(out, "\n")
}

func setup(t *testing.T, m *endpoint.Manager, id string, n *v1.RuntimeNetwork) *bed.NS {
	t.Helper()
	p, err := m.Setup(context.Background(), id, n)
	if err != nil {
		t.Fatal(err)
	}
	return bed.OpenNS(t, p)
}

// TestNetworksOfOneKernel: a container in two networks is reached by each network's
// address, talks to each from its address there, and joins them for nobody.
func TestNetworksOfOneKernel(t *testing.T) {
	m := apart(t)
	front, back := setup(t, m, "front", in("10.64.0.5", frontNet)), setup(t, m, "back", in("10.64.1.5", backNet))
	n := in("10.64.1.6", backNet, "10.64.0.6", frontNet)
	n.Source = "10.64.0.6"
	setup(t, m, "both", n)
	before := borders(t)
	both := setup(t, m, "both", n) // again: nothing changes
	if now := borders(t); now != before || strings.Count(now, "\n") != 5 {
		t.Errorf("borders:\n%s\nwere:\n%s", now, before)
	}
	bed.Serve(t, front, "front", "10.64.0.5:80")
	bed.Serve(t, back, "back", "10.64.1.5:80")
	bed.Serve(t, both, "both", "0.0.0.0:80")
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, both, p, "10.64.0.5:80", "front sees 10.64.0.6")
		bed.MustAsk(t, both, p, "10.64.1.5:80", "back sees 10.64.1.6")
	}
	bed.MustAsk(t, front, "tcp", "10.64.0.6:80", "both sees 10.64.0.5")
	bed.MustAsk(t, back, "tcp", "10.64.1.6:80", "both sees 10.64.1.5")
	bed.MustFail(t, front, "tcp", "10.64.1.5:80")
	bed.MustFail(t, front, "udp", "10.64.1.5:80")
	bed.MustFail(t, front, "tcp", "10.64.1.6:80") // not by the other side's address
	bed.MustFail(t, back, "tcp", "10.64.0.5:80")
	if out, err := both.Run("ip", "route", "get", "192.0.2.1"); err != nil || !strings.Contains(out, "src 10.64.0.6") {
		t.Errorf("out: %s, %v", out, err)
	}

	// The other network's address is not front's to use, whatever it sets up.
	if _, err := front.Run("ip", "addr", "add", "10.64.1.6/32", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	if _, err := front.Run("ip", "route", "replace", "default", "via", "169.254.1.1", "dev", "eth0", "onlink", "src", "10.64.1.6"); err != nil {
		t.Fatal(err)
	}
	if got, err := bed.Ask(front, "udp", "10.64.1.5:80"); err == nil {
		t.Errorf("spoofed: %s", got)
	}
	front = setup(t, m, "front", in("10.64.0.5", frontNet)) // mended
	bed.MustAsk(t, front, "tcp", "10.64.0.6:80", "both sees 10.64.0.5")

	// Out of one of them: its address, routes and, with the last, its border go.
	both = setup(t, m, "both", in("10.64.0.6", frontNet))
	bed.MustAsk(t, both, "tcp", "10.64.0.5:80", "front sees 10.64.0.6")
	bed.MustFail(t, back, "tcp", "10.64.1.6:80")
	if out, err := both.Run("ip", "route"); err != nil || strings.Contains(out, "10.64.1") {
		t.Errorf("routes left: %s, %v", out, err)
	}
	for _, id := range []string{"both", "back"} {
		if err := m.Teardown(context.Background(), id); err != nil {
			t.Fatal(err)
		}
	}
	if got := borders(t); strings.Contains(got, "10.64.1") || !strings.Contains(got, "10.64.0") {
		t.Errorf("after the last one of back: %s", got)
	}
}

// TestBordersOutliveTheProcess: a new manager takes over, and removes what is stale.
func TestBordersOutliveTheProcess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "netns")
	open := func() *endpoint.Manager {
		m, err := endpoint.New(endpoint.Options{NetnsDir: dir, Separate: true})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := open()
	setup(t, m, "front", in("10.64.0.5", frontNet))
	setup(t, m, "back", in("10.64.1.5", backNet))
	before := borders(t)
	m.Close()
	m = open()
	defer m.Close()
	setup(t, m, "front", in("10.64.0.5", frontNet))
	if now := borders(t); now != before {
		t.Errorf("borders:\n%s\nwere:\n%s", now, before)
	}
	for _, id := range []string{"back", "front"} {
		if err := m.Teardown(context.Background(), id); err != nil {
			t.Fatal(err)
		}
		if got := borders(t); strings.Contains(got, "10.64.1") || strings.Contains(got, "10.64.0") != (id == "back") {
			t.Errorf("after %s: %s", id, got)
		}
	}
}

func TestInvalidNetworks(t *testing.T) {
	m, _ := manager(t)
	many := in("10.64.0.1", frontNet)
	for i := range 128 {
		many.Addresses = append(many.Addresses, &v1.RuntimeAddress{Address: fmt.Sprintf("10.64.1.%d/32", i+1)})
	}
	source := in("10.64.0.1", frontNet)
	source.Source = "10.64.0.2"
	first := in("10.64.0.1", frontNet)
	first.Address = "10.64.0.2/32"
	gateway := in("10.64.0.1", frontNet, "10.64.1.1", backNet)
	gateway.Gateway = "10.64.1.1"
	for name, n := range map[string]*v1.RuntimeNetwork{
		"twice": in("10.64.0.1", frontNet, "10.64.0.1", frontNet), "not its network": in("10.64.0.1", backNet), "all networks": in("10.64.0.1", "0.0.0.0/0"),
		"no network's address": in("10.64.0.1", "10.64.0.1/24"), "nonsense": in("10.64.0.1", "x"), "loopback": in("10.64.0.1", frontNet, "127.0.0.1", ""),
		"many": many, "source": source, "another first": first, "gateway": gateway,
	} {
		if _, err := m.Setup(context.Background(), "c", n); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
