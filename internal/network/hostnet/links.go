package hostnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tandem/internal/network/endpoint"
)

// routeProtocol marks routes that this package made (rtm_protocol).
const routeProtocol = 0x74

// nextHop is a neighbour that exists only by a pinned entry on each tap, with the
// machine's MAC: prefixes are routed through it, so that the host never asks a
// guest for ARP, however large a prefix is.
var nextHop = netip.MustParseAddr("169.254.1.2")

// links are the interfaces of ours that exist, by name.
type links map[string]netlink.Link

// base sets up what all links share.
func (h *Host) base() error {
	lo, err := h.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp == 0 {
		if err := h.nl.LinkSetUp(lo); err != nil {
			return fmt.Errorf("lo up: %w", err)
		}
	}
	has, err := h.hasGateway(lo)
	if err != nil {
		return err
	}
	if !has {
		a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gateway, 32)), Scope: unix.RT_SCOPE_LINK}
		if err := h.nl.AddrAdd(lo, a); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("gateway address %s on lo: %w", gateway, err)
		}
	}
	// Writing it resets other settings of all interfaces: only when needed.
	return setSysctl("ipv4/ip_forward", "1")
}

func (h *Host) hasGateway(lo netlink.Link) (bool, error) {
	as, err := endpoint.Dump(func() ([]netlink.Addr, error) { return h.nl.AddrList(lo, unix.AF_INET) })
	if err != nil {
		return false, fmt.Errorf("addresses of lo: %w", err)
	}
	for _, a := range as {
		if a.IP.Equal(gateway.AsSlice()) {
			return true, nil
		}
	}
	return false, nil
}

func (h *Host) removeGateway() error {
	lo, err := h.nl.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo: %w", err)
	}
	has, err := h.hasGateway(lo)
	if err != nil || !has {
		return err
	}
	if err := h.nl.AddrDel(lo, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gateway, 32))}); err != nil {
		return fmt.Errorf("remove %s from lo: %w", gateway, err)
	}
	return nil
}

// list finds our interfaces, by pattern and type: another program's interface
// that happens to begin with our prefix is left alone.
func (h *Host) list() (links, error) {
	all, err := endpoint.Dump(h.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	re := regexp.MustCompile(`^` + h.o.Prefix + `([tv])[a-z2-7]{10}$`)
	out := links{}
	for _, l := range all {
		m := re.FindStringSubmatch(l.Attrs().Name)
		if m != nil && (m[1] == "t" && l.Type() == "tuntap" || m[1] == "v" && l.Type() == "veth") {
			out[l.Attrs().Name] = l
		}
	}
	return out, nil
}

// ensureTaps makes taps that are missing, and leaves new ones down: their filter
// comes first.
func (h *Host) ensureTaps(w *wanted) (links, error) {
	ls, err := h.list()
	if err != nil {
		return nil, err
	}
	for _, t := range w.taps {
		if ls[t.name] == nil {
			l, err := h.makeTap(t)
			if err != nil {
				return nil, err
			}
			ls[t.name] = l
		}
		if err := h.tuneTap(ls[t.name], t); err != nil {
			return nil, err
		}
	}
	// So that replies to 127.0.0.1 find their way; see the rule "loopback" too. Links
	// that are made later have it from the beginning (endpoint.Options.RouteLocalnet).
	for _, v := range w.veths {
		if ls[v.name] != nil {
			if err := setSysctl("ipv4/conf/"+v.name+"/route_localnet", "1"); err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, err
			}
		}
	}
	return ls, nil
}

func (h *Host) makeTap(t tapSpec) (netlink.Link, error) {
	la := netlink.NewLinkAttrs()
	la.Name = t.name
	tap := &netlink.Tuntap{
		LinkAttrs: la,
		Mode:      netlink.TUNTAP_MODE_TAP,
		Flags:     netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE | netlink.TUNTAP_TUN_EXCL,
		Owner:     h.o.TapOwner,
		Group:     h.o.TapGroup,
	}
	if err := h.nl.LinkAdd(tap); err != nil {
		if errors.Is(err, unix.EBUSY) || strings.Contains(err.Error(), "busy") {
			return nil, fmt.Errorf("tap %s of machine %s: an interface of that name is not ours; rename or remove it: %w", t.name, t.machine, errdefs.ErrAlreadyExists)
		}
		return nil, fmt.Errorf("make tap %s of machine %s (is /dev/net/tun there?): %w", t.name, t.machine, err)
	}
	l, err := h.nl.LinkByName(t.name)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", t.name, err)
	}
	return l, nil
}

