package endpoint

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link makes the veth pair and everything on it what w says. Every step is
// idempotent; a pair of which one end is missing or wrong is made anew.
func (m *Manager) link(id, path string, w wanted) error {
	return m.withPair(id, path, w, func(in *netlink.Handle, host, eth netlink.Link) error {
		fresh := m.untouched(id, host, w)
		if err := container(in, eth, w, fresh); err != nil {
			return err
		}
		return m.apart.around(id, w, func() error { return m.kernel(host, w, fresh) })
	})
}

// withPair makes the veth pair, if need be, and calls fn with both ends and a socket
// in the container's namespace.
func (m *Manager) withPair(id, path string, w wanted, fn func(in *netlink.Handle, host, eth netlink.Link) error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	in, err := handleIn(ns)
	if err != nil {
		return fmt.Errorf("netlink in its namespace: %w", err)
	}
	defer in.Close()
	host, eth, err := m.pair(id, ns, in, w)
	if err != nil {
		return err
	}
	return fn(in, host, eth)
}

// handleIn opens a netlink socket inside a namespace.
func handleIn(ns *os.File) (h *netlink.Handle, err error) {
	err = onOwnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	return h, err
}

// pair returns both ends, made if need be.
func (m *Manager) pair(id string, ns *os.File, in *netlink.Handle, w wanted) (host, eth netlink.Link, err error) {
	name := m.HostName(id)
	host, herr := m.nl.LinkByName(name)
	if herr != nil && !isNotFound(herr) {
		return nil, nil, herr
	}
	eth, eerr := in.LinkByName("eth0")
	if eerr != nil && !isNotFound(eerr) {
		return nil, nil, eerr
	}
	if herr == nil && eerr == nil && host.Attrs().ParentIndex == eth.Attrs().Index && host.Type() == "veth" {
		return host, eth, nil
	}
	if herr == nil {
		if err := m.nl.LinkDel(host); err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, nil, fmt.Errorf("remove a half-made link: %w", err)
		}
	}
	if eth, eerr = in.LinkByName("eth0"); eerr == nil {
		if err := in.LinkDel(eth); err != nil && !errors.Is(err, unix.ENODEV) {
			return nil, nil, fmt.Errorf("remove a half-made eth0: %w", err)
		}
	}
	la := netlink.NewLinkAttrs()
	la.Name, la.MTU, la.HardwareAddr = name, w.mtu, GatewayMAC
	v := &netlink.Veth{
		LinkAttrs:        la,
		PeerName:         "eth0",
		PeerHardwareAddr: MAC(w.addr),
		PeerMTU:          uint32(w.mtu),
		PeerNamespace:    netlink.NsFd(int(ns.Fd())),
	}
	if err := m.nl.LinkAdd(v); err != nil {
		return nil, nil, fmt.Errorf("make veth %s: %w", name, err)
	}
	if host, err = m.nl.LinkByName(name); err != nil {
		return nil, nil, err
	}
	if eth, err = in.LinkByName("eth0"); err != nil {
		return nil, nil, err
	}
	if err := settings(name); err != nil {
		return nil, nil, err
	}
	m.newMu.Lock()
	m.new[id] = newPair{host.Attrs().Index, w.addr, w.mtu}
	m.newMu.Unlock()
	return host, eth, nil
}

// newPair is a pair that this process has made and nobody has used yet: it has what
// it was made with and nothing else, and need not be asked.
type newPair struct {
	index int // of the host's end
	addr  netip.Addr
	mtu   int
}

// untouched tells, once, that a link is as pair made it, and made for w.
func (m *Manager) untouched(id string, host netlink.Link, w wanted) bool {
	m.newMu.Lock()
	defer m.newMu.Unlock()
	p, ok := m.new[id]
	delete(m.new, id)
	return ok && p == newPair{host.Attrs().Index, w.addr, w.mtu}
}

// container programs eth0 in the container's namespace.
func container(in *netlink.Handle, eth netlink.Link, w wanted, fresh bool) error {
	var addrs []netlink.Addr
	if !fresh {
		if err := common(in, eth, MAC(w.addr), w.mtu); err != nil {
			return fmt.Errorf("eth0: %w", err)
		}
		var err error
		if addrs, err = Dump(func() ([]netlink.Addr, error) { return in.AddrList(eth, unix.AF_INET) }); err != nil {
			return fmt.Errorf("addresses of eth0: %w", err)
		}
	}
	has := map[string]bool{}
	for i := range addrs {
		if addrs[i].IPNet != nil && w.has(addrs[i].IPNet.String()) {
			has[addrs[i].IPNet.String()] = true
			continue
		}
		if err := in.AddrDel(eth, &addrs[i]); err != nil {
			return fmt.Errorf("remove %s from eth0: %w", addrs[i].IPNet, err)
		}
	}
	for _, a := range w.addrs {
		if !has[a.ip.String()+"/32"] {
			if err := in.AddrAdd(eth, &netlink.Addr{IPNet: host32(a.ip)}); err != nil {
				return fmt.Errorf("address %s: %w", a.ip, err)
			}
		}
	}
	if err := in.LinkSetUp(eth); err != nil {
		return fmt.Errorf("eth0 up: %w", err)
	}
	if err := pin(in, eth, w.gw, GatewayMAC); err != nil {
		return err
	}
	if err := in.RouteReplace(w.route(eth, netip.PrefixFrom(netip.IPv4Unspecified(), 0), w.source)); err != nil {
		return fmt.Errorf("default route: %w", err)
	}
	return sources(in, eth, w, fresh)
}

