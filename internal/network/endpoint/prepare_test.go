package endpoint_test

import (
	"context"
	"net"
	"path/filepath"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tandem/internal/network/internal/bed"
)

// What is prepared is of no use to anybody: no end is up, none has an address, and
// no route leads to it. Setup makes a network of it, Teardown nothing.
func TestPreparedIsDown(t *testing.T) {
	m, dir := manager(t)
	ctx := context.Background()
	for range 2 { // again is the same
		if err := m.Prepare(ctx, "c", routed("10.64.0.5")); err != nil {
			t.Fatal(err)
		}
	}
	ns := bed.OpenNS(t, filepath.Join(dir, "c"))
	host, err := netlink.LinkByName(m.HostName("c"))
	if err != nil {
		t.Fatal(err)
	}
	eth, err := ns.NL.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if (host.Attrs().Flags|eth.Attrs().Flags)&net.FlagUp != 0 {
		t.Error("an end of a prepared link is up")
	}
	if as, err := ns.NL.AddrList(eth, unix.AF_UNSPEC); err != nil || len(as) > 0 {
		t.Errorf("eth0 has addresses: %v %v", as, err)
	}
	if rs, err := netlink.RouteList(host, unix.AF_INET); err != nil || len(rs) > 0 {
		t.Errorf("routes lead to a prepared link: %v %v", rs, err)
	}
	if _, err := m.Setup(ctx, "c", routed("10.64.0.5")); err != nil {
		t.Fatal(err)
	}
	if again, err := netlink.LinkByName(m.HostName("c")); err != nil || again.Attrs().Index != host.Attrs().Index {
		t.Errorf("Setup made the link anew: %v", err)
	}
	peer, err := m.Setup(ctx, "peer", routed("10.64.0.6"))
	if err != nil {
		t.Fatal(err)
	}
	if err := talk(t, bed.OpenNS(t, peer), ns, "10.64.0.5"); err != nil {
		t.Error(err)
	}
	if err := m.Prepare(ctx, "half", routed("10.64.0.7")); err != nil {
		t.Fatal(err)
	}
	if err := m.Teardown(ctx, "half"); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName(m.HostName("half")); err == nil {
		t.Error("a prepared link is left")
	}
}
