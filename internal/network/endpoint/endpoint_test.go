package endpoint_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/internal/bed"
)

func TestMain(m *testing.M) { bed.Main(m) }

func manager(t *testing.T) (*endpoint.Manager, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "netns")
	m, err := endpoint.New(endpoint.Options{NetnsDir: dir})
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
		if ls, _ := netlink.LinkList(); countPrefix(ls, "td") != 0 {
			t.Error("links are left")
		}
		m.Close()
	})
	return m, dir
}

func countPrefix(ls []netlink.Link, p string) (n int) {
	for _, l := range ls {
		if strings.HasPrefix(l.Attrs().Name, p) {
			n++
		}
	}
	return n
}

func routed(ip string) *v1.RuntimeNetwork {
	return &v1.RuntimeNetwork{Mode: "routed", Address: ip + "/32", Gateway: "169.254.1.1", Mtu: 1450}
}

// talk sends one line from a to a listener in b.
func talk(t *testing.T, a, b *bed.NS, ip string) error {
	t.Helper()
	var l net.Listener
	if err := b.Do(func() (err error) { l, err = net.Listen("tcp4", ip+":0"); return err }); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			fmt.Fprint(c, "hello from ", ip)
			c.Close()
		}
	}()
	var c net.Conn
	if err := a.Do(func() (err error) {
		c, err = net.DialTimeout("tcp4", l.Addr().String(), 5*time.Second)
		return err
	}); err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(c)
	if err == nil && string(got) != "hello from "+ip {
		return fmt.Errorf("got %q", got)
	}
	return err
}

func TestTwoContainersTalk(t *testing.T) {
	m, _ := manager(t)
	ctx := context.Background()
	var ns []*bed.NS
	for i, ip := range []string{"10.64.0.5", "10.64.0.6"} {
		start := time.Now()
		p, err := m.Setup(ctx, fmt.Sprint("c-", i), routed(ip))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("setup %v", time.Since(start))
		ns = append(ns, bed.OpenNS(t, p))
	}
	if err := talk(t, ns[0], ns[1], "10.64.0.6"); err != nil {
		t.Fatal(err)
	}
	if err := talk(t, ns[1], ns[0], "10.64.0.5"); err != nil {
		t.Fatal(err)
	}
	eth, err := ns[0].NL.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if eth.Attrs().MTU != 1450 || eth.Attrs().HardwareAddr.String() != "06:74:0a:40:00:05" {
		t.Errorf("eth0: mtu %d, mac %s", eth.Attrs().MTU, eth.Attrs().HardwareAddr)
	}
	host, err := netlink.LinkByName(m.HostName("c-0"))
	if err != nil {
		t.Fatal(err)
	}
	if len(host.Attrs().Name) > 15 || host.Attrs().HardwareAddr.String() != "ee:ee:ee:ee:ee:ee" {
		t.Errorf("host end: %+v", host.Attrs())
	}
	if out, _ := ns[0].Run("cat", "/proc/net/if_inet6"); strings.Contains(out, "eth0") {
		t.Errorf("IPv6 on eth0: %s", out)
	}
}

