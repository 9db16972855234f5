package hostnet_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sort"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/hostnet"
)

// kernel is all that Apply makes, in an order of its own.
func kernel(t *testing.T) string {
	t.Helper()
	var out []string
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyNetdev} {
		sets, err := c.GetSets(&nftables.Table{Name: "tandem", Family: f})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sets {
			es, err := c.GetSetElements(s)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range es {
				out = append(out, fmt.Sprintf("%s %x-%x %x", s.Name, e.Key, e.KeyEnd, e.Val))
			}
		}
		chains, err := c.ListChainsOfTableFamily(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, ch := range chains {
			if !strings.HasPrefix(ch.Name, "n_") && !strings.HasPrefix(ch.Name, "m_") { // unused ones may stay
				rs, err := c.GetRules(ch.Table, ch)
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, fmt.Sprintf("chain %s %d", ch.Name, len(rs)))
			}
		}
	}
	rs, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: 0x74}, netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rs {
		out = append(out, "route "+r.String())
	}
	ls, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range ls {
		if l.Type() == "tuntap" {
			out = append(out, fmt.Sprint("tap ", l.Attrs().Name, l.Attrs().MTU, l.Attrs().Flags.String()))
		}
	}
	sort.Strings(out)
	return strings.Join(out, "\n")
}

// TestChangesLeadWhereANewProcessDoes: after any walk through states, the kernel
// is what a process that knows nothing would have made of the last one.
func TestChangesLeadWhereANewProcessDoes(t *testing.T) {
	clean(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	o := hostnet.Options{NoNames: true, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}
	h := open(t, o)
	for step := range 60 {
		s := randomState(r)
		if err := h.Apply(ctx, s); err != nil {
			t.Fatalf("step %d: %v", step, err)
		}
		changed := kernel(t)
		fresh := open(t, o)
		if err := fresh.Apply(ctx, s); err != nil {
			t.Fatalf("step %d, new process: %v", step, err)
		}
		if anew := kernel(t); anew != changed {
			t.Fatalf("step %d: changes led to\n%s\na new process makes\n%s", step, changed, anew)
		}
		h.Close()
		h = fresh // which goes on by changes
	}
}

func randomState(r *rand.Rand) *network.State {
	s := &network.State{}
	for i := range r.IntN(4) {
		n := &v1.NetworkSpec{Id: fmt.Sprint("n", i), Cidr: fmt.Sprintf("10.64.%d.0/24", i), Internal: r.IntN(3) == 0}
		if r.IntN(2) == 0 {
			n.Allow = []string{fmt.Sprint("n", r.IntN(4))}
		}
		if r.IntN(3) == 0 {
			n.Mtu = 1400
		}
		s.Networks = append(s.Networks, n)
	}
	for i, block := range r.Perm(8)[:r.IntN(6)] {
		m := machine(fmt.Sprint("m-", i), fmt.Sprintf("02:00:00:00:00:%02x", r.IntN(3)), fmt.Sprintf("10.64.0.%d/28", block*16))
		if r.IntN(3) == 0 {
			m.Prefixes = append(m.Prefixes, fmt.Sprintf("10.64.1.%d/28", block*16))
		}
		s.Machines = append(s.Machines, m)
	}
	for i := range r.IntN(3) {
		s.Containers = append(s.Containers, network.MetalContainer{ID: fmt.Sprint("c-", i), IP: fmt.Sprintf("10.64.2.%d", 1+r.IntN(2)*10+i)})
	}
	for p := range 6 {
		if r.IntN(2) == 0 {
			continue
		}
		port := &v1.PublishedPort{Protocol: []string{"tcp", "udp"}[p%2], HostPort: uint32(8000 + p), HostIp: []string{"", "127.0.0.1"}[r.IntN(2)]}
		for b := range r.IntN(4) {
			port.Backends = append(port.Backends, backend(fmt.Sprintf("10.64.0.%d", 1+r.IntN(40)), uint32(80+b), r.IntN(4) > 0))
		}
		s.Ports = append(s.Ports, port)
	}
	return s
}
