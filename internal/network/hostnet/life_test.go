package hostnet_test

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/hostnet"
	"tandem/internal/network/internal/bed"
	"tandem/internal/network/networktest"
)

func TestARestartDisturbsNobody(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.outer, "outer", outerIP+":80")
	w.publish("tcp", 8080, "", backend("10.64.0.1", 80, true))
	w.apply(t)
	in, err := bed.Dial(w.outer, "tcp", hostIP+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := bed.Dial(w.a1.NS, "tcp", outerIP+":80")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	talk := func(when string) {
		t.Helper()
		for name, c := range map[string]net.Conn{"published": in, "egress": out} {
			if got, err := bed.Say(c); err != nil {
				t.Errorf("%s: %s connection: %q %v", when, name, got, err)
			}
		}
	}
	talk("before")
	index := func() int {
		l, err := netlink.LinkByName(w.h.TapName("m-a1"))
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Index
	}
	before := index()
	if err := w.h.Close(); err != nil {
		t.Fatal(err)
	}
	talk("while nobody runs")
	if err := w.h.Apply(ctx, &w.state); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("apply after close: %v", err)
	}
	w.h = open(t, w.o)
	w.apply(t)
	talk("after")
	if index() != before {
		t.Error("the tap was made anew")
	}

	// What came and went while nobody ran.
	w.h.Close()
	w.h = open(t, w.o)
	w.state.Machines = append(w.state.Machines[:1], machine("m-new", "02:00:00:00:0a:03", "10.64.0.16/28"))
	w.apply(t)
	if _, err := netlink.LinkByName(w.h.TapName("m-b1")); err == nil {
		t.Error("the tap of a machine that is gone is left")
	}
	if ns := bed.NewMachine(t, w.h.TapName("m-new"), "02:00:00:00:0a:03", "10.64.0.17"); true {
		bed.MustAsk(t, ns.NS, "tcp", "10.64.0.1:80", "a1 sees 10.64.0.17")
	}
	talk("after others went")
}

func TestPrefixesMove(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	w.state.Machines[0].Prefixes = append(w.state.Machines[0].Prefixes, "10.64.0.32/28")
	w.apply(t)
	eth, err := w.a1.NL.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.a1.NL.AddrAdd(eth, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 64, 0, 33).To4(), Mask: net.CIDRMask(32, 32)}}); err != nil {
		t.Fatal(err)
	}
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.33:80")
	bed.MustAsk(t, w.a2.NS, "tcp", "10.64.0.33:80", "a1 sees 10.64.0.17")
	w.state.Machines[0].Prefixes = w.state.Machines[0].Prefixes[:1]
	w.state.Machines[1].Prefixes = append(w.state.Machines[1].Prefixes, "10.64.0.32/28")
	w.apply(t)
	rs, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: cidr("10.64.0.32/28")}, netlink.RT_FILTER_DST)
	tap, _ := netlink.LinkByName(w.h.TapName("m-a2"))
	if err != nil || len(rs) != 1 || rs[0].LinkIndex != tap.Attrs().Index {
		t.Errorf("routes: %v %v", rs, err)
	}
	bed.MustFail(t, w.a2.NS, "tcp", "10.64.0.33:80")
}

func TestAnotherProgramTouchesTheRules(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	bed.Serve(t, w.b1.NS, "b1", "10.64.1.1:80")
	w.publish("tcp", 8080, "", backend("10.64.0.1", 80, true))
	w.apply(t)
	check := func(when string) {
		t.Helper()
		t.Log(when)
		bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "a1 sees "+outerIP)
		bed.MustFail(t, w.a1.NS, "tcp", "10.64.1.1:80")
	}
	nft(t, "flush", "ruleset")
	w.apply(t)
	check("after a flush of everything")
	nft(t, "flush", "chain", "inet", "tandem", "separate")
	w.apply(t)
	check("after a flush of one chain")
	nft(t, "delete", "element", "inet", "tandem", "be", "{ 0 . tcp . 8080 }")
	w.apply(t)
	check("after an element was taken")
	tap, err := netlink.LinkByName(w.h.TapName("m-c1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(tap); err != nil {
		t.Fatal(err)
	}
	w.apply(t)
	if out := nft(t, "list", "ruleset"); strings.Count(out, `hook ingress device "td`) != 4 {
		t.Errorf("not every tap is filtered:\n%s", out)
	}
	nft(t, "add", "table", "inet", "other")
	w.apply(t)
	check("after another table came")
	if err := w.h.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	if out := nft(t, "list", "tables"); strings.TrimSpace(out) != "table inet other" {
		t.Errorf("tables: %s", out)
	}
	nft(t, "delete", "table", "inet", "other")
	w.apply(t) // goes on after a teardown
	if _, err := netlink.LinkByName(w.h.TapName("m-a1")); err != nil {
		t.Error(err)
	}
}

