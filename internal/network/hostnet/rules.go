package hostnet

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The ruleset, in nft's words ("ours" are interfaces named tdt* and tdv*):
//
//	table netdev tandem {
//	  chain guard {                                     # what a machine may send
//	    ether type ip  iifname . ether saddr . ip saddr @src accept
//	    ether type arp arp op/htype/plen sane, ether saddr and sender MAC the tap's:
//	      iifname . arp saddr ether . arp saddr ip @src accept
//	      arp saddr ip 0.0.0.0 iifname . arp saddr ether @mac accept
//	    drop
//	  }
//	  chain <tap> { type filter hook ingress device <tap> priority -500; policy drop; jump guard }
//	}
//	table inet tandem {
//	  chain source   { type filter hook prerouting priority raw;
//	    iifname ours meta nfproto ipv6 drop
//	    iifname ours ip daddr 127.0.0.0/8 drop          # "loopback"
//	    iifname tdv* iifname . ether saddr . ip saddr != @veth drop }
//	  chain forward  { type filter hook forward priority filter;  iifname ours / oifname ours jump separate }
//	  chain separate {
//	    ct state invalid drop;  ct state established,related accept
//	    ip saddr . ip daddr @pairs accept               # own and allowed networks
//	    iifname ours ip saddr . internal @nets reject  # no way out
//	    ct status dnat accept                           # published ports
//	    oifname ours iifname ours reject;  oifname ours drop
//	    ip daddr . any @nets reject                     # nobody has that address
//	    ip saddr . egress @nets accept;  reject }
//	  chain input    { type filter hook input priority filter;  iifname ours jump host }
//	  chain host {
//	    ct state established,related accept
//	    ip daddr 169.254.1.1 udp/tcp dport 53 accept;  icmp type echo-request accept
//	    reject }
//	  chain pre/out  { type nat hook prerouting/output priority dstnat;
//	    (if another program has port 53: from ours to 169.254.1.1:53 dnat to our port)
//	    fib daddr type local, not the name server, 127.0.0.0/8 from lo only
//	    ip daddr . meta l4proto . th dport vmap @svcip  # one host address
//	    meta l4proto . th dport vmap @svc }             # any host address
//	  chain n_3      { dnat ip to numgen random mod 3 . meta l4proto . th dport map @be }
//	  chain m_3      { dnat ip to numgen random mod 3 . ip daddr . meta l4proto . th dport map @beip }
//	  chain post     { type nat hook postrouting priority srcnat;
//	    oifname ours ct status dnat ip saddr . any @nets snat to 169.254.1.1 # hairpin
//	    oifname ours ct status dnat ip saddr 127.0.0.0/8 snat to 169.254.1.1
//	    oifname != ours ip saddr . egress @nets ip daddr . any != @nets masquerade }
//	}

// First registers of 4 and of 16 bytes.
const (
	r4  = unix.NFT_REG32_00
	r16 = unix.NFT_REG_1
)

type rule []expr.Any

func rules(parts ...[]expr.Any) (out rule) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func iifPrefix(p string) []expr.Any { return ifPrefix(expr.MetaKeyIIFNAME, expr.CmpOpEq, p) }
func oifPrefix(p string) []expr.Any { return ifPrefix(expr.MetaKeyOIFNAME, expr.CmpOpEq, p) }
func oifNot(p string) []expr.Any    { return ifPrefix(expr.MetaKeyOIFNAME, expr.CmpOpNeq, p) }

func ifPrefix(k expr.MetaKey, op expr.CmpOp, p string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: k, Register: r16},
		&expr.Cmp{Op: op, Register: r16, Data: []byte(p)},
	}
}

func meta1(k expr.MetaKey, b byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: k, Register: r16},
		&expr.Cmp{Op: expr.CmpOpEq, Register: r16, Data: []byte{b}},
	}
}

func ipv4() []expr.Any { return meta1(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV4) }

// load puts packet bytes into a register.
func load(base expr.PayloadBase, off, n, reg uint32) *expr.Payload {
	return &expr.Payload{DestRegister: reg, Base: base, Offset: off, Len: n}
}

func bytesAre(base expr.PayloadBase, off uint32, data []byte) []expr.Any {
	return []expr.Any{
		load(base, off, uint32(len(data)), r16),
		&expr.Cmp{Op: expr.CmpOpEq, Register: r16, Data: data},
	}
}

const (
	offSaddr, offDaddr = 12, 16 // in an IPv4 header
)

func ipAddrIs(off uint32, a netip.Addr) []expr.Any {
	return bytesAre(expr.PayloadBaseNetworkHeader, off, a.AsSlice())
}

