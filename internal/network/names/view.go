package names

import (
	"errors"
	"fmt"
	"net/netip"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"

	v1 "tandem/api/tandem/v1"
)

// View is what a server knows: networks, and the names that each of them sees.
// It does not change once made.
type View struct {
	nets []*net4 // sorted by address; disjoint
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

// NewView checks and indexes records. Records of networks that are not there are
// left out: nobody could ask for them. Records that are invalid are left out too,
// and named by the error that comes with the view. Without networks that can be
// understood there is no view.
func NewView(networks []*v1.NetworkSpec, records []*v1.NameRecord) (*View, error) {
	v := &View{}
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
	return v, errors.Join(errs...)
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

// networkOf finds a client's network.
func (v *View) networkOf(ip netip.Addr) *net4 {
	i := sort.Search(len(v.nets), func(i int) bool { return ip.Less(v.nets[i].cidr.Addr()) })
	if i == 0 || !v.nets[i-1].cidr.Contains(ip) {
		return nil
	}
	return v.nets[i-1]
}

// reverse answers for the addresses of networks of this host, and tells whether
// the question was for one: no such question goes outside.
func (n *net4) reverse(m *dns.Msg, q dns.Question, name string, v *View) bool {
	ip, ok := arpaAddr(name)
	if !ok {
		return false
	}
	owner := v.networkOf(ip)
	if owner == nil {
		return false
	}
	m.Authoritative = true
	host := n.byIP[ip]
	switch {
	case owner != n || host == "":
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
