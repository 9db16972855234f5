package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tandem/internal/network/endpoint"
)

// forget deletes tracked connections that the rules would not allow any more:
// the kernel consults rules for a connection's first packet only. Without this a
// client of a vanished backend would hang instead of getting a reset or another
// backend.
func (h *Host) forget(w *wanted, s sweep) error {
	if !s.all && len(s.udp) == 0 {
		return nil
	}
	f := &staleFlows{w: w, sweep: s, targets: map[flowTarget]bool{}, local: map[netip.Addr]bool{}}
	for k, bs := range w.services {
		for _, b := range bs {
			f.targets[flowTarget{k.proto, k.port, b}] = true
		}
	}
	as, err := endpoint.Dump(func() ([]netlink.Addr, error) { return h.nl.AddrList(nil, unix.AF_INET) })
	if err != nil {
		return fmt.Errorf("addresses of this host: %w", err)
	}
	for _, a := range as {
		f.local[addrOf(a.IP)] = true
	}
	for try := 0; ; try++ {
		n, err := h.nl.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, f)
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 5 {
			continue
		}
		if n > 0 {
			h.log.Info("stale connections reset", "count", n)
		}
		return err
	}
}

// flowTarget is where a published port's connection may lead.
type flowTarget struct {
	proto   uint8
	port    uint16 // that the client asked for
	backend netip.AddrPort
}

type staleFlows struct {
	w       *wanted
	sweep   sweep
	targets map[flowTarget]bool
	local   map[netip.Addr]bool
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f *staleFlows) MatchConntrackFlow(c *netlink.ConntrackFlow) bool {
	proto := c.Forward.Protocol
	src, asked, real := addrOf(c.Forward.SrcIP), addrOf(c.Forward.DstIP), addrOf(c.Reverse.SrcIP)
	if !asked.IsValid() || !real.IsValid() {
		return false
	}
	if asked != real { // somebody's destination NAT; ours if it leads into our networks
		return f.sweep.all && f.net(real) != nil &&
			!f.targets[flowTarget{proto, c.Forward.DstPort, netip.AddrPortFrom(real, c.Reverse.SrcPort)}]
	}
	if proto == unix.IPPROTO_UDP && f.local[asked] {
		return f.sweep.udp[svcKey{proto, netip.IPv4Unspecified(), c.Forward.DstPort}] ||
			f.sweep.udp[svcKey{proto, asked, c.Forward.DstPort}]
	}
	from := f.net(src)
	if !f.sweep.all || from == nil {
		return false
	}
	if to := f.net(real); to != nil {
		return !slices.ContainsFunc(f.w.pairs, func(p [2]netip.Prefix) bool {
			return p[0] == from.cidr && p[1] == to.cidr
		})
	}
	return from.internal && !f.local[real]
}

func (f *staleFlows) net(a netip.Addr) *netSpec {
	for i := range f.w.nets {
		if f.w.nets[i].cidr.Contains(a) {
			return &f.w.nets[i]
		}
	}
	return nil
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
