package endpoint

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link makes the veth pair and everything on it what w says. Every step is
// idempotent; a pair of which one end is missing or wrong is made anew.
func (m *Manager) link(id, path string, w wanted) error {
	if p := m.take(id, path, w); p != nil {
		err := m.program(id, p, w)
		p.in.Close()
		if err == nil {
			return nil
		}
		// Somebody has changed it meanwhile: look what is there.
	}
	p, err := m.open(id, path, w)
	if err != nil {
		return err
	}
	defer p.in.Close()
	return m.program(id, p, w)
}

func (m *Manager) program(id string, p *pair, w wanted) error {
	if err := container(p.in, p.eth, w, p.fresh); err != nil {
		return err
	}
	return m.apart.around(id, w, func() error { return m.kernel(p.host, w, p.fresh) })
}

// pair is both ends of a link.
type pair struct {
	in        *netlink.Handle // in the container's namespace
	host, eth netlink.Link
	// fresh: this process has made it, and nobody has used it yet. It has what it was
	// made with and nothing else, and need not be asked.
	fresh bool
	addr  netip.Addr // what it was made for
	mtu   int
	ns    unix.Stat_t // the container's namespace
	timer *time.Timer
}

// open makes the veth pair, if need be, and a socket in the container's namespace.
func (m *Manager) open(id, path string, w wanted) (*pair, error) {
	ns, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	p := &pair{addr: w.addr, mtu: w.mtu}
	if err := unix.Fstat(int(ns.Fd()), &p.ns); err != nil {
		return nil, fmt.Errorf("stat its namespace: %w", err)
	}
	if p.in, err = handleIn(ns); err != nil {
		return nil, fmt.Errorf("netlink in its namespace: %w", err)
	}
	if err := m.pair(id, ns, p, w); err != nil {
		p.in.Close()
		return nil, err
	}
	return p, nil
}

// keepFor is how long a prepared pair is kept open for its Setup, which mostly comes
// at once. Later the Setup looks at what is there.
const keepFor = 10 * time.Second

// keep keeps a fresh pair for the container's Setup.
func (m *Manager) keep(id string, p *pair) {
	m.keptMu.Lock()
	defer m.keptMu.Unlock()
	m.dropLocked(id)
	if !p.fresh {
		p.in.Close()
		return
	}
	m.kept[id] = p
	p.timer = time.AfterFunc(keepFor, func() {
		m.keptMu.Lock()
		defer m.keptMu.Unlock()
		if m.kept[id] == p {
			m.dropLocked(id)
		}
	})
}

func (m *Manager) dropLocked(id string) {
	if p := m.kept[id]; p != nil {
		delete(m.kept, id)
		p.timer.Stop()
		p.in.Close()
	}
}

// take returns, once, the pair that was kept, if it was made for w and path is still
// its namespace.
func (m *Manager) take(id, path string, w wanted) *pair {
	m.keptMu.Lock()
	defer m.keptMu.Unlock()
	p := m.kept[id]
	if p == nil {
		return nil
	}
	var now unix.Stat_t
	if err := unix.Stat(path, &now); err != nil || now.Ino != p.ns.Ino || now.Dev != p.ns.Dev || p.addr != w.addr || p.mtu != w.mtu {
		m.dropLocked(id)
		return nil
	}
	delete(m.kept, id)
	p.timer.Stop()
	return p
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

// pair finds both ends, or makes them.
func (m *Manager) pair(id string, ns *os.File, p *pair, w wanted) (err error) {
	name := m.HostName(id)
	host, herr := m.nl.LinkByName(name)
	if herr != nil && !isNotFound(herr) {
		return herr
	}
	eth, eerr := p.in.LinkByName("eth0")
	if eerr != nil && !isNotFound(eerr) {
		return eerr
	}
	if herr == nil && eerr == nil && host.Attrs().ParentIndex == eth.Attrs().Index && host.Type() == "veth" {
		p.host, p.eth = host, eth
		return nil
	}
	if herr == nil {
		if err := m.nl.LinkDel(host); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove a half-made link: %w", err)
		}
	}
	if eth, eerr = p.in.LinkByName("eth0"); eerr == nil {
		if err := p.in.LinkDel(eth); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove a half-made eth0: %w", err)
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
		return fmt.Errorf("make veth %s: %w", name, err)
	}
	if p.host, err = m.nl.LinkByName(name); err != nil {
		return err
	}
	if p.eth, err = p.in.LinkByName("eth0"); err != nil {
		return err
	}
	if err := m.settle(p.host); err != nil {
		return err
	}
	p.fresh = true
	return nil
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

// kernel programs this kernel's end.
func (m *Manager) kernel(host netlink.Link, w wanted, fresh bool) error {
	name := host.Attrs().Name
	if !fresh { // before it is up: no packet passes unfiltered, no IPv6 address appears
		if err := common(m.nl, host, GatewayMAC, w.mtu); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := m.settings(name); err != nil {
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

func host32(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, 32)) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
