package control

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// blockBits is how long a machine's prefix is: 16 addresses.
const blockBits = 28

// ipam knows which addresses and blocks are in use. Built from one snapshot, it
// answers for the transaction that is being put together.
type ipam struct {
	used   map[netip.Addr]bool
	blocks map[netip.Prefix]string // block -> machine id; "metal" when single addresses are used
}

const metalBlock = "metal"

// newIPAM starts from what containers and machines have; further addresses are in
// use by somebody of whom nothing else is known.
func newIPAM(containers []*v1.Container, machines []*v1.Machine, further ...string) *ipam {
	p := &ipam{used: map[netip.Addr]bool{}, blocks: map[netip.Prefix]string{}}
	for _, m := range machines {
		for _, s := range m.Prefixes {
			if b, err := netip.ParsePrefix(s); err == nil {
				p.blocks[b.Masked()] = m.Meta.Id
			}
		}
	}
	use := func(ip, owner string) {
		a, err := netip.ParseAddr(ip)
		if err != nil || !a.Is4() {
			return
		}
		p.used[a] = true
		b := netip.PrefixFrom(a, blockBits).Masked()
		if p.blocks[b] == "" {
			p.blocks[b] = owner
		}
	}
	for _, c := range containers {
		if id := c.GetAssignment().GetMachineId(); id != "" {
			for _, a := range addresses(c) {
				use(a.Ip, id) // also if the machine is unknown: it is no metal block
			}
		}
	}
	for _, c := range containers {
		for _, a := range addresses(c) {
			use(a.Ip, metalBlock)
		}
	}
	for _, ip := range further {
		use(ip, "unknown") // a machine may own the whole block
	}
	return p
}

// usable leaves out addresses that some programs take for a network's or a
// broadcast.
func usable(a netip.Addr) bool { last := a.As4()[3]; return last != 0 && last != 255 }

// pick finds an address for a container in network n, in machine m (nil: metal).
// A new block is added to m.Prefixes. fixed is the address asked for, or "".
func (p *ipam) pick(n *v1.Network, m *v1.Machine, fixed string) (string, error) {
	cidr, err := netip.ParsePrefix(n.Cidr)
	if err != nil {
		return "", fmt.Errorf("network %s has no address range: %w", n.Meta.Name, errdefs.ErrFailedPrecondition)
	}
	owner := metalBlock
	if m != nil {
		owner = m.Meta.Id
	}
	take := func(a netip.Addr, b netip.Prefix) string {
		p.used[a] = true
		if p.blocks[b] == "" {
			p.blocks[b] = owner
			if m != nil {
				m.Prefixes = append(m.Prefixes, b.String())
			}
		}
		return a.String()
	}
	if fixed != "" {
		a, err := netip.ParseAddr(fixed)
		b := netip.PrefixFrom(a, blockBits).Masked()
		switch {
		case err != nil || !cidr.Contains(a):
			return "", fmt.Errorf("address %s is not in network %s (%s): %w", fixed, n.Meta.Name, cidr, errdefs.ErrInvalidArgument)
		case p.used[a]:
			return "", fmt.Errorf("address %s is in use: %w", fixed, errdefs.ErrAlreadyExists)
		case p.blocks[b] != "" && p.blocks[b] != owner:
			return "", fmt.Errorf("address %s belongs to a block of another machine (%s): choose one of another block of 16: %w", fixed, b, errdefs.ErrFailedPrecondition)
		}
		return take(a, b), nil
	}
	if m != nil {
		for _, s := range m.Prefixes {
			b, err := netip.ParsePrefix(s)
			if err != nil || !cidr.Overlaps(b) {
				continue
			}
			if a, ok := p.free(b); ok {
				return take(a, b), nil
			}
		}
	}
	// Machines take blocks from the bottom, metal from the top.
	var found netip.Prefix
	for b := netip.PrefixFrom(cidr.Addr(), blockBits); cidr.Contains(b.Addr()); b = netip.PrefixFrom(nextBlock(b), blockBits) {
		who := p.blocks[b]
		if who != "" && (m != nil || who != metalBlock) {
			continue
		}
		if _, ok := p.free(b); ok {
			found = b
			if m != nil {
				break
			}
		}
	}
	if !found.IsValid() {
		return "", fmt.Errorf("network %s (%s) has no free addresses: use another network for some services: %w", n.Meta.Name, cidr, errdefs.ErrResourceExhausted)
	}
	a, _ := p.free(found)
	return take(a, found), nil
}