func (h *Host) tuneTap(l netlink.Link, t tapSpec) error {
	if !bytes.Equal(l.Attrs().HardwareAddr, endpoint.GatewayMAC) {
		if err := h.nl.LinkSetHardwareAddr(l, endpoint.GatewayMAC); err != nil {
			return fmt.Errorf("tap %s: hardware address: %w", t.name, err)
		}
	}
	if l.Attrs().MTU != t.mtu {
		if err := h.nl.LinkSetMTU(l, t.mtu); err != nil {
			return fmt.Errorf("tap %s: mtu %d: %w", t.name, t.mtu, err)
		}
	}
	if l.Attrs().Flags&net.FlagUp != 0 {
		return nil // its settings were made before it came up
	}
	for _, kv := range [][2]string{
		{"ipv6/conf/" + t.name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + t.name + "/rp_filter", "1"},
		{"ipv4/conf/" + t.name + "/proxy_arp", "1"},
		{"ipv4/conf/" + t.name + "/route_localnet", "1"},
		{"ipv4/conf/" + t.name + "/send_redirects", "0"},
		{"ipv4/conf/" + t.name + "/accept_redirects", "0"},
		{"ipv4/conf/" + t.name + "/accept_source_route", "0"},
		{"ipv4/neigh/" + t.name + "/proxy_delay", "0"},
	} {
		err := setSysctl(kv[0], kv[1])
		if err != nil && !(errors.Is(err, os.ErrNotExist) && strings.HasPrefix(kv[0], "ipv6/")) {
			return err
		}
	}
	return nil
}

// route brings taps up and gives them exactly their prefixes. A prefix that moves
// from one tap to another is replaced in one step.
func (h *Host) route(w *wanted, ls links) error {
	have, err := endpoint.Dump(func() ([]netlink.Route, error) {
		return h.nl.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	type key struct {
		link int
		dst  string
	}
	ours := map[key]*netlink.Route{}
	foreign := map[string]int{}
	taps := map[int]bool{}
	for _, t := range w.taps {
		taps[ls[t.name].Attrs().Index] = true
	}
	known := map[int]bool{} // also taps that will go
	for _, l := range ls {
		known[l.Attrs().Index] = true
	}
	for i := range have {
		switch r := &have[i]; {
		case r.Dst == nil:
		case taps[r.LinkIndex]:
			ours[key{r.LinkIndex, r.Dst.String()}] = r
		case !known[r.LinkIndex]:
			foreign[r.Dst.String()] = r.LinkIndex
		}
	}
	neighs, err := h.neighbours(taps)
	if err != nil {
		return err
	}
	for _, t := range w.taps {
		l := ls[t.name]
		i := l.Attrs().Index
		if l.Attrs().Flags&net.FlagUp == 0 {
			if err := h.nl.LinkSetUp(l); err != nil {
				return fmt.Errorf("tap %s up: %w", t.name, err)
			}
		}
		if neighs[i] != t.mac.String() {
			if err := h.nl.NeighSet(&netlink.Neigh{
				LinkIndex: i, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
				IP: nextHop.AsSlice(), HardwareAddr: t.mac,
			}); err != nil {
				return fmt.Errorf("tap %s: neighbour: %w", t.name, err)
			}
		}
		for _, p := range t.prefixes {
			k := key{i, p.String()}
			if r := ours[k]; r != nil && r.Gw.Equal(nextHop.AsSlice()) {
				delete(ours, k)
				continue
			}
			if i, taken := foreign[p.String()]; taken {
				return fmt.Errorf("route %s to machine %s: another program (or another Tandem with the same address pool) routes it to interface %d: %w", p, t.machine, i, errdefs.ErrFailedPrecondition)
			}
			if err := h.nl.RouteReplace(&netlink.Route{
				LinkIndex: i, Dst: ipNet(p), Gw: nextHop.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
				Src: gateway.AsSlice(), Protocol: routeProtocol,
			}); err != nil {
				return fmt.Errorf("route %s to machine %s: %w", p, t.machine, err)
			}
			delete(ours, k)
		}
	}
	for k, r := range ours {
		if err := h.nl.RouteDel(r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove stale route %s: %w", k.dst, err)
		}
	}
	return nil
}

// neighbours are the MACs pinned on taps, by interface index.
func (h *Host) neighbours(taps map[int]bool) (map[int]string, error) {
	ns, err := endpoint.Dump(func() ([]netlink.Neigh, error) { return h.nl.NeighList(0, unix.AF_INET) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	out := map[int]string{}
	for _, n := range ns {
		if taps[n.LinkIndex] && n.State&netlink.NUD_PERMANENT != 0 && n.IP.Equal(nextHop.AsSlice()) {
			out[n.LinkIndex] = n.HardwareAddr.String()
		}
	}
	return out, nil
}

// removeStale removes taps of machines that are gone. Veths belong to the
// runtime, which removes them with their containers; until then the filter lets
// nothing of them through.
func (h *Host) removeStale(w *wanted, ls links) error {
	for _, t := range w.taps {
		delete(ls, t.name)
	}
	for name, l := range ls {
		if l.Type() != "tuntap" {
			continue
		}
		if err := h.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove stale tap %s: %w", name, err)
		}
	}
	return nil
}

// removeLinks removes every interface of ours.
func (h *Host) removeLinks() error {
	ls, err := h.list()
	if err != nil {
		return err
	}
	var errs []error
	for name, l := range ls {
		if err := h.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// setSysctl writes /proc/sys/net/key unless it says so already.
func setSysctl(key, value string) error {
	p := "/proc/sys/net/" + key
	if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == value {
		return nil
	}
	if err := os.WriteFile(p, []byte(value), 0); err != nil {
		return fmt.Errorf("sysctl net/%s=%s: %w", key, value, err)
	}
	return nil
}