func TestInvalidStatesChangeNothing(t *testing.T) {
	clean(t)
	h := open(t, hostnet.Options{Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	var d *network.Degraded
	if err := h.Apply(ctx, networktest.State()); err != nil && !errors.As(err, &d) {
		t.Fatal(err)
	}
	before := nft(t, "list", "ruleset")
	networktest.Invalid(t, h)
	if after := nft(t, "list", "ruleset"); after != before {
		t.Errorf("rules changed:\n%s", after)
	}
	for _, o := range []hostnet.Options{{Table: "a b"}, {Prefix: "LONGER"}} {
		if _, err := hostnet.New(o); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestOneBadNameStopsNoOther(t *testing.T) {
	w := newWorld(t)
	w.state.Names = append(w.state.Names, &v1.NameRecord{Network: "na", Name: "x", Ips: []string{"y"}},
		&v1.NameRecord{Network: "na", Name: "later", Ips: []string{"10.64.0.2"}})
	var d *network.Degraded
	if err := w.h.Apply(ctx, &w.state); !errors.As(err, &d) || !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("error: %v", err)
	}
	if got := askName(w.a1.NS, "udp", "later"); got != "10.64.0.2" {
		t.Errorf("another name: %s", got)
	}
}

func TestForwardBlockers(t *testing.T) {
	w := newWorld(t)
	if got, err := hostnet.ForwardBlockers(); err != nil || len(got) != 0 {
		t.Errorf("none but ours: %v %v", got, err)
	}
	bed.Serve(t, w.outer, "outer", outerIP+":80")
	nft(t, "add", "table", "ip", "filter")
	nft(t, "add", "chain", "ip", "filter", "FORWARD", "{ type filter hook forward priority 0; policy drop; }")
	defer nft(t, "delete", "table", "ip", "filter")
	bed.MustFail(t, w.a1.NS, "tcp", outerIP+":80")
	got, err := hostnet.ForwardBlockers()
	if err != nil || len(got) != 1 || got[0] != "ip filter FORWARD" {
		t.Errorf("blockers: %v %v", got, err)
	}
}

func TestNames(t *testing.T) {
	w := newWorld(t)
	// The outside's resolver.
	var pc net.PacketConn
	if err := w.outer.Do(func() (err error) { pc, err = net.ListenPacket("udp4", outerIP+":53"); return err }); err != nil {
		t.Fatal(err)
	}
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(203, 0, 113, 7)}}
		rw.WriteMsg(m)
	})}
	go srv.ActivateAndServe()
	defer srv.Shutdown()
	w.publish("udp", 53, "", backend("10.64.0.1", 53, true)) // must not hide the name server
	w.apply(t)

	for _, p := range []string{"udp", "tcp"} {
		for _, c := range []struct {
			ns         *bed.NS
			name, want string
		}{
			{w.a2.NS, "a-web-1", "10.64.0.1"},
			{w.a2.NS, "db", "NXDOMAIN"},
			{w.b1.NS, "db", "10.64.1.1"},
			{w.b1.NS, "web", "NXDOMAIN"},
		} {
			if got := askName(c.ns, p, c.name); got != c.want {
				t.Errorf("%s by %s: %s, want %s", c.name, p, got, c.want)
			}
		}
	}
	if got := askName(w.a1.NS, "udp", "www.example.org"); got != "203.0.113.7" {
		t.Errorf("outside: %s", got)
	}
	if got := askName(w.c.NS, "udp", "www.example.org"); got != "NXDOMAIN" {
		t.Errorf("outside, from an internal network: %s", got)
	}
}

func askName(ns *bed.NS, proto, name string) string {
	c, err := bed.Dial(ns, proto, net.JoinHostPort(network.Gateway, "53"))
	if err != nil {
		return err.Error()
	}
	co := &dns.Conn{Conn: c}
	defer co.Close()
	co.SetDeadline(time.Now().Add(5 * time.Second))
	if err := co.WriteMsg(new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)); err != nil {
		return err.Error()
	}
	r, err := co.ReadMsg()
	if err != nil {
		return err.Error()
	}
	if len(r.Answer) == 0 {
		return dns.RcodeToString[r.Rcode]
	}
	return r.Answer[0].(*dns.A).A.String()
}