func loopback(off uint32, op expr.CmpOp) []expr.Any {
	return []expr.Any{
		load(expr.PayloadBaseNetworkHeader, off, 1, r16),
		&expr.Cmp{Op: op, Register: r16, Data: []byte{127}},
	}
}

func in(s *nftables.Set, reg uint32, invert bool) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, Invert: invert}
}

// ipIn matches addresses in (or, inverted, outside) our networks of a kind.
func (t *tables) ipIn(off uint32, k uint32, invert bool) []expr.Any {
	return []expr.Any{
		load(expr.PayloadBaseNetworkHeader, off, 4, r4),
		&expr.Immediate{Register: r4 + 1, Data: kind(k)},
		in(t.nets, r4, invert),
	}
}

func ctBits(k expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: k, Register: r16},
		&expr.Bitwise{SourceRegister: r16, DestRegister: r16, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: r16, Data: make([]byte, 4)},
	}
}

const dnatBit = 0x20 // IPS_DST_NAT

func dnatted() []expr.Any { return ctBits(expr.CtKeySTATUS, dnatBit) }

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }
func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func reject() []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

func snatToGateway() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: r16, Data: gateway.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r16},
	}
}

var (
	accept = verdict(expr.VerdictAccept)
	drop   = verdict(expr.VerdictDrop)
)

// guard is the netdev rules for what leaves a machine.
func (t *tables) guard() []rule {
	ifname := &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r4}
	arpBase := rules(
		etherType(unix.ETH_P_ARP),
		// Ethernet, IPv4, 6 and 4 bytes, request or reply.
		bytesAre(expr.PayloadBaseNetworkHeader, 0, []byte{0, 1, 8, 0, 6, 4, 0}),
		[]expr.Any{ifname, load(expr.PayloadBaseLLHeader, 6, 6, r4+4), in(t.mac, r4, false)},
	)
	return []rule{
		rules(etherType(unix.ETH_P_IP), []expr.Any{
			ifname,
			load(expr.PayloadBaseLLHeader, 6, 6, r4+4),
			load(expr.PayloadBaseNetworkHeader, offSaddr, 4, r4+6),
			in(t.src, r4, false),
		}, accept),
		rules(arpBase, []expr.Any{
			ifname,
			load(expr.PayloadBaseNetworkHeader, 8, 6, r4+4),
			load(expr.PayloadBaseNetworkHeader, 14, 4, r4+6),
			in(t.src, r4, false),
		}, accept),
		rules(arpBase, bytesAre(expr.PayloadBaseNetworkHeader, 14, make([]byte, 4)), []expr.Any{
			ifname, load(expr.PayloadBaseNetworkHeader, 8, 6, r4+4), in(t.mac, r4, false),
		}, accept),
		rules(drop),
	}
}

func etherType(t uint16) []expr.Any {
	return bytesAre(expr.PayloadBaseLLHeader, 12, binary.BigEndian.AppendUint16(nil, t))
}

// both repeats a rule for taps and veths.
func (t *tables) both(f func(prefix string) rule) []rule {
	return []rule{f(t.tapPrefix), f(t.vethPrefix)}
}

func (t *tables) sourceRules() []rule {
	out := t.both(func(p string) rule {
		return rules(iifPrefix(p), meta1(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6), drop)
	})
	out = append(out, t.both(func(p string) rule {
		return rules(iifPrefix(p), loopback(offDaddr, expr.CmpOpEq), drop)
	})...)
	return append(out, rules(iifPrefix(t.vethPrefix), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: r4},
		load(expr.PayloadBaseLLHeader, 6, 6, r4+4),
		load(expr.PayloadBaseNetworkHeader, offSaddr, 4, r4+6),
		in(t.veth, r4, true),
	}, drop))
}

func (t *tables) forwardRules() []rule {
	out := t.both(func(p string) rule { return rules(iifPrefix(p), jump("separate")) })
	return append(out, t.both(func(p string) rule { return rules(oifPrefix(p), jump("separate")) })...)
}

func (t *tables) separateRules() []rule {
	out := []rule{
		rules(ctBits(expr.CtKeySTATE, expr.CtStateBitINVALID), drop),
		rules(ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept),
		rules([]expr.Any{
			load(expr.PayloadBaseNetworkHeader, offSaddr, 4, r4),
			load(expr.PayloadBaseNetworkHeader, offDaddr, 4, r4+1),
			in(t.pairs, r4, false),
		}, accept),
	}
	out = append(out, t.both(func(p string) rule {
		return rules(iifPrefix(p), t.ipIn(offSaddr, internalNet, false), reject())
	})...)
	out = append(out, rules(dnatted(), accept))
	for _, o := range []string{t.tapPrefix, t.vethPrefix} {
		out = append(out, t.both(func(p string) rule { return rules(oifPrefix(o), iifPrefix(p), reject()) })...)
		out = append(out, rules(oifPrefix(o), drop))
	}
	return append(out,
		rules(t.ipIn(offDaddr, anyNet, false), reject()),
		rules(t.ipIn(offSaddr, egressNet, false), accept),
		rules(reject()),
	)
}

