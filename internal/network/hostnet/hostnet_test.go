package hostnet_test

import (
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/internal/bed"
)

func TestMachinesTalkAndProjectsDoNot(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.a2.NS, "a2", "10.64.0.17:80")
	bed.Serve(t, w.b1.NS, "b1", "10.64.1.1:80")
	bed.Serve(t, w.c.NS, "c", "10.64.2.1:80")
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, w.a1.NS, p, "10.64.0.17:80", "a2 sees 10.64.0.1")
		bed.MustAsk(t, w.a2.NS, p, "10.64.0.1:80", "a1 sees 10.64.0.17")
		for _, ip := range []string{"10.64.1.1", "10.64.2.1"} {
			bed.MustFail(t, w.a1.NS, p, ip+":80")
		}
		bed.MustFail(t, w.b1.NS, p, "10.64.0.1:80")
		bed.MustFail(t, w.c.NS, p, "10.64.0.1:80")
	}
	bed.MustAsk(t, nil, "tcp", "10.64.0.1:80", "a1 sees "+network.Gateway)

	// Allowed: one way only. A connection that is no longer allowed ends.
	w.state.Networks[1].Allow = []string{"na", "on-another-host"}
	w.apply(t)
	bed.MustAsk(t, w.a1.NS, "tcp", "10.64.1.1:80", "b1 sees 10.64.0.1")
	bed.MustFail(t, w.b1.NS, "tcp", "10.64.0.1:80")
	long, err := bed.Dial(w.a1.NS, "tcp", "10.64.1.1:80")
	if err != nil {
		t.Fatal(err)
	}
	defer long.Close()
	if _, err := bed.Say(long); err != nil {
		t.Fatal(err)
	}
	w.state.Networks[1].Allow = nil
	w.apply(t)
	if got, err := bed.Say(long); err == nil {
		t.Errorf("a connection goes on that is not allowed any more: %q", got)
	}
}

func TestGuestsReachOnlyNamesOfTheHost(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, nil, "host", "0.0.0.0:2375")
	for _, ip := range []string{hostIP, network.Gateway} {
		bed.MustFail(t, w.a1.NS, "tcp", ip+":2375")
		bed.MustFail(t, w.a1.NS, "udp", ip+":2375")
	}
	ping(t, w.a1)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":2375", "host sees "+outerIP) // others are not our business
}

func TestEgress(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.outer, "outer", outerIP+":80")
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, w.a1.NS, p, outerIP+":80", "outer sees "+hostIP)
		bed.MustFail(t, w.c.NS, p, outerIP+":80")
	}
	// Nobody's address in a network of ours does not leave the host.
	bed.MustFail(t, w.a1.NS, "tcp", "10.64.0.200:80")
	// From outside, only what is published.
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	if err := w.outer.NL.RouteAdd(&netlink.Route{Dst: cidr("10.64.0.0/16"), Gw: net.ParseIP(hostIP)}); err != nil {
		t.Fatal(err)
	}
	bed.MustFail(t, w.outer, "tcp", "10.64.0.1:80")
}

