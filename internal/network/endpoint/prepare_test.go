package endpoint_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tandem/internal/network/endpoint"
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

// A namespace that was made ahead is like any other, serves one container, and goes
// with its manager.
func TestSpareNamespace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "netns")
	m, err := endpoint.New(endpoint.Options{NetnsDir: dir, Spare: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	var ns []*bed.NS
	var names []string
	for i, ip := range []string{"10.64.0.5", "10.64.0.6", "10.64.0.7"} {
		if i == 1 {
			for deadline := time.Now().Add(30 * time.Second); !endpoint.HasSpare(m); time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("no namespace was made ahead")
				}
			}
		}
		id := "c-" + string(rune('0'+i))
		p, err := m.Setup(ctx, id, routed(ip))
		if err != nil {
			t.Fatal(err)
		}
		ns = append(ns, bed.OpenNS(t, p))
		out, err := ns[i].Run("readlink", "/proc/self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, out)
		if out, err := ns[i].Run("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start", "/sys/class/net/lo/flags"); err != nil || out != "0\n0x9\n" {
			t.Errorf("%s: %q %v", id, out, err)
		}
	}
	if names[0] == names[1] || names[1] == names[2] {
		t.Fatalf("two containers share a namespace: %v", names)
	}
	for i := range ns {
		if err := talk(t, ns[i], ns[(i+1)%3], []string{"10.64.0.6", "10.64.0.7", "10.64.0.5"}[i]); err != nil {
			t.Error(err)
		}
	}
	for i := range ns {
		if err := m.Teardown(ctx, "c-"+string(rune('0'+i))); err != nil {
			t.Error(err)
		}
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) > 0 {
		t.Errorf("files: %v %v", es, err)
	}
	if err := m.Close(); err != nil || endpoint.HasSpare(m) {
		t.Errorf("a namespace is kept: %v", err)
	}
}
