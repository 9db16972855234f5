package hostnet_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/hostnet"
	"tandem/internal/network/internal/bed"
)

const (
	hostIP  = "192.0.2.1"
	outerIP = "192.0.2.2"
)

// world is a host (this process's namespace) with an outside, and two projects
// with a machine each; project a has a second one.
type world struct {
	h             *hostnet.Host
	o             hostnet.Options
	outer         *bed.NS
	a1, a2, b1, c *bed.Machine // c: an internal network
	state         network.State
}

var ctx = context.Background()

func machine(id, mac string, prefixes ...string) network.Machine {
	return network.Machine{ID: id, MAC: mac, Prefixes: prefixes}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	clean(t)
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+outerIP+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	w := &world{outer: bed.NewNS(t), o: hostnet.Options{ResolvConf: resolv, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}}
	bed.Wire(t, "up0", hostIP+"/24", w.outer, "eth0", outerIP+"/24")
	w.h = open(t, w.o)
	w.state = network.State{
		Networks: []*v1.NetworkSpec{
			{Id: "na", Project: "a", Name: "default", Cidr: "10.64.0.0/24"},
			{Id: "nb", Project: "b", Name: "default", Cidr: "10.64.1.0/24"},
			{Id: "nc", Project: "a", Name: "back", Cidr: "10.64.2.0/24", Internal: true},
		},
		Machines: []network.Machine{
			machine("m-a1", "02:00:00:00:0a:01", "10.64.0.0/28"),
			machine("m-a2", "02:00:00:00:0a:02", "10.64.0.16/28"),
			machine("m-b1", "02:00:00:00:0b:01", "10.64.1.0/28"),
			machine("m-c1", "02:00:00:00:0c:01", "10.64.2.0/28"),
		},
		Names: []*v1.NameRecord{
			{Network: "na", Name: "web", Ips: []string{"10.64.0.1", "10.64.0.17"}},
			{Network: "na", Name: "a-web-1", Ips: []string{"10.64.0.1"}},
			{Network: "nb", Name: "db", Ips: []string{"10.64.1.1"}},
		},
	}
	w.apply(t)
	w.a1 = bed.NewMachine(t, w.h.TapName("m-a1"), "02:00:00:00:0a:01", "10.64.0.1", "10.64.0.2")
	w.a2 = bed.NewMachine(t, w.h.TapName("m-a2"), "02:00:00:00:0a:02", "10.64.0.17")
	w.b1 = bed.NewMachine(t, w.h.TapName("m-b1"), "02:00:00:00:0b:01", "10.64.1.1")
	w.c = bed.NewMachine(t, w.h.TapName("m-c1"), "02:00:00:00:0c:01", "10.64.2.1")
	return w
}

func open(t *testing.T, o hostnet.Options) *hostnet.Host {
	t.Helper()
	h, err := hostnet.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// clean tears down at the end and checks that nothing is left.
func clean(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		h, err := hostnet.New(hostnet.Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
		if err != nil {
			t.Fatal(err)
		}
		defer h.Close()
		if err := h.Teardown(ctx); err != nil {
			t.Error(err)
		}
		if out := nft(t, "list", "ruleset"); strings.TrimSpace(out) != "" {
			t.Errorf("rules are left:\n%s", out)
		}
		ls, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range ls {
			if strings.HasPrefix(l.Attrs().Name, "td") {
				t.Errorf("left: %s", l.Attrs().Name)
			}
		}
		rs, err := netlink.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rs {
			if strings.HasPrefix(r.Dst.String(), "10.") {
				t.Errorf("left: %s", r)
			}
		}
		lo, _ := netlink.LinkByName("lo")
		as, _ := netlink.AddrList(lo, netlink.FAMILY_V4)
		if len(as) != 1 {
			t.Errorf("addresses left on lo: %v", as)
		}
	})
}

func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %v: %v: %s", args, err, out)
	}
	return string(out)
}

func (w *world) apply(t *testing.T) {
	t.Helper()
	if err := w.h.Apply(ctx, &w.state); err != nil {
		t.Fatal(err)
	}
}

func (w *world) publish(proto string, port uint32, hostIP string, backends ...*v1.Backend) {
	w.state.Ports = append(w.state.Ports, &v1.PublishedPort{Protocol: proto, HostPort: port, HostIp: hostIP, Backends: backends})
}

func backend(ip string, port uint32, ready bool) *v1.Backend {
	return &v1.Backend{Ip: ip, Port: port, Ready: ready, ContainerId: "c-" + ip}
}

// ping sends an ICMP echo from a machine to the gateway and wants the answer.
func ping(t *testing.T, m *bed.Machine) {
	t.Helper()
	var c net.PacketConn
	if err := m.Do(func() (err error) { c, err = net.ListenPacket("ip4:icmp", "0.0.0.0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.WriteTo([]byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}, &net.IPAddr{IP: net.ParseIP(network.Gateway)}); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			t.Errorf("ping %s: %v", network.Gateway, err)
			return
		}
		if n >= 8 && buf[0] == 0 {
			return
		}
	}
}

func cidr(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return n
}
