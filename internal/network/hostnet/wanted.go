package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/names"
)

// maxBackends bounds how many replicas share one published port.
const maxBackends = 1024

// wanted is a network.State, checked and in the kernel's terms.
type wanted struct {
	nets     []netSpec
	pairs    [][2]netip.Prefix // source, destination
	taps     []tapSpec
	veths    []vethSpec
	services map[svcKey][]netip.AddrPort // backends that are ready, sorted
	dnsNets  []*v1.NetworkSpec           // for the name server, as they came
	dnsNames []*v1.NameRecord
	clients  [][]string
}

type netSpec struct {
	id       string
	cidr     netip.Prefix
	internal bool
}

type tapSpec struct {
	name     string
	machine  string
	mac      net.HardwareAddr
	mtu      int
	prefixes []netip.Prefix
}

type vethSpec struct {
	name    string
	ip      netip.Addr // its MAC comes from this one
	further []netip.Addr
}

// svcKey is what a published port listens on. An unspecified address is all of
// the host's addresses.
type svcKey struct {
	proto uint8 // unix.IPPROTO_TCP, ...
	ip    netip.Addr
	port  uint16
}

func (k svcKey) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(k.ip, k.port), protoName(k.proto))
}

var protocols = map[string]uint8{"": 6, "tcp": 6, "udp": 17, "sctp": 132}

func protoName(p uint8) string {
	for n, v := range protocols {
		if v == p && n != "" {
			return n
		}
	}
	return "?"
}

func invalid(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
}

// Check says whether Apply would take a state: InvalidArgument tells why not.
func Check(s *network.State) error {
	h := &Host{o: Options{Prefix: endpoint.DefaultPrefix, MTU: endpoint.DefaultMTU}}
	_, _, err := h.parse(s)
	return err
}

// parse checks a state. skipped joins what is wrong with single ports and names:
// users choose them, so that one must not stop the others.
func (h *Host) parse(s *network.State) (w *wanted, skipped, err error) {
	w = &wanted{services: map[svcKey][]netip.AddrPort{}}
	if err := w.networks(s.Networks); err != nil {
		return nil, nil, err
	}
	used := map[string]string{}
	owned := prefixOwners{}
	for _, m := range s.Machines {
		mac, err := net.ParseMAC(m.MAC)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || mac.String() == endpoint.GatewayMAC.String() {
			return nil, nil, invalid("machine %s: MAC %q is not a unicast Ethernet address", m.ID, m.MAC)
		}
		t := tapSpec{name: h.TapName(m.ID), machine: m.ID, mac: mac}
		if o, dup := used[t.name]; dup {
			return nil, nil, invalid("machines %s and %s have the same tap", m.ID, o)
		}
		used[t.name] = m.ID
		for _, p := range m.Prefixes {
			pf, err := parsePrefix(p)
			if err != nil {
				return nil, nil, invalid("machine %s: %v", m.ID, err)
			}
			owned = append(owned, prefixOwner{pf, "machine " + m.ID})
			t.prefixes = append(t.prefixes, pf)
			for _, n := range s.Networks { // few networks; parsed above
				if netip.MustParsePrefix(n.GetCidr()).Overlaps(pf) {
					t.mtu = max(t.mtu, int(n.GetMtu()))
				}
			}
		}
		if t.mtu == 0 {
			t.mtu = h.o.MTU
		}
		w.taps = append(w.taps, t)
	}
	for _, c := range s.Containers {
		ip, err := parseIP(c.IP)
		if err != nil {
			return nil, nil, invalid("container %s: %v", c.ID, err)
		}
		owned = append(owned, prefixOwner{netip.PrefixFrom(ip, 32), "container " + c.ID})
		v := vethSpec{name: h.VethName(c.ID), ip: ip}
		for _, s := range c.Further {
			if ip, err = parseIP(s); err != nil {
				return nil, nil, invalid("container %s: %v", c.ID, err)
			}
			owned = append(owned, prefixOwner{netip.PrefixFrom(ip, 32), "container " + c.ID})
			v.further = append(v.further, ip)
		}
		w.veths = append(w.veths, v)
	}
	if err := owned.disjoint(); err != nil {
		return nil, nil, err
	}
	portErr := w.ports(s.Ports)
	view, nameErr := names.NewView(s.Networks, s.Names, s.Clients)
	if view == nil {
		return nil, nil, nameErr
	}
	w.dnsNets, w.dnsNames, w.clients = s.Networks, s.Names, s.Clients
	return w, errors.Join(portErr, nameErr), nil
}

