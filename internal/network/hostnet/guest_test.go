package hostnet_test

import (
	"fmt"
	"net"
	"testing"

	"github.com/vishvananda/netlink"

	"tandem/internal/network"
	"tandem/internal/network/internal/bed"
)

// container puts a namespace behind a machine, as a guest does: the machine's own
// kernel routes, and its eth0 has no address at all.
func container(t *testing.T, m *bed.Machine, n int, ip string) *bed.NS {
	t.Helper()
	in := bed.NewNS(t)
	la := netlink.NewLinkAttrs()
	la.Name = fmt.Sprint("c", n)
	if err := m.NL.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: "eth0", PeerNamespace: netlink.NsFd(in.Fd())}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"sysctl", "-qw", "net.ipv4.ip_forward=1"},
		{"sysctl", "-qw", "net.ipv4.conf.c" + fmt.Sprint(n) + ".proxy_arp=1"},
		{"sysctl", "-qw", "net.ipv4.neigh.c" + fmt.Sprint(n) + ".proxy_delay=0"},
		{"ip", "link", "set", la.Name, "up"},
		{"ip", "route", "add", ip, "dev", la.Name},
		{"ip", "route", "replace", "default", "via", network.Gateway, "dev", "eth0", "onlink"},
	} {
		if _, err := m.Run(args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{
		{"ip", "addr", "add", ip + "/32", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		{"ip", "route", "add", "default", "via", network.Gateway, "dev", "eth0", "onlink"},
	} {
		if _, err := in.Run(args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

func TestContainersInAMachine(t *testing.T) {
	w := newWorld(t)
	w.state.Machines = append(w.state.Machines, machine("m-g", "02:00:00:00:0a:07", "10.64.0.48/28"))
	w.publish("tcp", 8080, "", backend("10.64.0.50", 80, true))
	w.publish("udp", 8080, "", backend("10.64.0.50", 80, true))
	w.apply(t)
	m := bed.NewMachine(t, w.h.TapName("m-g"), "02:00:00:00:0a:07")
	one, two := container(t, m, 1, "10.64.0.49"), container(t, m, 2, "10.64.0.50")
	bed.Serve(t, one, "one", "10.64.0.49:80")
	bed.Serve(t, two, "two", "10.64.0.50:80")
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.outer, "outer", net.JoinHostPort(outerIP, "80"))
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, one, p, "10.64.0.1:80", "a1 sees 10.64.0.49")
		bed.MustAsk(t, w.a1.NS, p, "10.64.0.49:80", "one sees 10.64.0.1")
		bed.MustAsk(t, one, p, "10.64.0.50:80", "two sees 10.64.0.49")
		bed.MustAsk(t, one, p, outerIP+":80", "outer sees "+hostIP)
		bed.MustAsk(t, w.outer, p, hostIP+":8080", "two sees "+outerIP)
		bed.MustAsk(t, nil, p, "127.0.0.1:8080", "two sees "+network.Gateway)
		// Through the host and back into the same machine; and to itself.
		bed.MustAsk(t, one, p, hostIP+":8080", "two sees "+network.Gateway)
		bed.MustAsk(t, two, p, hostIP+":8080", "two sees "+network.Gateway)
	}
	if got := askName(one, "udp", "a-web-1"); got != "10.64.0.1" {
		t.Errorf("names: %s", got)
	}
}