func TestPublishedPorts(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.a2.NS, "a2", "10.64.0.17:80")
	bed.Serve(t, w.b1.NS, "b1", "10.64.1.1:80")
	w.publish("tcp", 8080, "", backend("10.64.0.1", 80, true), backend("10.64.0.17", 80, false))
	w.publish("udp", 8080, "0.0.0.0", backend("10.64.0.1", 80, true))
	w.publish("tcp", 8081, hostIP, backend("10.64.0.17", 80, true))
	w.publish("tcp", 8082, "127.0.0.1", backend("10.64.1.1", 80, true))
	w.publish("tcp", 8083, "", backend("10.64.0.1", 80, false))
	w.publish("tcp", 8084, "", backend("10.64.0.1", 80, true), backend("10.64.0.17", 80, true))
	w.apply(t)
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, w.outer, p, hostIP+":8080", "a1 sees "+outerIP)
		bed.MustAsk(t, nil, p, "127.0.0.1:8080", "a1 sees "+network.Gateway)
		bed.MustAsk(t, nil, p, hostIP+":8080", "a1 sees "+hostIP)
		bed.MustAsk(t, w.a1.NS, p, hostIP+":8080", "a1 sees "+network.Gateway) // hairpin, same machine
		bed.MustAsk(t, w.a2.NS, p, hostIP+":8080", "a1 sees "+network.Gateway)
		bed.MustAsk(t, w.b1.NS, p, hostIP+":8080", "a1 sees "+network.Gateway) // published is public
		bed.MustFail(t, w.c.NS, p, hostIP+":8080")                             // internal is not
	}
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8081", "a2 sees "+outerIP)
	bed.MustFail(t, nil, "tcp", "127.0.0.1:8081")
	bed.MustAsk(t, nil, "tcp", "127.0.0.1:8082", "b1 sees "+network.Gateway)
	bed.MustFail(t, w.outer, "tcp", hostIP+":8082")
	bed.MustFail(t, w.outer, "tcp", hostIP+":8083")
	seen := map[string]bool{}
	for range 60 {
		got, err := bed.Ask(w.outer, "tcp", hostIP+":8084")
		if err != nil {
			t.Fatal(err)
		}
		seen[got] = true
	}
	if len(seen) != 2 {
		t.Errorf("balanced over %v", seen)
	}

	// A neighbour on the wire that sends to 127.0.0.1 does not reach what is
	// published there.
	if err := w.outer.NL.RouteAdd(&netlink.Route{Dst: cidr("127.0.0.1/32"), Gw: net.ParseIP(hostIP), Table: 77}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1"},
		{"ip", "rule", "add", "pref", "1", "to", "127.0.0.1", "dport", "8082", "lookup", "77"},
		{"ip", "rule", "del", "pref", "0"},
		{"ip", "rule", "add", "pref", "2", "lookup", "local"},
	} {
		if _, err := w.outer.Run(args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := bed.Ask(w.outer, "tcp", "127.0.0.1:8082"); err == nil {
		t.Errorf("127.0.0.1:8082 answers a neighbour: %s", got)
	}
}

func TestVanishedBackendResetsConnections(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.a2.NS, "a2", "10.64.0.17:80")
	both := []*v1.Backend{backend("10.64.0.1", 80, true), backend("10.64.0.17", 80, true)}
	w.publish("tcp", 8080, "", both...)
	w.publish("udp", 8080, "", both...)
	w.apply(t)
	for _, p := range []string{"tcp", "udp"} {
		conns := map[string]net.Conn{} // by backend
		for i := 0; len(conns) < 2; i++ {
			if i == 100 {
				t.Fatal("never both backends")
			}
			c, err := bed.Dial(w.outer, p, hostIP+":8080")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			got, err := bed.Say(c)
			if err != nil {
				t.Fatal(err)
			}
			conns[got[:2]] = c
		}
		for _, port := range w.state.Ports {
			port.Backends = both[:1]
		}
		w.apply(t)
		if got, err := bed.Say(conns["a1"]); err != nil || got != "a1 sees "+outerIP {
			t.Errorf("%s: the connection to the other backend broke: %q %v", p, got, err)
		}
		start := time.Now()
		got, err := bed.Say(conns["a2"])
		switch {
		case p == "tcp" && (err == nil || time.Since(start) > 2*time.Second):
			t.Errorf("tcp: no reset: %q %v after %v", got, err, time.Since(start))
		case p == "udp" && (err != nil || got != "a1 sees "+outerIP):
			t.Errorf("udp: did not move: %q %v", got, err)
		}
		for _, port := range w.state.Ports {
			port.Backends = both
		}
		w.apply(t)
	}

	// A vanished one that an earlier process had published.
	c, err := bed.Dial(w.outer, "udp", hostIP+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := bed.Say(c)
	if err != nil {
		t.Fatal(err)
	}
	rest := both[1:]
	if strings.HasPrefix(got, "a2") {
		rest = both[:1]
	}
	w.h.Close()
	w.h = open(t, w.o)
	for _, port := range w.state.Ports {
		port.Backends = rest
	}
	w.apply(t)
	if again, err := bed.Say(c); err != nil || again[:2] == got[:2] {
		t.Errorf("after a restart: %q, then %q %v", got, again, err)
	}
}

func TestPublishedPortThatIsTaken(t *testing.T) {
	w := newWorld(t)
	stop := bed.Serve(t, nil, "host", "0.0.0.0:8080")
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	w.publish("tcp", 8080, "", backend("10.64.0.1", 80, true))
	w.publish("tcp", 8081, "", backend("10.64.0.1", 80, true))
	w.publish("tcp", 8082, "192.0.2.77", backend("10.64.0.1", 80, true))
	w.publish("icmp", 8083, "")
	err := w.h.Apply(ctx, &w.state)
	for _, want := range []string{"0.0.0.0:8080/tcp: another program", "192.0.2.77:8082/tcp: this host does not have", `protocol "icmp"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %q lacks %q", err, want)
		}
	}
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "host sees "+outerIP)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8081", "a1 sees "+outerIP)
	stop()
	w.state.Ports = w.state.Ports[:2]
	w.apply(t)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "a1 sees "+outerIP)
}

func TestMetalContainer(t *testing.T) {
	w := newWorld(t)
	m, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(t.TempDir(), "netns")})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	t.Cleanup(func() { m.Teardown(ctx, "c-metal") })
	path, err := m.Setup(ctx, "c-metal", &v1.RuntimeNetwork{Address: "10.64.0.130/32"})
	if err != nil {
		t.Fatal(err)
	}
	if m.HostName("c-metal") != w.h.VethName("c-metal") {
		t.Fatal("two names for one link")
	}
	ns := bed.OpenNS(t, path)
	bed.Serve(t, ns, "metal", "10.64.0.130:80")
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.MustFail(t, ns, "udp", "10.64.0.1:80") // not in the state yet: nothing passes

	w.state.Containers = []network.MetalContainer{{ID: "c-metal", IP: "10.64.0.130"}}
	w.publish("tcp", 8080, "", backend("10.64.0.130", 80, true))
	w.apply(t)
	bed.MustAsk(t, ns, "tcp", "10.64.0.1:80", "a1 sees 10.64.0.130")
	bed.MustAsk(t, w.a1.NS, "udp", "10.64.0.130:80", "metal sees 10.64.0.1")
	bed.MustFail(t, w.b1.NS, "tcp", "10.64.0.130:80")
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "metal sees "+outerIP)
	bed.MustAsk(t, nil, "tcp", "127.0.0.1:8080", "metal sees "+network.Gateway)
	bed.MustAsk(t, ns, "tcp", hostIP+":8080", "metal sees "+network.Gateway)

	// Another address is not its own, even when its kernel routes back to it.
	if _, err := ns.Run("ip", "addr", "add", "10.64.0.131/32", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	veth, err := netlink.LinkByName(w.h.VethName("c-metal"))
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: cidr("10.64.0.131/32"), Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.Run("ip", "route", "replace", "default", "via", network.Gateway, "dev", "eth0", "onlink", "src", "10.64.0.131"); err != nil {
		t.Fatal(err)
	}
	if got, err := bed.Ask(ns, "udp", "10.64.0.1:80"); err == nil {
		t.Errorf("spoofed: %s", got)
	}
}

func TestManyServices(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	for p := range 4000 {
		var bs []*v1.Backend
		for i := range 10 {
			bs = append(bs, backend(fmt.Sprintf("10.64.0.%d", i+1), uint32(i+80), true))
		}
		w.publish("tcp", uint32(20000+p), "", bs...)
	}
	timed := func(what string, limit time.Duration) {
		t.Helper()
		start := time.Now()
		w.apply(t)
		d := time.Since(start)
		t.Logf("%s: %v", what, d)
		if d > limit {
			t.Errorf("%s took %v", what, d)
		}
	}
	timed("4,000 services x 10 backends", 30*time.Second)
	timed("the same again", 5*time.Second)
	w.state.Ports[1234].Backends = w.state.Ports[1234].Backends[:1]
	timed("one service changes", 5*time.Second)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":21234", "a1 sees "+outerIP)
	w.h.Close()
	w.h = open(t, w.o)
	timed("a new process", 30*time.Second)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":21234", "a1 sees "+outerIP)
}
