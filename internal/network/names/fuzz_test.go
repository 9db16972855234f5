package names

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"

	v1 "tandem/api/tandem/v1"
)

// FuzzAnswer feeds whatever a guest may send.
func FuzzAnswer(f *testing.F) {
	for _, q := range []*dns.Msg{
		new(dns.Msg).SetQuestion("web.", dns.TypeA),
		new(dns.Msg).SetQuestion("many.shop.", dns.TypeANY).SetEdns0(4096, true),
		new(dns.Msg).SetQuestion("1.0.1.127.in-addr.arpa.", dns.TypePTR),
		new(dns.Msg).SetQuestion("www.example.org.", dns.TypeAAAA),
		new(dns.Msg).SetUpdate("shop."),
	} {
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, true)
		f.Add(b, false)
	}
	s := New(Options{ResolvConf: "/nonexistent", Logger: slog.New(slog.DiscardHandler)})
	s.fwd.read = time.Now().Add(24 * time.Hour) // no resolvers
	v, err := NewView(testNets, []*v1.NameRecord{
		{Network: "na", Name: "web", Ips: []string{"127.1.0.1"}},
		{Network: "na", Name: "many.shop", Ips: []string{"127.1.0.1", "127.1.0.2", "127.1.0.3"}},
	}, nil)
	if err != nil {
		f.Fatal(err)
	}
	s.Set(v)
	client := netip.MustParseAddr(clientA)
	f.Fuzz(func(t *testing.T, b []byte, tcp bool) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		m := s.answer(v.networksOf(client), client, q, tcp)
		if m == nil {
			return
		}
		if m.Id != q.Id || !m.Response {
			t.Fatalf("%v answers %v", m, q)
		}
		m.Truncate(maxUDP)
		if out, err := m.Pack(); err == nil && len(out) > maxUDP {
			t.Fatalf("%d bytes", len(out))
		}
	})
}
