package names

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"

	v1 "tandem/api/tandem/v1"
)

// View is what a server knows: networks, and the names that each of them sees.
// It does not change once made.
type View struct {
	nets    []*net4              // sorted by address; disjoint
	clients map[netip.Addr]scope // of those in several networks
}

// scope is the networks of a client, in its order.
type scope []*net4

// lookup finds a name in the first network that has it; nil if none has.
func (s scope) lookup(name string) []netip.Addr {
	for _, n := range s {
		if ips := n.names[name]; ips != nil {
			return ips
		}
	}
	return nil
}

// owns tells whether a name is in a project of the client's.
func (s scope) owns(name string) bool {
	for _, n := range s {
		if n.project != "" && strings.HasSuffix(name, "."+n.project) {
			return true
		}
	}
	return false
}

func (s scope) internal() bool {
	for _, n := range s {
		if !n.internal {
			return false
		}
	}
	return true
}

// net4 is one network's names.
type net4 struct {
	id       string
	project  string
	cidr     netip.Prefix
	internal bool
	names    map[string][]netip.Addr
	byIP     map[netip.Addr]string
}

// NewView checks and indexes records. Each of clients is the addresses of a container
// that is in several networks, in its order. Records of networks that are not there are
// left out: nobody could ask for them. Records that are invalid are left out too,
// and named by the error that comes with the view. Without networks that can be
// understood there is no view.
func NewView(networks []*v1.NetworkSpec, records []*v1.NameRecord, clients [][]string) (*View, error) {
	v := &View{clients: map[netip.Addr]scope{}}
	byID := map[string]*net4{}
	for _, n := range networks {
		p, err := netip.ParsePrefix(n.GetCidr())
		if err != nil || !p.Addr().Is4() {
			return nil, fmt.Errorf("network %s: %q is not an IPv4 network: %w", n.GetId(), n.GetCidr(), errdefs.ErrInvalidArgument)
		}
		x := &net4{
			id: n.GetId(), project: strings.ToLower(n.GetProject()), cidr: p.Masked(), internal: n.GetInternal(),
			names: map[string][]netip.Addr{}, byIP: map[netip.Addr]string{},
		}
		byID[n.GetId()] = x
		v.nets = append(v.nets, x)
	}
	sort.Slice(v.nets, func(i, j int) bool { return v.nets[i].cidr.Addr().Less(v.nets[j].cidr.Addr()) })
	var errs []error
records:
	for _, r := range records {
		n := byID[r.GetNetwork()]
		if n == nil {
			continue
		}
		name := strings.TrimSuffix(strings.ToLower(r.GetName()), ".")
		if _, ok := dns.IsDomainName(name); !ok || name == "" {
			errs = append(errs, fmt.Errorf("name %q in network %s is not a domain name: %w", r.GetName(), n.id, errdefs.ErrInvalidArgument))
			continue
		}
		ips := n.names[name]
		if ips == nil {
			ips = make([]netip.Addr, 0, len(r.GetIps())) // not nil: the name exists
		}
		for _, s := range r.GetIps() {
			ip, err := netip.ParseAddr(s)
			if err != nil || !ip.Is4() {
				errs = append(errs, fmt.Errorf("name %s in network %s: %q is not an IPv4 address: %w", name, n.id, s, errdefs.ErrInvalidArgument))
				continue records
			}
			ips = append(ips, ip)
		}
		n.names[name] = ips
	}
	for _, n := range v.nets {
		for name, ips := range n.names {
			if len(ips) != 1 {
				continue
			}
			// The longest single label is the container's own name ("shop-web-1").
			if old, has := n.byIP[ips[0]]; !has || better(name, old) {
				n.byIP[ips[0]] = name
			}
		}
	}
	for _, c := range clients {
		var ips []netip.Addr
		var nets scope
		for _, s := range c {
			ip, err := netip.ParseAddr(s)
			if err != nil || !ip.Is4() {
				errs = append(errs, fmt.Errorf("client %q is not an IPv4 address: %w", s, errdefs.ErrInvalidArgument))
				continue
			}
			if n := v.networkOf(ip); n != nil {
				ips, nets = append(ips, ip), append(nets, n)
			}
		}
		for _, ip := range ips {
			v.clients[ip] = nets
		}
	}
	return v, errors.Join(errs...)
}

// specOf is what NewView gets, as a message; viewOf is its other end.
func specOf(networks []*v1.NetworkSpec, records []*v1.NameRecord, clients [][]string) *v1.HostSpec {
	spec := &v1.HostSpec{Networks: networks, Names: records}
	for _, c := range clients {
		x := &v1.ContainerAssignment{}
		for _, ip := range c {
			x.Addresses = append(x.Addresses, &v1.NetworkAddress{Ip: ip})
		}
		spec.Containers = append(spec.Containers, x)
	}
	return spec
}

func viewOf(spec *v1.HostSpec) (*View, error) {
	var clients [][]string
	for _, c := range spec.GetContainers() {
		var ips []string
		for _, a := range c.GetAddresses() {
			ips = append(ips, a.GetIp())
		}
		clients = append(clients, ips)
	}
	return NewView(spec.GetNetworks(), spec.GetNames(), clients)
}

func better(a, b string) bool {
	if da, db := strings.Contains(a, "."), strings.Contains(b, "."); da != db {
		return db
	}
	if len(a) != len(b) {
		return len(a) > len(b)
	}
	return a < b
}

// networksOf finds a client's networks; none if it is nobody's address.
func (v *View) networksOf(ip netip.Addr) scope {
	if s := v.clients[ip]; s != nil {
		return s
	}
	if n := v.networkOf(ip); n != nil {
		return scope{n}
	}
	return nil
}

// networkOf finds the network that an address is in.
func (v *View) networkOf(ip netip.Addr) *net4 {
	i := sort.Search(len(v.nets), func(i int) bool { return ip.Less(v.nets[i].cidr.Addr()) })
	if i == 0 || !v.nets[i-1].cidr.Contains(ip) {
		return nil
	}
	return v.nets[i-1]
}

// reverse answers for the addresses of networks of this host, and tells whether
// the question was for one: no such question goes outside.
func (s scope) reverse(m *dns.Msg, q dns.Question, name string, v *View) bool {
	ip, ok := arpaAddr(name)
	if !ok {
		return false
	}
	owner := v.networkOf(ip)
	if owner == nil {
		return false
	}
	m.Authoritative = true
	host := owner.byIP[ip]
	switch {
	case !slices.Contains(s, owner) || host == "":
		m.Rcode = dns.RcodeNameError
	case q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY:
		m.Answer = []dns.RR{&dns.PTR{
			Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypePTR, Class: dns.ClassINET, Ttl: ttl},
			Ptr: dns.Fqdn(host),
		}}
		return true
	}
	m.Ns = []dns.RR{soa(q.Name)}
	return true
}

func arpaAddr(name string) (netip.Addr, bool) {
	rest, ok := strings.CutSuffix(name, ".in-addr.arpa")
	if !ok {
		return netip.Addr{}, false
	}
	p := strings.Split(rest, ".")
	if len(p) != 4 {
		return netip.Addr{}, false
	}
	ip, err := netip.ParseAddr(p[3] + "." + p[2] + "." + p[1] + "." + p[0])
	return ip, err == nil && ip.Is4()
}