// addresses are all that a container has, the first first. Records of older versions
// name one only.
func addresses(c *v1.Container) []*v1.NetworkAddress {
	a := c.GetAssignment()
	if len(a.GetAddresses()) > 0 || a.GetIp() == "" {
		return a.GetAddresses()
	}
	return []*v1.NetworkAddress{{NetworkId: a.NetworkId, Ip: a.Ip}}
}

// addressIn is a container's address in a network, or "". A container that was
// placed by an older version has one address for all its networks.
func addressIn(c *v1.Container, networkID string) string {
	a := c.GetAssignment()
	if len(a.GetAddresses()) == 0 {
		return a.GetIp()
	}
	for _, x := range a.Addresses {
		if x.NetworkId == networkID {
			return x.Ip
		}
	}
	return ""
}

func (p *ipam) free(b netip.Prefix) (netip.Addr, bool) {
	for a := b.Addr(); b.Contains(a); a = a.Next() {
		if usable(a) && !p.used[a] {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func nextBlock(b netip.Prefix) netip.Addr {
	a := b.Addr()
	for range 1 << (32 - blockBits) {
		a = a.Next()
	}
	return a
}

// Carver hands out address ranges for new networks. Make one for each transaction.
type Carver struct {
	cluster netip.Prefix
	bits    int
	used    []netip.Prefix
	broken  error // why none may be given out
}

// Carver starts from the networks that are there, also of those whose record
// can't be read any more.
func (c *Controller) Carver(snap *store.Snapshot) *Carver {
	k := &Carver{cluster: c.opts.ClusterCIDR, bits: c.opts.NetworkBits}
	last, all := store.LastOf[*v1.Network](snap)
	if !all {
		k.broken = unknown(snap, store.Networks, "range")
	}
	for _, n := range append(slices.Clip(snap.Networks), last...) {
		if p, err := netip.ParsePrefix(n.Cidr); err == nil {
			k.used = append(k.used, p)
		}
	}
	return k
}

// Take finds a range; want is the one asked for, or "".
func (k *Carver) Take(want string) (string, error) {
	if k.broken != nil {
		return "", k.broken
	}
	if want != "" {
		p, err := netip.ParsePrefix(want)
		if err != nil || !p.Addr().Is4() || p.Bits() > blockBits || p.Bits() < 8 || !p.Addr().IsPrivate() {
			return "", fmt.Errorf("%q is not a private IPv4 range between /8 and /%d: %w", want, blockBits, errdefs.ErrInvalidArgument)
		}
		p = p.Masked()
		for _, u := range k.used {
			if u.Overlaps(p) {
				return "", fmt.Errorf("range %s overlaps %s of another network: %w", p, u, errdefs.ErrAlreadyExists)
			}
		}
		k.used = append(k.used, p)
		return p.String(), nil
	}
	used := make(map[netip.Prefix]bool)
	var odd []netip.Prefix
	for _, u := range k.used {
		if u.Bits() == k.bits {
			used[u] = true
		} else {
			odd = append(odd, u)
		}
	}
next:
	for p := netip.PrefixFrom(k.cluster.Addr(), k.bits); k.cluster.Contains(p.Addr()); p = netip.PrefixFrom(after(p), k.bits) {
		if used[p] {
			continue
		}
		for _, u := range odd {
			if u.Overlaps(p) {
				continue next
			}
		}
		k.used = append(k.used, p)
		return p.String(), nil
	}
	return "", fmt.Errorf("the cluster's range %s is used up: remove projects, or start with a larger one: %w", k.cluster, errdefs.ErrResourceExhausted)
}

func after(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	n := uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3])
	n += 1 << (32 - p.Bits())
	if n > 0xffffffff {
		return netip.Addr{}
	}
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}
