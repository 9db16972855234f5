package hostnet_test

import (
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

// both puts machine m-ac, whose one container is in na and in nc, into the world.
func (w *world) both(t *testing.T) *bed.Machine {
	t.Helper()
	w.state.Machines = append(w.state.Machines, machine("m-ac", "02:00:00:00:0a:0c", "10.64.0.64/28", "10.64.2.64/28"))
	w.state.Clients = [][]string{{"10.64.0.65", "10.64.2.65"}}
	w.state.Names = append(w.state.Names,
		&v1.NameRecord{Network: "na", Name: "proxy", Ips: []string{"10.64.0.65"}},
		&v1.NameRecord{Network: "nc", Name: "proxy", Ips: []string{"10.64.2.65"}},
		&v1.NameRecord{Network: "nc", Name: "db", Ips: []string{"10.64.2.1"}})
	w.apply(t)
	m := bed.NewMachine(t, w.h.TapName("m-ac"), "02:00:00:00:0a:0c", "10.64.0.65", "10.64.2.65")
	if _, err := m.Run("ip", "route", "add", "10.64.2.0/24", "via", network.Gateway, "dev", "eth0", "onlink", "src", "10.64.2.65"); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMachineInTwoNetworks(t *testing.T) {
	w := newWorld(t)
	m := w.both(t)
	bed.Serve(t, w.a1.NS, "front", "10.64.0.1:80")
	bed.Serve(t, w.c.NS, "back", "10.64.2.1:80")
	bed.Serve(t, m.NS, "both", "0.0.0.0:80")
	bed.Serve(t, w.outer, "outer", outerIP+":80")
	for _, p := range []string{"tcp", "udp"} {
		bed.MustAsk(t, m.NS, p, "10.64.0.1:80", "front sees 10.64.0.65")
		bed.MustAsk(t, m.NS, p, "10.64.2.1:80", "back sees 10.64.2.65")
		bed.MustFail(t, w.a1.NS, p, "10.64.2.1:80")  // front can't reach back
		bed.MustFail(t, w.c.NS, p, "10.64.0.1:80")   // nor back front
		bed.MustFail(t, w.a1.NS, p, "10.64.2.65:80") // nor the proxy by the other side's address
		bed.MustFail(t, w.c.NS, p, "10.64.0.65:80")
		bed.MustAsk(t, m.NS, p, outerIP+":80", "outer sees "+hostIP)
	}
	bed.MustAsk(t, w.a1.NS, "tcp", "10.64.0.65:80", "both sees 10.64.0.1")
	bed.MustAsk(t, w.c.NS, "tcp", "10.64.2.65:80", "both sees 10.64.2.1")
	for _, x := range []struct {
		from       *bed.NS
		name, want string
	}{
		{w.a1.NS, "proxy", "10.64.0.65"}, {w.c.NS, "proxy", "10.64.2.65"}, {w.a1.NS, "db", "NXDOMAIN"},
		{m.NS, "db", "10.64.2.1"}, {m.NS, "a-web-1", "10.64.0.1"}, {m.NS, "proxy", "10.64.0.65"},
	} {
		if got := askName(x.from, "udp", x.name); got != x.want {
			t.Errorf("%s is %s, want %s", x.name, got, x.want)
		}
	}
}

// TestOtherNetworksAddressIsDropped: a machine can't use an address of a network that
// it is not in, nor one in both the addresses of others.
func TestOtherNetworksAddressIsDropped(t *testing.T) {
	w := newWorld(t)
	m := w.both(t)
	var sink net.PacketConn
	if err := w.c.Do(func() (err error) { sink, err = net.ListenPacket("udp4", "10.64.2.1:7000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer sink.Close()
	send := func(from *bed.Machine, src, data string) {
		t.Helper()
		if err := from.Send(frame(endpoint.GatewayMAC, from.MAC, 0x800, udp(src, "10.64.2.1", 7000, data))); err != nil {
			t.Fatal(err)
		}
	}
	buf := make([]byte, 100)
	for end := time.Now().Add(30 * time.Second); ; {
		send(m, "10.64.2.65", "warm")
		sink.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if _, _, err := sink.ReadFrom(buf); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nothing ever arrives")
		}
	}
	send(w.a1, "10.64.2.65", "BAD: front as the proxy in back")
	send(w.a1, "10.64.2.1", "BAD: front as back itself")
	send(m, "10.64.2.1", "BAD: the proxy as back")
	send(m, "10.64.0.65", "BAD: from its address in front")
	send(m, "10.64.2.65", "good")
	sink.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, _, err := sink.ReadFrom(buf)
	for err == nil && string(buf[:n]) == "warm" {
		n, _, err = sink.ReadFrom(buf)
	}
	if err != nil || string(buf[:n]) != "good" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

func TestMetalContainerInTwoNetworks(t *testing.T) {
	w := newWorld(t)
	m, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(t.TempDir(), "netns")})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	ns := map[string]*bed.NS{}
	for id, list := range map[string][]string{"front": {"10.64.0.129"}, "back": {"10.64.2.129"}, "both": {"10.64.2.130", "10.64.0.130"}} {
		t.Cleanup(func() { m.Teardown(ctx, id) })
		n := &v1.RuntimeNetwork{Address: list[0] + "/32", Source: list[len(list)-1]}
		for _, ip := range list {
			n.Addresses = append(n.Addresses, &v1.RuntimeAddress{Address: ip + "/32", Network: strings.Join(strings.Split(ip, ".")[:3], ".") + ".0/24"})
		}
		path, err := m.Setup(ctx, id, n)
		if err != nil {
			t.Fatal(err)
		}
		ns[id] = bed.OpenNS(t, path)
		bed.Serve(t, ns[id], id, "0.0.0.0:80")
		w.state.Containers = append(w.state.Containers, network.MetalContainer{ID: id, IP: list[0], Further: list[1:]})
	}
	bed.Serve(t, w.outer, "outer", outerIP+":80")
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	w.publish("tcp", 8080, "", backend("10.64.2.130", 80, true)) // the first network's, internal as it is
	w.apply(t)
	bed.MustAsk(t, ns["front"], "tcp", "10.64.0.130:80", "both sees 10.64.0.129")
	bed.MustAsk(t, ns["back"], "tcp", "10.64.2.130:80", "both sees 10.64.2.129")
	bed.MustAsk(t, ns["both"], "udp", "10.64.0.129:80", "front sees 10.64.0.130")
	bed.MustAsk(t, ns["both"], "udp", "10.64.2.129:80", "back sees 10.64.2.130")
	bed.MustAsk(t, ns["both"], "tcp", "10.64.0.1:80", "a1 sees 10.64.0.130")
	bed.MustAsk(t, ns["both"], "tcp", outerIP+":80", "outer sees "+hostIP)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "both sees "+outerIP)
	bed.MustFail(t, ns["front"], "tcp", "10.64.2.129:80")
	bed.MustFail(t, ns["front"], "tcp", "10.64.2.130:80")
	bed.MustFail(t, ns["back"], "tcp", "10.64.0.129:80")
	bed.MustFail(t, ns["back"], "tcp", outerIP+":80")

	// front takes back's address, and its kernel routes back to it: dropped all the same.
	for _, args := range [][]string{
		{"ip", "addr", "add", "10.64.2.131/32", "dev", "eth0"},
		{"ip", "route", "replace", "default", "via", network.Gateway, "dev", "eth0", "onlink", "src", "10.64.2.131"},
	} {
		if _, err := ns["front"].Run(args[0], args[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	veth, err := netlink.LinkByName(w.h.VethName("front"))
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: cidr("10.64.2.131/32"), Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	if got, err := bed.Ask(ns["front"], "udp", "10.64.2.129:80"); err == nil {
		t.Errorf("spoofed: %s", got)
	}

	// Nobody has an address twice, in whichever place it is named.
	w.state.Containers[0].Further = append(w.state.Containers[0].Further, w.state.Containers[1].IP)
	if err := w.h.Apply(ctx, &w.state); err == nil || !strings.Contains(err.Error(), "overlaps") {
		t.Errorf("one address of two containers: %v", err)
	}
}