func TestNameServerBesideAnother(t *testing.T) {
	stop := bed.Serve(t, nil, "other", "0.0.0.0:53")
	w := newWorld(t)
	for _, p := range []string{"udp", "tcp"} {
		if got := askName(w.a2.NS, p, "a-web-1"); got != "10.64.0.1" {
			t.Errorf("beside another name server, %s: %s", p, got)
		}
		bed.MustFail(t, w.a1.NS, p, hostIP+":53")
	}
	bed.MustAsk(t, w.outer, "tcp", hostIP+":53", "other sees "+outerIP)
	stop()
	w.h.Close()
	w.h = open(t, w.o)
	w.apply(t)
	if got := askName(w.a2.NS, "tcp", "a-web-1"); got != "10.64.0.1" {
		t.Errorf("alone again: %s", got)
	}
}

// TestTwoInstances: another Tandem in the same namespace, with other addresses.
func TestTwoInstances(t *testing.T) {
	w := newWorld(t)
	bed.Serve(t, w.a1.NS, "a1", "10.64.0.1:80")
	w.publish("tcp", 8080, "", backend("10.64.0.1", 80, true))
	w.apply(t)
	o := w.o
	o.Table = "tandem-two"
	two := open(t, o)
	s := &network.State{
		Networks: []*v1.NetworkSpec{{Id: "nz", Project: "z", Cidr: "10.99.0.0/24"}},
		Machines: []network.Machine{machine("m-z", "02:00:00:00:00:99", "10.99.0.0/28")},
		Names:    []*v1.NameRecord{{Network: "nz", Name: "z", Ips: []string{"10.99.0.1"}}},
	}
	if err := two.Apply(ctx, s); err != nil {
		t.Fatal(err)
	}
	w.apply(t)
	if err := two.Apply(ctx, s); err != nil {
		t.Fatal(err)
	}
	z := bed.NewMachine(t, two.TapName("m-z"), "02:00:00:00:00:99", "10.99.0.1")
	bed.Serve(t, z.NS, "z", "10.99.0.1:80")
	bed.MustAsk(t, nil, "tcp", "10.99.0.1:80", "z sees "+network.Gateway)
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "a1 sees "+outerIP)
	bed.MustFail(t, z.NS, "tcp", "10.64.0.1:80")
	bed.MustFail(t, w.a1.NS, "tcp", "10.99.0.1:80")
	if a, b := askName(w.a1.NS, "udp", "a-web-1"), askName(z.NS, "udp", "z"); a != "10.64.0.1" || b != "10.99.0.1" {
		t.Errorf("names: %s, %s", a, b)
	}
	s.Machines[0].Prefixes = []string{"10.64.0.0/28"}
	s.Networks[0].Cidr = "10.64.0.0/24"
	s.Names = nil
	if err := two.Apply(ctx, s); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("the same addresses: %v", err)
	}
	if err := two.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	bed.MustAsk(t, w.outer, "tcp", hostIP+":8080", "a1 sees "+outerIP)
	if a := askName(w.a1.NS, "udp", "a-web-1"); a != "10.64.0.1" {
		t.Errorf("after the other's teardown: %s", a)
	}
}

func TestTapIsAsQEMUWantsIt(t *testing.T) {
	clean(t)
	h := open(t, hostnet.Options{TapOwner: 1234, TapGroup: 5678, MTU: 1400})
	s := &network.State{
		Networks: []*v1.NetworkSpec{{Id: "n", Cidr: "10.64.0.0/24"}, {Id: "j", Cidr: "10.65.0.0/24", Mtu: 1450}},
		Machines: []network.Machine{machine("m", "02:00:00:00:00:01", "10.64.0.0/28"), machine("j", "02:00:00:00:00:02", "10.65.0.0/28")},
	}
	if err := h.Apply(ctx, s); err != nil {
		t.Fatal(err)
	}
	for id, mtu := range map[string]int{"m": 1400, "j": 1450} {
		name := h.TapName(id)
		l, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(name) > 15 || l.Attrs().MTU != mtu || l.Attrs().HardwareAddr.String() != "ee:ee:ee:ee:ee:ee" || l.Attrs().Flags&net.FlagUp == 0 {
			t.Errorf("%+v", l.Attrs())
		}
		// IFF_TAP|IFF_NO_PI|IFF_ONE_QUEUE|IFF_VNET_HDR|IFF_PERSIST, not IFF_MULTI_QUEUE.
		for file, want := range map[string]string{"tun_flags": "0x7802", "owner": "1234", "group": "5678"} {
			b, err := os.ReadFile(filepath.Join("/sys/class/net", name, file))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimSpace(string(b)); got != want {
				t.Errorf("%s: %s, want %s", file, got, want)
			}
		}
	}
}
