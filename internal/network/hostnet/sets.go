package hostnet

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"tandem/internal/network/endpoint"
)

// elements of one set, by key.
type elements map[string]nftables.SetElement

func (e elements) put(x nftables.SetElement) { e[string(x.Key)] = x }

// diff is what must go and what must come.
func (e elements) diff(next elements) (gone, fresh elements) {
	gone, fresh = elements{}, elements{}
	for k, x := range e {
		if y, ok := next[k]; !ok || !same(x, y) {
			gone[k] = x
		}
	}
	for k, y := range next {
		if x, ok := e[k]; !ok || !same(x, y) {
			fresh[k] = y
		}
	}
	return gone, fresh
}

func add(c *nftables.Conn, s *nftables.Set, e elements) error { return chunks(e, s, c.SetAddElements) }
func del(c *nftables.Conn, s *nftables.Set, e elements) error {
	return chunks(e, s, c.SetDeleteElements)
}

func chunks(e elements, s *nftables.Set, f func(*nftables.Set, []nftables.SetElement) error) error {
	buf := make([]nftables.SetElement, 0, elementsPerMessage)
	flush := func() error {
		if len(buf) == 0 {
			return nil
		}
		err := f(s, buf)
		buf = buf[:0]
		return err
	}
	for _, x := range e {
		if buf = append(buf, x); len(buf) == elementsPerMessage {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush()
}

// elements of all sets but the services'.
func (t *tables) elements(w *wanted) map[*nftables.Set]elements {
	out := map[*nftables.Set]elements{}
	for _, s := range t.sets() {
		out[s] = elements{}
	}
	for _, tap := range w.taps {
		out[t.mac].put(nftables.SetElement{Key: cat(ifname(tap.name), pad(tap.mac))})
		for _, p := range tap.prefixes {
			out[t.src].put(nftables.SetElement{
				Key:    cat(ifname(tap.name), pad(tap.mac), p.Addr().AsSlice()),
				KeyEnd: cat(ifname(tap.name), pad(tap.mac), last(p).AsSlice()),
			})
		}
	}
	for _, v := range w.veths {
		for _, ip := range append([]netip.Addr{v.ip}, v.further...) {
			out[t.veth].put(nftables.SetElement{Key: cat(ifname(v.name), pad(endpoint.MAC(v.ip)), ip.AsSlice())})
		}
	}
	for _, p := range w.pairs {
		out[t.pairs].put(nftables.SetElement{
			Key:    cat(p[0].Addr().AsSlice(), p[1].Addr().AsSlice()),
			KeyEnd: cat(last(p[0]).AsSlice(), last(p[1]).AsSlice()),
		})
	}
	for _, n := range w.nets {
		out[t.nets].putNet(n.cidr, anyNet)
		if n.internal {
			out[t.nets].putNet(n.cidr, internalNet)
		} else {
			out[t.nets].putNet(n.cidr, egressNet)
		}
	}
	return out
}

// Kinds of networks. The kind is a field of the set's key, because sets of ranges
// of a single field depend on the order in which elements come and go.
const (
	anyNet = iota
	internalNet
	egressNet
)

func kind(k uint32) []byte { return binaryutil.NativeEndian.PutUint32(k) }

func (e elements) putNet(p netip.Prefix, k uint32) {
	e.put(nftables.SetElement{
		Key:    cat(p.Addr().AsSlice(), kind(k)),
		KeyEnd: cat(last(p).AsSlice(), kind(k)),
	})
}

// serviceElements collects the elements of the four maps of services.
type serviceElements struct {
	t                    *tables
	svc, svcIP, be, beIP elements
}

func (t *tables) serviceElements() *serviceElements {
	return &serviceElements{t, elements{}, elements{}, elements{}, elements{}}
}

func (s *serviceElements) put(k svcKey, bs []netip.AddrPort) {
	if len(bs) == 0 {
		return
	}
	key := cat(pad([]byte{k.proto}), pad(port(k.port)))
	svc, be := s.svc, s.be
	if !k.ip.IsUnspecified() {
		key = cat(k.ip.AsSlice(), key)
		svc, be = s.svcIP, s.beIP
	}
	svc.put(nftables.SetElement{Key: key, VerdictData: &expr.Verdict{Kind: unix.NFT_JUMP, Chain: chainFor(k, len(bs))}})
	for i, b := range bs {
		be.put(nftables.SetElement{
			Key: cat(binaryutil.NativeEndian.PutUint32(uint32(i)), key),
			Val: cat(b.Addr().AsSlice(), pad(port(b.Port()))),
		})
	}
}

func (s *serviceElements) add(c *nftables.Conn) error {
	return errors.Join(add(c, s.t.be, s.be), add(c, s.t.beIP, s.beIP), add(c, s.t.svc, s.svc), add(c, s.t.svcIP, s.svcIP))
}

func (s *serviceElements) del(c *nftables.Conn) error {
	return errors.Join(del(c, s.t.svc, s.svc), del(c, s.t.svcIP, s.svcIP), del(c, s.t.be, s.be), del(c, s.t.beIP, s.beIP))
}

func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

func port(p uint16) []byte { return binary.BigEndian.AppendUint16(nil, p) }

// pad fills up to a multiple of four bytes, as registers are.
func pad(b []byte) []byte { return append(append([]byte{}, b...), make([]byte, (4-len(b)%4)%4)...) }

func cat(parts ...[]byte) (out []byte) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// last is a prefix's highest address.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	m := net.CIDRMask(p.Bits(), 32)
	for i := range b {
		b[i] |= ^m[i]
	}
	return netip.AddrFrom4(b)
}
