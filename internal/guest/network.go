package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

const (
	maxNICs     = 32
	maxPrefixes = 256
	minMTU      = 576
	maxMTU      = 65535
	// prefixMetric is worse than any container's own route.
	prefixMetric = 4096
	// routeProtocol marks the routes made here (values from 128 on are free).
	routeProtocol = 217
)

// nic is a GuestNIC, checked.
type nic struct {
	mac       net.HardwareAddr
	addresses []netip.Prefix
	gateway   netip.Addr
	mtu       int
	prefixes  []netip.Prefix
}

// ConfigureNetwork brings NICs up by MAC, waits for those that are on their way,
// and gives them what was asked for, no less and no more.
func (s *service) ConfigureNetwork(ctx context.Context, r *connect.Request[v1.ConfigureNetworkRequest]) (*connect.Response[v1.ConfigureNetworkResponse], error) {
	nics, err := parseNICs(r.Msg)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var conf strings.Builder
	for _, d := range r.Msg.DnsServers {
		fmt.Fprintf(&conf, "nameserver %s\n", d)
	}
	for _, n := range nics {
		if err := n.apply(ctx); err != nil {
			return nil, fmt.Errorf("network interface %s: %w", n.mac, err)
		}
	}
	if err := os.WriteFile("/etc/resolv.conf", []byte(conf.String()), 0o644); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ConfigureNetworkResponse{}), nil
}

func parseNICs(m *v1.ConfigureNetworkRequest) ([]nic, error) {
	bad := func(what string, err error) error {
		return fmt.Errorf("configure network: %s: %v: %w", what, err, errdefs.ErrInvalidArgument)
	}
	if len(m.Nics) > maxNICs {
		return nil, bad("NICs", fmt.Errorf("%d are more than %d", len(m.Nics), maxNICs))
	}
	for _, d := range m.DnsServers {
		if _, err := netip.ParseAddr(d); err != nil {
			return nil, bad("DNS server", err)
		}
	}
	var list []nic
	for _, w := range m.Nics {
		n := nic{mtu: int(w.Mtu)}
		var err error
		if n.mac, err = net.ParseMAC(w.Mac); err != nil || len(n.mac) != 6 {
			return nil, bad("MAC "+w.Mac, err)
		}
		if n.mtu != 0 && (n.mtu < minMTU || n.mtu > maxMTU) {
			return nil, bad("MTU", fmt.Errorf("%d", n.mtu))
		}
		if w.Gateway != "" {
			if n.gateway, err = netip.ParseAddr(w.Gateway); err != nil || !n.gateway.Is4() {
				return nil, bad("gateway "+w.Gateway, err)
			}
		}
		if len(w.Addresses) > maxPrefixes || len(w.ContainerPrefixes) > maxPrefixes {
			return nil, bad("addresses", fmt.Errorf("more than %d", maxPrefixes))
		}
		for _, a := range w.Addresses {
			p, err := netip.ParsePrefix(a)
			if err != nil || !p.Addr().Is4() {
				return nil, bad("address "+a, err)
			}
			n.addresses = append(n.addresses, p)
		}
		for _, a := range w.ContainerPrefixes {
			p, err := netip.ParsePrefix(a)
			if err != nil || !p.Addr().Is4() {
				return nil, bad("container prefix "+a, err)
			}
			n.prefixes = append(n.prefixes, p.Masked())
		}
		list = append(list, n)
	}
	return list, nil
}

// apply makes one interface what it shall be.
func (n *nic) apply(ctx context.Context) error {
	link, err := n.find(ctx)
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	// Proxy ARP answers for containers, whose routes lead elsewhere; and only the
	// interface's own addresses are answered for otherwise.
	for key, v := range map[string]string{"proxy_arp": "1", "rp_filter": "0", "arp_ignore": "0", "forwarding": "1"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/"+key, []byte(v), 0); err != nil {
			return err
		}
	}
	os.WriteFile("/proc/sys/net/ipv4/neigh/"+name+"/proxy_delay", []byte("0"), 0) // up to 0.8 s otherwise
	os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
	if n.mtu != 0 && link.Attrs().MTU != n.mtu {
		if err := netlink.LinkSetMTU(link, n.mtu); err != nil {
			return fmt.Errorf("set MTU %d: %w", n.mtu, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up: %w", err)
	}
	if err := n.applyAddresses(link); err != nil {
		return err
	}
	return n.applyRoutes(link)
}

func (n *nic) find(ctx context.Context) (link netlink.Link, err error) {
	err = poll(ctx, "it", func() (bool, error) {
		links, err := netlink.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return false, err
		}
		for _, l := range links {
			if l.Type() == "device" && bytes.Equal(l.Attrs().HardwareAddr, n.mac) {
				link = l
				return true, nil
			}
		}
		return false, nil
	})
	return link, err
}

func (n *nic) applyAddresses(link netlink.Link) error {
	want := map[string]bool{}
	for _, a := range n.addresses {
		want[a.String()] = true
		if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipNet(a)}); err != nil {
			return fmt.Errorf("address %s: %w", a, err)
		}
	}
	have, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, a := range have {
		if !want[a.IPNet.String()] {
			if err := netlink.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove address %s: %w", a.IPNet, err)
			}
		}
	}
	return nil
}

// applyRoutes sends everything to the gateway, which is on this link whatever
// its address, and keeps what goes to containers that are not there from going
// round between machine and host.
func (n *nic) applyRoutes(link netlink.Link) error {
	index := link.Attrs().Index
	var want []netlink.Route
	if n.gateway.IsValid() {
		gw := net.IP(n.gateway.AsSlice())
		want = append(want,
			netlink.Route{LinkIndex: index, Dst: ipNet(netip.PrefixFrom(n.gateway, 32)), Scope: netlink.SCOPE_LINK, Protocol: routeProtocol},
			netlink.Route{LinkIndex: index, Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0")), Gw: gw, Flags: int(netlink.FLAG_ONLINK), Protocol: routeProtocol})
	}
	for _, p := range n.prefixes {
		if p.Bits() < 32 {
			want = append(want, netlink.Route{Dst: ipNet(p), Type: unix.RTN_UNREACHABLE, Priority: prefixMetric, Protocol: routeProtocol})
		}
	}
	keep := map[string]bool{}
	for i := range want {
		if err := netlink.RouteReplace(&want[i]); err != nil {
			return fmt.Errorf("route %s: %w", want[i].Dst, err)
		}
		keep[want[i].Dst.String()] = true
	}
	have, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Protocol: routeProtocol}, netlink.RT_FILTER_PROTOCOL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, r := range have {
		dst := "0.0.0.0/0"
		if r.Dst != nil {
			dst = r.Dst.String()
		}
		if keep[dst] || r.LinkIndex != 0 && r.LinkIndex != index && r.Type == unix.RTN_UNICAST {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove route %s: %w", dst, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