func (w *wanted) networks(specs []*v1.NetworkSpec) error {
	byID := map[string]netip.Prefix{}
	owned := prefixOwners{}
	for _, n := range specs {
		p, err := parsePrefix(n.GetCidr())
		if err != nil {
			return invalid("network %s: %v", n.GetId(), err)
		}
		if n.GetMtu() != 0 && (n.GetMtu() < 576 || n.GetMtu() > 65521) {
			return invalid("network %s: mtu %d: must be 576 to 65521", n.GetId(), n.GetMtu())
		}
		if _, dup := byID[n.GetId()]; dup || n.GetId() == "" {
			return invalid("network id %q is missing or not unique", n.GetId())
		}
		byID[n.GetId()] = p
		owned = append(owned, prefixOwner{p, "network " + n.GetId()})
		w.nets = append(w.nets, netSpec{id: n.GetId(), cidr: p, internal: n.GetInternal()})
		w.pairs = append(w.pairs, [2]netip.Prefix{p, p})
	}
	for _, n := range specs {
		for _, a := range n.GetAllow() {
			if src, ok := byID[a]; ok && a != n.GetId() { // others live on other hosts only
				w.pairs = append(w.pairs, [2]netip.Prefix{src, byID[n.GetId()]})
			}
		}
	}
	return owned.disjoint()
}

func (w *wanted) ports(ports []*v1.PublishedPort) error {
	var errs []error
	for _, p := range ports {
		proto, ok := protocols[strings.ToLower(p.GetProtocol())]
		if !ok {
			errs = append(errs, invalid("published port %d: protocol %q: must be tcp, udp or sctp", p.GetHostPort(), p.GetProtocol()))
			continue
		}
		if p.GetHostPort() < 1 || p.GetHostPort() > 65535 {
			errs = append(errs, invalid("published port %d: must be 1 to 65535", p.GetHostPort()))
			continue
		}
		k := svcKey{proto: proto, ip: netip.IPv4Unspecified(), port: uint16(p.GetHostPort())}
		if ip := p.GetHostIp(); ip != "" {
			a, err := netip.ParseAddr(ip)
			if err != nil || !a.Is4() || a.IsMulticast() || a == gateway {
				errs = append(errs, invalid("published port %d: host address %q: must be an IPv4 address of this host", p.GetHostPort(), ip))
				continue
			}
			k.ip = a
		}
		if _, dup := w.services[k]; dup {
			errs = append(errs, fmt.Errorf("published port %s: published twice: %w", k, errdefs.ErrAlreadyExists))
			continue
		}
		bs, err := backends(p.GetBackends())
		if err != nil {
			errs = append(errs, fmt.Errorf("published port %s: %w", k, err))
			continue
		}
		w.services[k] = bs
	}
	return errors.Join(errs...)
}

func backends(in []*v1.Backend) ([]netip.AddrPort, error) {
	out := make([]netip.AddrPort, 0, len(in))
	for _, b := range in {
		if !b.GetReady() {
			continue
		}
		ip, err := parseIP(b.GetIp())
		if err != nil {
			return nil, invalid("backend %s: %v", b.GetContainerId(), err)
		}
		if b.GetPort() < 1 || b.GetPort() > 65535 {
			return nil, invalid("backend %s: port %d: must be 1 to 65535", b.GetContainerId(), b.GetPort())
		}
		out = append(out, netip.AddrPortFrom(ip, uint16(b.GetPort())))
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	out = slices.Compact(out)
	if len(out) > maxBackends {
		return nil, fmt.Errorf("%d replicas: at most %d can share a port: %w", len(out), maxBackends, errdefs.ErrOutOfRange)
	}
	return out, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil || !p.Addr().Is4() || p.Bits() < 8 || p != p.Masked() || !unicast(p.Addr()) {
		return p, fmt.Errorf("%q is not an IPv4 network such as 10.64.0.0/24", s)
	}
	return p, nil
}

func parseIP(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() || !unicast(a) {
		return a, fmt.Errorf("%q is not an IPv4 unicast address", s)
	}
	return a, nil
}

// unicast also refuses the gateway's link-local range.
func unicast(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast() && a.As4()[0] < 240
}

type prefixOwner struct {
	p     netip.Prefix
	owner string
}
type prefixOwners []prefixOwner

// disjoint checks that no address belongs to two.
func (ps prefixOwners) disjoint() error {
	slices.SortFunc(ps, func(a, b prefixOwner) int { return a.p.Addr().Compare(b.p.Addr()) })
	for i := 1; i < len(ps); i++ {
		if ps[i-1].p.Overlaps(ps[i].p) {
			return invalid("%s of %s overlaps %s of %s", ps[i].p, ps[i].owner, ps[i-1].p, ps[i-1].owner)
		}
	}
	return nil
}
