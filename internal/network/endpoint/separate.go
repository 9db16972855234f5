package endpoint

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Policy rules, which every kernel has built in, keep the networks of one kernel
// apart. For networks A and B:
//
//	1174: from A to A lookup main      1175: from A lookup 1174
//	1174: from B to B lookup main      1175: from B lookup 1174
//	table 1174: prohibit A; prohibit B
//
// What a network's containers send to their own network, and to what is no network
// of this kernel (the way out), goes on as without rules; what they send to another
// network's address is refused. What comes from outside all networks passes: the
// host has judged it.
const (
	ownRule    = 1174
	otherRule  = 1175
	otherTable = 1174
	// borderProtocol marks routes and rules that are made here.
	borderProtocol = 0x76
)

// borders are the networks that a kernel keeps apart. Its state is in the kernel;
// known only saves asking again. The nil *borders separates nothing.
type borders struct {
	nl     *netlink.Handle
	prefix string // of containers' links

	// Who makes links has a share of it: forget sees either no rule or also the
	// route that it is for.
	links sync.RWMutex
	mu    sync.Mutex
	known map[netip.Prefix]map[string]bool // by whom it is used, as far as this process knows
}

// around separates w's networks from all others, then has its link made.
func (b *borders) around(id string, w wanted, link func() error) error {
	if b == nil {
		return link()
	}
	b.links.RLock()
	defer b.links.RUnlock()
	for _, a := range w.addrs {
		if a.net.IsValid() {
			if err := b.add(id, a.net); err != nil {
				return fmt.Errorf("border of network %s: %w", a.net, err)
			}
		}
	}
	return link()
}

func (b *borders) add(id string, p netip.Prefix) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.known[p] != nil {
		b.known[p][id] = true
		return nil
	}
	// First, so that forget finds what is half done. Its own traffic's rule is next:
	// at no moment is that refused.
	if err := b.nl.RouteReplace(refusal(p)); err != nil {
		return err
	}
	for _, r := range border(p) {
		if err := b.nl.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	b.known[p] = map[string]bool{id: true}
	return nil
}

// forget takes a container out of its networks, after its link has gone, and removes
// the borders of networks that no container of this kernel is in any more: their
// addresses may be another network's one day.
func (b *borders) forget(id string) error {
	if b == nil || !b.last(id) {
		return nil
	}
	b.links.Lock()
	defer b.links.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	refused, err := Dump(func() ([]netlink.Route, error) {
		return b.nl.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: otherTable}, netlink.RT_FILTER_TABLE)
	})
	if err != nil || len(refused) == 0 {
		return err
	}
	live, err := b.live()
	if err != nil {
		return err
	}
	for i := range refused {
		p := prefixOf(&refused[i])
		if !p.IsValid() || containsAny(p, live) {
			continue
		}
		delete(b.known, p)
		rules := border(p)
		for i := range rules { // the other way round
			if err := b.nl.RuleDel(rules[len(rules)-1-i]); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		// Last: what is left by a kill is found by it.
		if err := b.nl.RouteDel(refusal(p)); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// last tells whether a network may have lost its last container with this one: of
// containers that an earlier process made nothing is known.
func (b *borders) last(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	seen, empty := false, false
	for _, ids := range b.known {
		if ids[id] {
			delete(ids, id)
			seen, empty = true, empty || len(ids) == 0
		}
	}
	return empty || !seen
}

// live are the addresses of all containers that have a link.
func (b *borders) live() ([]netip.Addr, error) {
	links, err := Dump(b.nl.LinkList)
	if err != nil {
		return nil, err
	}
	ours := map[int]bool{}
	for _, l := range links {
		ours[l.Attrs().Index] = strings.HasPrefix(l.Attrs().Name, b.prefix)
	}
	routes, err := Dump(func() ([]netlink.Route, error) {
		return b.nl.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for i := range routes {
		if p := prefixOf(&routes[i]); p.IsValid() && ours[routes[i].LinkIndex] {
			out = append(out, p.Addr())
		}
	}
	return out, nil
}

func border(p netip.Prefix) []*netlink.Rule {
	own, other := netlink.NewRule(), netlink.NewRule()
	own.Family, own.Priority, own.Src, own.Dst, own.Table = unix.AF_INET, ownRule, ipNet(p), ipNet(p), unix.RT_TABLE_MAIN
	other.Family, other.Priority, other.Src, other.Table = unix.AF_INET, otherRule, ipNet(p), otherTable
	own.Protocol, other.Protocol = borderProtocol, borderProtocol
	return []*netlink.Rule{own, other}
}

func refusal(p netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(p), Type: unix.RTN_PROHIBIT, Table: otherTable, Protocol: borderProtocol}
}

func prefixOf(r *netlink.Route) netip.Prefix {
	if r.Dst == nil {
		return netip.Prefix{}
	}
	a, ok := netip.AddrFromSlice(r.Dst.IP.To4())
	bits, _ := r.Dst.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, bits)
}

func containsAny(p netip.Prefix, list []netip.Addr) bool {
	for _, a := range list {
		if p.Contains(a) {
			return true
		}
	}
	return false
}