// route leads to dst by the gateway, as src.
func (w wanted) route(eth netlink.Link, dst netip.Prefix, src netip.Addr) *netlink.Route {
	return &netlink.Route{LinkIndex: eth.Attrs().Index, Dst: ipNet(dst), Gw: w.gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK), Src: src.AsSlice()}
}

// sources makes a container use, towards each of its networks, its address there. One
// whose only network the default route serves as well needs none of it.
func sources(in *netlink.Handle, eth netlink.Link, w wanted, fresh bool) error {
	keep := map[string]bool{"0.0.0.0/0": true}
	for _, a := range w.addrs {
		if !a.net.IsValid() || a.ip == w.source {
			continue
		}
		keep[a.net.String()] = true
		if err := in.RouteReplace(w.route(eth, a.net, a.ip)); err != nil {
			return fmt.Errorf("route to network %s: %w", a.net, err)
		}
	}
	if fresh {
		return nil
	}
	routes, err := Dump(func() ([]netlink.Route, error) {
		return in.RouteListFiltered(unix.AF_INET, &netlink.Route{LinkIndex: eth.Attrs().Index}, netlink.RT_FILTER_OIF)
	})
	if err != nil {
		return fmt.Errorf("routes of eth0: %w", err)
	}
	for i := range routes {
		if d := routes[i].Dst; d != nil && routes[i].Gw.Equal(w.gw.AsSlice()) && !keep[d.String()] {
			if err := in.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route %s: %w", d, err)
			}
		}
	}
	return nil
}

// settings makes this kernel's end a router's port.
func settings(name string) error {
	for _, kv := range [][2]string{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/rp_filter", "1"},
		{"ipv4/conf/" + name + "/proxy_arp", "1"},
		{"ipv4/conf/" + name + "/send_redirects", "0"},
		{"ipv4/conf/" + name + "/accept_redirects", "0"},
		{"ipv4/neigh/" + name + "/proxy_delay", "0"},
	} {
		if err := sysctl(kv[0], kv[1]); err != nil && !(errors.Is(err, os.ErrNotExist) && kv[0][:4] == "ipv6") {
			return err
		}
	}
	return forwarding()
}

// kernel programs this kernel's end.
func (m *Manager) kernel(host netlink.Link, w wanted, fresh bool) error {
	name := host.Attrs().Name
	if !fresh { // before it is up: no packet passes unfiltered, no IPv6 address appears
		if err := common(m.nl, host, GatewayMAC, w.mtu); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := settings(name); err != nil {
			return err
		}
	}
	if err := m.nl.LinkSetUp(host); err != nil {
		return fmt.Errorf("%s up: %w", name, err)
	}
	for _, a := range w.addrs {
		if err := pin(m.nl, host, a.ip, MAC(w.addr)); err != nil {
			return err
		}
	}
	// An address that this link had before must not keep its route.
	var routes []netlink.Route
	if !fresh {
		var err error
		if routes, err = Dump(func() ([]netlink.Route, error) {
			return m.nl.RouteListFiltered(unix.AF_INET, &netlink.Route{LinkIndex: host.Attrs().Index}, netlink.RT_FILTER_OIF)
		}); err != nil {
			return fmt.Errorf("routes of %s: %w", name, err)
		}
	}
	for i := range routes {
		if d := routes[i].Dst; d != nil && !w.has(d.String()) {
			if err := m.nl.RouteDel(&routes[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route %s: %w", d, err)
			}
		}
	}
	for _, a := range w.addrs {
		if err := m.nl.RouteReplace(&netlink.Route{LinkIndex: host.Attrs().Index, Dst: host32(a.ip), Scope: netlink.SCOPE_LINK}); err != nil {
			return fmt.Errorf("route to %s: %w", a.ip, err)
		}
	}
	return nil
}

// Dump asks the kernel for a list until it gets one that did not change while it
// was read; after ten tries the last will do.
func Dump[T any](list func() (T, error)) (T, error) {
	for range 9 {
		l, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
	l, err := list()
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		err = nil
	}
	return l, err
}

// common sets what both ends have.
func common(h *netlink.Handle, l netlink.Link, mac net.HardwareAddr, mtu int) error {
	if !bytes.Equal(l.Attrs().HardwareAddr, mac) {
		if err := h.LinkSetHardwareAddr(l, mac); err != nil {
			return fmt.Errorf("hardware address: %w", err)
		}
	}
	if l.Attrs().MTU != mtu {
		if err := h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("mtu %d: %w", mtu, err)
		}
	}
	return nil
}

// pin makes a neighbour permanent, so that nothing waits for ARP.
func pin(h *netlink.Handle, l netlink.Link, ip netip.Addr, mac net.HardwareAddr) error {
	if err := h.NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: mac,
	}); err != nil {
		return fmt.Errorf("neighbour %s: %w", ip, err)
	}
	return nil
}

// forwarding turns the kernel into a router, if it is not one. Writing it resets
// other settings of all interfaces: only when needed.
func forwarding() error {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err == nil && len(b) > 0 && b[0] == '1' {
		return nil
	}
	return sysctl("ipv4/ip_forward", "1")
}

func host32(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, 32)) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