func (t *tables) inputRules() []rule {
	return t.both(func(p string) rule { return rules(iifPrefix(p), jump("host")) })
}

func (t *tables) hostRules() []rule {
	dns := func(proto byte) rule {
		return rules(ipAddrIs(offDaddr, gateway), meta1(expr.MetaKeyL4PROTO, proto),
			bytesAre(expr.PayloadBaseTransportHeader, 2, port(t.dnsPort)), accept)
	}
	return []rule{
		rules(ctBits(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), accept),
		dns(unix.IPPROTO_UDP), dns(unix.IPPROTO_TCP),
		rules(meta1(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMP), bytesAre(expr.PayloadBaseTransportHeader, 0, []byte{8}), accept),
		rules(reject()),
	}
}

func (t *tables) publishRules(pre bool) []rule {
	toNames := rules(ipv4(), ipAddrIs(offDaddr, gateway), bytesAre(expr.PayloadBaseTransportHeader, 2, port(dnsPort)))
	var out []rule
	if pre && t.dnsPort != dnsPort { // another program has port 53
		redirect := []expr.Any{
			&expr.Immediate{Register: r4, Data: gateway.AsSlice()},
			&expr.Immediate{Register: r4 + 1, Data: port(t.dnsPort)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r4, RegProtoMin: r4 + 1},
		}
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			proto := meta1(expr.MetaKeyL4PROTO, proto)
			out = append(out, t.both(func(p string) rule { return rules(iifPrefix(p), proto, toNames, redirect) })...)
		}
	}
	out = append(out, rules(toNames, verdict(expr.VerdictReturn)))
	if pre { // a packet from outside to 127.0.0.1 is nobody's
		out = append(out, rules(ipv4(), loopback(offDaddr, expr.CmpOpEq),
			ifPrefix(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "lo\x00"), verdict(expr.VerdictReturn)))
	}
	local := rules(ipv4(), []expr.Any{
		&expr.Fib{Register: r16, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: r16, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	})
	return append(out,
		rules(local, []expr.Any{
			load(expr.PayloadBaseNetworkHeader, offDaddr, 4, r4),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: r4 + 1},
			load(expr.PayloadBaseTransportHeader, 2, 2, r4+2),
			&expr.Lookup{SourceRegister: r4, SetName: t.svcIP.Name, SetID: t.svcIP.ID, DestRegister: 0, IsDestRegSet: true},
		}),
		rules(local, []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: r4},
			load(expr.PayloadBaseTransportHeader, 2, 2, r4+1),
			&expr.Lookup{SourceRegister: r4, SetName: t.svc.Name, SetID: t.svc.ID, DestRegister: 0, IsDestRegSet: true},
		}),
	)
}

// pickRule sends a connection to one of n backends.
func (t *tables) pickRule(n int, anyAddr bool) rule {
	out := rule{&expr.Numgen{Register: r4, Modulus: uint32(n), Type: unix.NFT_NG_RANDOM}}
	reg, set := uint32(r4+1), t.be
	if !anyAddr {
		set = t.beIP
		out = append(out, load(expr.PayloadBaseNetworkHeader, offDaddr, 4, reg))
		reg++
	}
	return append(out,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		load(expr.PayloadBaseTransportHeader, 2, 2, reg+1),
		&expr.Lookup{SourceRegister: r4, DestRegister: r4, SetName: set.Name, SetID: set.ID, IsDestRegSet: true},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: r4, RegProtoMin: r4 + 1},
	)
}

func (t *tables) postRules() []rule {
	out := t.both(func(p string) rule {
		return rules(ipv4(), oifPrefix(p), dnatted(), t.ipIn(offSaddr, anyNet, false), snatToGateway())
	})
	out = append(out, t.both(func(p string) rule {
		return rules(ipv4(), oifPrefix(p), dnatted(), loopback(offSaddr, expr.CmpOpEq), snatToGateway())
	})...)
	return append(out, rules(ipv4(), oifNot(t.tapPrefix), oifNot(t.vethPrefix),
		t.ipIn(offSaddr, egressNet, false), t.ipIn(offDaddr, anyNet, true), []expr.Any{&expr.Masq{}}))
}
