package names

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// TestSeveralNetworks: a proxy in the networks c (internal) and a sees what each of
// them sees, and each sees of it the address in its own.
func TestSeveralNetworks(t *testing.T) {
	const proxyC, proxyA = "127.1.2.20", "127.1.0.20"
	records := []*v1.NameRecord{
		{Network: "na", Name: "proxy", Ips: []string{proxyA}},
		{Network: "nc", Name: "proxy", Ips: []string{proxyC}},
		{Network: "na", Name: "web", Ips: []string{"127.1.0.1"}},
		{Network: "nc", Name: "db", Ips: []string{"127.1.2.1"}},
		{Network: "na", Name: "twice", Ips: []string{"127.1.0.2"}},
		{Network: "nc", Name: "twice", Ips: []string{"127.1.2.2"}},
	}
	check := func(t *testing.T, addr string) {
		t.Helper()
		for _, c := range []struct{ from, name, want string }{
			{clientA, "proxy", proxyA},
			{clientC, "proxy", proxyC},
			{clientA, "db", "NXDOMAIN"},
			{clientC, "web", "NXDOMAIN"},
			{clientB, "proxy", "NXDOMAIN"},
			// From either of its addresses, in its order: c first.
			{proxyA, "web", "127.1.0.1"}, {proxyC, "web", "127.1.0.1"},
			{proxyA, "db", "127.1.2.1"}, {proxyC, "db", "127.1.2.1"},
			{proxyA, "twice", "127.1.2.2"}, {proxyC, "twice", "127.1.2.2"},
			{proxyA, "proxy", proxyC}, {proxyC, "proxy", proxyC},
			{proxyA, "api.shop", "NXDOMAIN"},
			{proxyC, "1.0.1.127.in-addr.arpa", "web."}, {proxyA, "1.2.1.127.in-addr.arpa", "db."},
			{clientA, "1.2.1.127.in-addr.arpa", "NXDOMAIN"},
			// One of its networks has a way out; nobody is there to be asked.
			{clientC, "example.com", "NXDOMAIN"}, {proxyC, "example.com", "SERVFAIL"},
		} {
			typ := dns.TypeA
			if strings.HasSuffix(c.name, "arpa") {
				typ = dns.TypePTR
			}
			r, err := query(t, addr, c.from, "udp", c.name, typ)
			if err != nil {
				t.Fatalf("%s asks for %s: %v", c.from, c.name, err)
			}
			got := answers(r)
			if r.Rcode != dns.RcodeSuccess {
				got = dns.RcodeToString[r.Rcode]
			}
			if got != c.want {
				t.Errorf("%s asks for %s: %s, want %s", c.from, c.name, got, c.want)
			}
		}
	}
	// As a process apart gets it.
	b, err := proto.Marshal(specOf(testNets, records, [][]string{{proxyC, proxyA}}))
	if err != nil {
		t.Fatal(err)
	}
	var spec v1.HostSpec
	if err := proto.Unmarshal(b, &spec); err != nil {
		t.Fatal(err)
	}
	v, err := viewOf(&spec)
	if err != nil {
		t.Fatal(err)
	}
	s, addr := server(t)
	s.Set(v)
	check(t, addr)

	// Clients that can't be are told, and cost no other its names.
	v, err = NewView(testNets, records, [][]string{{"x"}, {"10.9.9.9", "fd00::1"}, {proxyC, "y", proxyA}})
	if v == nil || err == nil || bytes.Count([]byte(err.Error()), []byte("is not an IPv4 address")) != 3 {
		t.Fatalf("%v, %v", v, err)
	}
	if n := v.networksOf(netip.MustParseAddr("10.9.9.9")); n != nil {
		t.Errorf("an address outside all networks has %v", n)
	}
	s.Set(v)
	check(t, addr)
}