func TestSetupAgainMendsWhatIsBroken(t *testing.T) {
	m, dir := manager(t)
	ctx := context.Background()
	setup := func(ip string) *bed.NS {
		t.Helper()
		p, err := m.Setup(ctx, "c", routed(ip))
		if err != nil {
			t.Fatal(err)
		}
		return bed.OpenNS(t, p)
	}
	peerPath, err := m.Setup(ctx, "peer", routed("10.64.0.9"))
	if err != nil {
		t.Fatal(err)
	}
	peer := bed.OpenNS(t, peerPath)
	check := func(ip string) {
		t.Helper()
		ns := setup(ip)
		if err := talk(t, peer, ns, ip); err != nil {
			t.Fatal(err)
		}
		as, err := ns.NL.AddrList(nil, netlink.FAMILY_V4)
		if err != nil || len(as) != 2 {
			t.Fatalf("addresses: %v %v", as, err)
		}
	}

	// Killed between the file and the mount.
	if err := os.WriteFile(filepath.Join(dir, "c"), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	check("10.64.0.5")
	check("10.64.0.5") // again: nothing changes
	before, _ := netlink.LinkByName(m.HostName("c"))
	check("10.64.0.5")
	if after, _ := netlink.LinkByName(m.HostName("c")); after.Attrs().Index != before.Attrs().Index {
		t.Error("a right link was made anew")
	}

	// Killed half way: a link without addresses; down; without routes.
	ns := setup("10.64.0.5")
	eth, _ := ns.NL.LinkByName("eth0")
	if err := ns.NL.LinkSetDown(eth); err != nil {
		t.Fatal(err)
	}
	check("10.64.0.5")
	if _, err := ns.Run("ip", "addr", "flush", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	check("10.64.0.5")
	if err := netlink.LinkDel(before); err != nil {
		t.Fatal(err)
	}
	check("10.64.0.5")

	// Another address: the old one is gone, on both sides.
	check("10.64.0.77")
	if r, _ := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: mustNet("10.64.0.5/32")}, netlink.RT_FILTER_DST); len(r) != 0 {
		t.Errorf("old route: %v", r)
	}

	// A new manager (restart) finds all of it.
	m2, err := endpoint.New(endpoint.Options{NetnsDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer m2.Close()
	ids, err := m2.List()
	if err != nil || strings.Join(ids, " ") != "c peer" {
		t.Fatalf("list: %v %v", ids, err)
	}
	for range 2 {
		if err := m2.Teardown(ctx, "c"); err != nil {
			t.Fatal(err)
		}
	}
}

func mustNet(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return n
}

func TestModeNone(t *testing.T) {
	m, _ := manager(t)
	if _, err := m.Setup(context.Background(), "c", routed("10.64.0.5")); err != nil {
		t.Fatal(err)
	}
	p, err := m.Setup(context.Background(), "c", &v1.RuntimeNetwork{Mode: "none"})
	if err != nil {
		t.Fatal(err)
	}
	ns := bed.OpenNS(t, p)
	ls, err := ns.NL.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		up := l.Attrs().Flags&net.FlagUp != 0
		if (l.Attrs().Name == "lo") != up || l.Attrs().Name == "eth0" {
			t.Errorf("%s: up %v", l.Attrs().Name, up)
		}
	}
}

func TestRpFilterStopsForeignSources(t *testing.T) {
	m, _ := manager(t)
	a, err := m.Setup(context.Background(), "a", routed("10.64.0.5"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.Setup(context.Background(), "b", routed("10.64.0.6"))
	if err != nil {
		t.Fatal(err)
	}
	nsA, nsB := bed.OpenNS(t, a), bed.OpenNS(t, b)
	if _, err := nsA.Run("ip", "addr", "add", "10.64.0.99/32", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	var srv *net.UDPConn
	if err := nsB.Do(func() (err error) {
		srv, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(10, 64, 0, 6), Port: 7000})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	for _, src := range []string{"10.64.0.99", "10.64.0.5"} { // in order: only the second arrives
		if err := nsA.Do(func() error {
			c, err := net.DialUDP("udp4", &net.UDPAddr{IP: net.ParseIP(src)}, srv.LocalAddr().(*net.UDPAddr))
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(src))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	srv.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 64)
	n, err := srv.Read(buf)
	if err != nil || string(buf[:n]) != "10.64.0.5" {
		t.Fatalf("got %q %v", buf[:n], err)
	}
}

func TestManyAtOnce(t *testing.T) {
	m, _ := manager(t)
	var wg sync.WaitGroup
	errs := make(chan error, 64)
	start := time.Now()
	for i := range 32 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if _, err := m.Setup(context.Background(), fmt.Sprint("c", i), routed(fmt.Sprintf("10.64.1.%d", i+1))); err != nil {
				errs <- err
			}
		}()
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	t.Logf("32 links in %v", time.Since(start))
}

func TestInvalid(t *testing.T) {
	m, dir := manager(t)
	for name, c := range map[string]struct {
		id string
		n  *v1.RuntimeNetwork
	}{
		"path in id":  {"../x", routed("10.0.0.1")},
		"dot id":      {".", routed("10.0.0.1")},
		"empty id":    {"", routed("10.0.0.1")},
		"not a /32":   {"c", &v1.RuntimeNetwork{Address: "10.0.0.1/24"}},
		"ipv6":        {"c", &v1.RuntimeNetwork{Address: "fd00::1/128"}},
		"no address":  {"c", &v1.RuntimeNetwork{}},
		"loopback":    {"c", routed("127.0.0.1")},
		"gateway":     {"c", &v1.RuntimeNetwork{Address: "10.0.0.1/32", Gateway: "x"}},
		"own gateway": {"c", &v1.RuntimeNetwork{Address: "10.0.0.1/32", Gateway: "10.0.0.1"}},
		"mtu":         {"c", &v1.RuntimeNetwork{Address: "10.0.0.1/32", Mtu: 1 << 31}},
		"host mode":   {"c", &v1.RuntimeNetwork{Mode: "host"}},
		"mode":        {"c", &v1.RuntimeNetwork{Mode: "bridge"}},
		"nothing":     {"c", nil},
	} {
		if _, err := m.Setup(context.Background(), c.id, c.n); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if es, _ := os.ReadDir(dir); len(es) != 0 {
		t.Errorf("left: %v", es)
	}
	for _, o := range []endpoint.Options{{}, {NetnsDir: "x"}, {NetnsDir: dir, Prefix: "TOOLONG"}} {
		if _, err := endpoint.New(o); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%+v: %v", o, err)
		}
	}
}
