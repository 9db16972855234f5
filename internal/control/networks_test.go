package control

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
	"tandem/internal/store/storetest"
)

var twoNets = map[string]netip.Prefix{"front": netip.MustParsePrefix("10.65.0.0/24"), "back": netip.MustParsePrefix("10.65.1.0/24")}

func networks() []store.Record {
	out := project("p")
	for name, cidr := range twoNets {
		out = append(out, &v1.Network{Meta: &v1.Meta{Project: "p", Name: name, Id: "n-" + name}, Cidr: cidr.String()})
	}
	return out
}

func in(names ...string) (out []*v1.NetworkAttachment) {
	for _, n := range names {
		out = append(out, &v1.NetworkAttachment{Network: n})
	}
	return out
}

// told looks at all containers' addresses: one in each of their networks, in order,
// nobody's twice, and in the machine's blocks.
func told(t *testing.T, s *store.Snapshot) map[string]string {
	t.Helper()
	owner := map[string]string{}
	for _, c := range s.Containers {
		a := c.Assignment
		at := attachments(c)
		if len(a.GetAddresses()) != len(at) || a.Ip != a.Addresses[0].Ip || a.NetworkId != a.Addresses[0].NetworkId {
			t.Fatalf("%s in %v: %v", c.Meta.Name, at, a)
		}
		for i, x := range a.Addresses {
			if o := owner[x.Ip]; o != "" {
				t.Errorf("%s is %s's and %s's", x.Ip, o, c.Meta.Name)
			}
			owner[x.Ip] = c.Meta.Name
			ip := netip.MustParseAddr(x.Ip)
			if x.Network != at[i] || x.NetworkId != "n-"+at[i] || !twoNets[at[i]].Contains(ip) {
				t.Errorf("%s, network %s: %v", c.Meta.Name, at[i], x)
			}
			for _, m := range s.Machines {
				has := slices.ContainsFunc(m.Prefixes, func(p string) bool { return netip.MustParsePrefix(p).Contains(ip) })
				if has != (m.Meta.Id == a.MachineId) {
					t.Errorf("%s of %s is in a block of %s: %v", x.Ip, c.Meta.Name, m.Meta.Name, m.Prefixes)
				}
			}
		}
	}
	return owner
}

// TestAddressPerNetwork: unique, kept over a restart, known to be taken while their
// record can't be read, free when their container has gone.
func TestAddressPerNetwork(t *testing.T) {
	l := newLab(t, Options{})
	h := fakehost.New(fakehost.Options{})
	l.serve(h)
	l.create(networks()...)
	metal := &v1.ContainerSpec{Image: "x", Networks: in("back", "front"), Isolation: v1.Isolation_ISOLATION_METAL}
	fixed := &v1.ContainerSpec{Image: "x", Networks: in("front", "back")}
	fixed.Networks[1].Ipv4 = "10.65.1.77"
	l.create(service("p", "both", 18, &v1.ContainerSpec{Image: "x", Networks: in("back", "front")}), service("p", "front", 1, &v1.ContainerSpec{Image: "x", Networks: in("front")}),
		service("p", "metal", 2, metal), service("p", "fixed", 1, fixed))
	s := l.until("all run", running(22))
	owner := told(t, s)
	if len(owner) != 43 || owner["10.65.1.77"] != "p-fixed-1" {
		t.Errorf("%d addresses: %v", len(owner), owner)
	}
	for _, c := range s.Containers {
		if want := len(c.Assignment.Addresses); want > 1 && len(c.Status.Ips) != want || c.Status.Ip != c.Assignment.Ip {
			t.Errorf("status of %s: %v", c.Meta.Name, c.Status)
		}
	}

	// A new server gives what is left, also while it can't read one of the records.
	l.end()
	storetest.Damage(t, l.dir, store.Key{Kind: store.Containers, Project: "p", Name: "p-metal-2"}, true)
	l.start(Options{})
	l.serve(h)
	more := func(name string, replicas int32) {
		t.Helper()
		if _, err := store.Update(t.Context(), l.st, store.Key{Kind: store.Services, Project: "p", Name: name}, func(x *v1.Service) error { x.Replicas = replicas; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	more("both", 20)
	s = l.until("two more run", running(23))
	for ip, who := range told(t, s) {
		if owner[ip] != "" && owner[ip] != who {
			t.Errorf("%s went from %s to %s", ip, owner[ip], who)
		}
	}
	for ip, who := range owner {
		if who != "p-metal-2" && told(t, s)[ip] != who {
			t.Errorf("%s is not %s's any more", ip, who)
		}
	}

	// Nothing is removed while a record can't be read.
	if err := l.st.Purge(t.Context(), store.Key{Kind: store.Containers, Project: "p", Name: "p-metal-2"}); err != nil {
		t.Fatal(err)
	}
	more("fixed", 0)
	l.until("its address is free", func(s *store.Snapshot) bool {
		return !slices.ContainsFunc(s.Containers, func(c *v1.Container) bool { return c.Service == "fixed" })
	})
	l.create(service("p", "again", 1, proto.CloneOf(fixed)))
	s = l.until("taken by another", running(24))
	if who := told(t, s)["10.65.1.77"]; who != "p-again-1" {
		t.Errorf("10.65.1.77 is %q's", who)
	}
}

// TestNoAddressIsHalfTaken: when one of its networks is full a container waits and
// takes nothing of the others.
func TestNoAddressIsHalfTaken(t *testing.T) {
	front := &v1.Network{Meta: &v1.Meta{Project: "p", Name: "front", Id: "n-front"}, Cidr: "10.65.0.0/28"}
	back := &v1.Network{Meta: &v1.Meta{Project: "p", Name: "back", Id: "n-back"}, Cidr: "10.65.0.16/28"}
	w := &placement{networks: map[string]*v1.Network{"p/front": front, "p/back": back}, ipam: newIPAM(nil, nil, "10.65.0.17")}
	m := &v1.Machine{Meta: &v1.Meta{Id: "m-1"}}
	w.changed = map[string]*v1.Machine{"m-1": m}
	w.machines = map[string]*v1.Machine{"m-1": m}
	x := &v1.Container{Meta: &v1.Meta{Project: "p", Name: "c"}, Spec: &v1.ContainerSpec{Networks: in("front", "back")}, Assignment: &v1.Assignment{}}
	before := len(w.ipam.used)
	err := w.address(x, m)
	if err == nil || !strings.Contains(err.Error(), "network back") || len(w.ipam.used) != before || len(x.Assignment.Addresses) != 0 || x.Assignment.Ip != "" {
		t.Errorf("%v; %d addresses are in use, %d were; %v", err, len(w.ipam.used), before, x.Assignment)
	}
	x.Spec.Networks = in("front", "gone")
	if err := w.address(x, m); err == nil || !strings.Contains(err.Error(), "network gone is not there") || len(w.ipam.used) != before {
		t.Errorf("%v; %d addresses are in use", err, len(w.ipam.used))
	}
}

// TestSpecOfSeveralNetworks: names, networks and ports are told per network; a record
// of an older version, with one address for all of them, is read as it was.
func TestSpecOfSeveralNetworks(t *testing.T) {
	c := func(id string, nets []*v1.NetworkAttachment, ips ...string) *v1.Container {
		x := &v1.Container{Meta: &v1.Meta{Project: "p", Name: "p-" + id, Id: strings.Repeat(id, 12)}, Service: id, Spec: &v1.ContainerSpec{Networks: nets},
			Assignment: &v1.Assignment{HostId: "h", Ip: ips[0], NetworkId: "n-" + nets[0].Network, Ports: []*v1.PortMapping{{HostPort: 80, ContainerPort: 8080}}}}
		for i, ip := range ips {
			if len(ips) == len(nets) {
				x.Assignment.Addresses = append(x.Assignment.Addresses, &v1.NetworkAddress{NetworkId: "n-" + nets[i].Network, Network: nets[i].Network, Ip: ip})
			}
		}
		return x
	}
	both := in("back", "front")
	both[0].Aliases, both[1].Aliases = []string{"db-side"}, []string{"www"}
	snap := &store.Snapshot{Containers: []*v1.Container{c("x", both, "10.65.1.1", "10.65.0.1"), c("y", in("front"), "10.65.0.2")}}
	for _, r := range networks() {
		if n, ok := r.(*v1.Network); ok {
			snap.Networks = append(snap.Networks, n)
		}
	}
	spec := hostSpec(snap, "h", "")
	names := map[string]string{}
	for _, r := range spec.Names {
		names[r.Network+" "+r.Name] = strings.Join(r.Ips, " ")
	}
	for name, want := range map[string]string{"n-front x": "10.65.0.1", "n-back x": "10.65.1.1", "n-front www": "10.65.0.1", "n-back www": "",
		"n-back db-side": "10.65.1.1", "n-front db-side": "", "n-front y": "10.65.0.2", "n-back y": "", "n-back x.p": "10.65.1.1"} {
		if names[name] != want {
			t.Errorf("%s is %q, want %q", name, names[name], want)
		}
	}
	if len(spec.Networks) != 2 || len(spec.Networks[0].Allow)+len(spec.Networks[1].Allow) != 0 {
		t.Errorf("networks %v", spec.Networks)
	}
	if len(spec.Containers[0].Addresses) != 2 || spec.Containers[0].Ip != "10.65.1.1" {
		t.Errorf("assignment %v", spec.Containers[0])
	}
	if b := spec.Ports[0].Backends; len(b) != 2 || b[0].Ip != "10.65.1.1" {
		t.Errorf("backends %v", b)
	}

	old := c("x", both, "10.65.1.1")
	snap.Containers[0] = old
	spec = hostSpec(snap, "h", "")
	got := map[string][]string{}
	for _, n := range spec.Networks {
		got[n.Id] = n.Allow
	}
	if fmt.Sprint(got) != "map[n-back:[n-front] n-front:[n-back]]" || len(spec.Containers[0].Addresses) != 0 {
		t.Errorf("an older record: %v, %v", got, spec.Containers[0])
	}
	if p := newIPAM(snap.Containers, nil); !p.used[netip.MustParseAddr("10.65.1.1")] || len(p.used) != 2 {
		t.Errorf("in use: %v", p.used)
	}
}
