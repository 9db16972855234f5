package names

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/miekg/dns"

	v1 "tandem/api/tandem/v1"
)

// 127.0.0.0/8 is all ours: clients of networks are told apart by source address.
var testNets = []*v1.NetworkSpec{
	{Id: "na", Project: "shop", Cidr: "127.1.0.0/24"},
	{Id: "nb", Project: "blog", Cidr: "127.1.1.0/24"},
	{Id: "nc", Project: "shop", Cidr: "127.1.2.0/24", Internal: true},
}

const clientA, clientB, clientC = "127.1.0.9", "127.1.1.9", "127.1.2.9"

var addrs atomic.Uint32

// ownAddr is an address nobody else listens at: of this process alone, for one
// use. A port that is free in one protocol may be taken in the other, or in the
// next moment, by whoever else runs on the computer.
func ownAddr() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d.1:%d", 128+pid>>8&127, pid&255, 5353+addrs.Add(1)) // below the ports that are given out
}

// upstream counts and answers what is forwarded.
func upstream(t *testing.T, h dns.HandlerFunc) string {
	t.Helper()
	pc, l, err := listen(ownAddr())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: pc, Handler: h}, {Listener: l, Handler: h}} {
		ready := make(chan struct{})
		s.NotifyStartedFunc = func() { close(ready) }
		go s.ActivateAndServe()
		<-ready
		t.Cleanup(func() { s.Shutdown() })
	}
	return pc.LocalAddr().String()
}

func server(t *testing.T, upstreams ...string) (*Server, string) {
	t.Helper()
	addr := ownAddr()
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := New(Options{Listen: addr, ResolvConf: conf, Timeout: 500 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
	s.fwd.read, s.fwd.servers = time.Now().Add(time.Hour), upstreams // tests of the file are apart
	v, err := NewView(testNets, []*v1.NameRecord{
		{Network: "na", Name: "web", Ips: []string{"127.1.0.1", "127.1.0.2", "127.1.0.3"}},
		{Network: "na", Name: "Web.Shop", Ips: []string{"127.1.0.1"}},
		{Network: "na", Name: "shop-web-1", Ips: []string{"127.1.0.1"}},
		{Network: "na", Name: "down", Ips: nil},
		{Network: "nb", Name: "db", Ips: []string{"127.1.1.1"}},
		{Network: "gone", Name: "x", Ips: []string{"127.1.1.1"}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Set(v)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal("a second Start:", err)
	}
	t.Cleanup(func() { s.Close() })
	return s, addr
}

func query(t *testing.T, addr, from, network, name string, typ uint16) (*dns.Msg, error) {
	t.Helper()
	m := new(dns.Msg).SetQuestion(dns.Fqdn(name), typ)
	d := &net.Dialer{Timeout: 2 * time.Second, LocalAddr: &net.UDPAddr{IP: net.ParseIP(from)}}
	if network == "tcp" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c := dns.Client{Net: network, Timeout: 2 * time.Second, Dialer: d}
	r, _, err := c.Exchange(m, addr)
	return r, err
}

func answers(m *dns.Msg) string {
	var out []string
	for _, rr := range m.Answer {
		switch x := rr.(type) {
		case *dns.A:
			out = append(out, x.A.String())
		case *dns.PTR:
			out = append(out, x.Ptr)
		default:
			out = append(out, rr.String())
		}
	}
	return strings.Join(out, " ")
}

func TestWhoSeesWhat(t *testing.T) {
	var forwarded atomic.Int32
	up := upstream(t, func(w dns.ResponseWriter, q *dns.Msg) {
		forwarded.Add(1)
		m := new(dns.Msg).SetReply(q)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(203, 0, 113, 7)}}
		w.WriteMsg(m)
	})
	_, addr := server(t, up)
	for _, c := range []struct {
		from, name string
		typ        uint16
		rcode      int
		want       string
		asked      int32 // upstream
	}{
		{clientA, "web.shop", dns.TypeA, dns.RcodeSuccess, "127.1.0.1", 0},
		{clientA, "WEB.shop", dns.TypeA, dns.RcodeSuccess, "127.1.0.1", 0},
		{clientA, "web", dns.TypeAAAA, dns.RcodeSuccess, "", 0},
		{clientA, "web", dns.TypeMX, dns.RcodeSuccess, "", 0},
		{clientA, "down", dns.TypeA, dns.RcodeSuccess, "", 0},
		{clientA, "localhost", dns.TypeA, dns.RcodeSuccess, "127.0.0.1", 0},
		{clientA, "nothing", dns.TypeA, dns.RcodeNameError, "", 0},
		{clientA, "api.shop", dns.TypeA, dns.RcodeNameError, "", 0},
		{clientA, "db", dns.TypeA, dns.RcodeNameError, "", 0},
		{clientB, "db", dns.TypeA, dns.RcodeSuccess, "127.1.1.1", 0},
		{clientB, "web", dns.TypeA, dns.RcodeNameError, "", 0},
		{clientB, "web.shop", dns.TypeA, dns.RcodeSuccess, "203.0.113.7", 1}, // the Internet's, not the project's
		{clientA, "www.example.org", dns.TypeA, dns.RcodeSuccess, "203.0.113.7", 1},
		{clientC, "www.example.org", dns.TypeA, dns.RcodeNameError, "", 0},
		{clientA, "1.0.1.127.in-addr.arpa", dns.TypePTR, dns.RcodeSuccess, "shop-web-1.", 0},
		{clientA, "3.0.1.127.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "", 0},
		{clientA, "1.1.1.127.in-addr.arpa", dns.TypePTR, dns.RcodeNameError, "", 0},
	} {
		for _, network := range []string{"udp", "tcp"} {
			before := forwarded.Load()
			r, err := query(t, addr, c.from, network, c.name, c.typ)
			if err != nil {
				t.Errorf("%s asks %s by %s: %v", c.from, c.name, network, err)
				continue
			}
			if r.Rcode != c.rcode || answers(r) != c.want || forwarded.Load()-before != c.asked {
				t.Errorf("%s asks %s %s by %s: %s, %q, %d forwarded; want %s, %q, %d", c.from, c.name, dns.TypeToString[c.typ], network,
					dns.RcodeToString[r.Rcode], answers(r), forwarded.Load()-before, dns.RcodeToString[c.rcode], c.want, c.asked)
			}
			if c.asked == 0 && c.rcode == dns.RcodeSuccess && c.want == "" && len(r.Ns) != 1 {
				t.Errorf("%s: no data without SOA", c.name)
			}
			if c.asked == 0 && len(r.Answer) > 0 && r.Answer[0].Header().Ttl > 5 {
				t.Errorf("%s: TTL %d", c.name, r.Answer[0].Header().Ttl)
			}
		}
	}
	if r, err := query(t, addr, "127.9.9.9", "udp", "web", dns.TypeA); err == nil {
		t.Errorf("a stranger is answered: %v", r)
	}
}

func TestAddressesRotate(t *testing.T) {
	_, addr := server(t)
	first := map[string]int{}
	for range 60 {
		r, err := query(t, addr, clientA, "udp", "web", dns.TypeA)
		if err != nil || len(r.Answer) != 3 {
			t.Fatal(r, err)
		}
		first[strings.Fields(answers(r))[0]]++
	}
	if len(first) != 3 {
		t.Errorf("always the same first: %v", first)
	}
}

func TestManyAddressesAreTruncatedOverUDPOnly(t *testing.T) {
	s, addr := server(t)
	var ips []string
	for i := range 100 {
		ips = append(ips, fmt.Sprintf("127.1.0.%d", i+1))
	}
	v, err := NewView(testNets, []*v1.NameRecord{{Network: "na", Name: "many", Ips: ips}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.Set(v)
	r, err := query(t, addr, clientA, "udp", "many", dns.TypeA)
	if r != nil {
		r.Compress = true
	}
	if err != nil || !r.Truncated || r.Len() > 512 {
		t.Errorf("udp: %v %v", r, err)
	}
	r, err = query(t, addr, clientA, "tcp", "many", dns.TypeA)
	if err != nil || r.Truncated || len(r.Answer) != 100 {
		t.Errorf("tcp: %v %v", r, err)
	}
}

func TestResolversThatFail(t *testing.T) {
	dead, err := net.ListenPacket("udp4", ownAddr()) // swallows
	if err != nil {
		t.Fatal(err)
	}
	defer dead.Close()
	refuses := upstream(t, func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, dns.RcodeRefused)
		w.WriteMsg(m)
	})
	works := upstream(t, func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetRcode(q, dns.RcodeNameError)
		w.WriteMsg(m)
	})
	for _, c := range []struct {
		up    []string
		rcode int
	}{
		{[]string{dead.LocalAddr().String(), refuses, works}, dns.RcodeNameError},
		{[]string{dead.LocalAddr().String(), refuses}, dns.RcodeRefused},
		{[]string{dead.LocalAddr().String()}, dns.RcodeServerFailure},
		{nil, dns.RcodeServerFailure},
	} {
		_, addr := server(t, c.up...)
		r, err := query(t, addr, clientA, "udp", "www.example.org", dns.TypeA)
		if err != nil || r.Rcode != c.rcode {
			t.Errorf("%v: %v %v", c.up, r, err)
		}
	}
}

func TestOneClientCannotTakeAllForwarding(t *testing.T) {
	f := newForwarder(Options{})
	a, b := netip.MustParseAddr(clientA), netip.MustParseAddr(clientB)
	n := 0
	for f.enter(a) {
		n++
	}
	if n != maxClientInFlight || !f.enter(b) {
		t.Errorf("one client has %d under way", n)
	}
	for range n {
		f.leave(a)
	}
	f.leave(b)
	if f.total != 0 || len(f.flights) != 0 {
		t.Errorf("leaks: %d %v", f.total, f.flights)
	}
}

func TestOneClientCannotTakeAllConnections(t *testing.T) {
	_, addr := server(t)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(clientA)}}
	for range 3 * maxClientConn {
		c, err := d.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	if r, err := query(t, addr, clientB, "tcp", "db", dns.TypeA); err != nil || answers(r) != "127.1.1.1" {
		t.Errorf("another client: %v %v", r, err)
	}
}

func TestRubbish(t *testing.T) {
	s, addr := server(t)
	c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(clientA)}}).Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, b := range [][]byte{{}, {0}, make([]byte, 12), make([]byte, 1400), []byte(strings.Repeat("\xff", 600))} {
		c.Write(b)
	}
	if r, err := query(t, addr, clientA, "udp", "web.shop", dns.TypeA); err != nil || answers(r) == "" {
		t.Errorf("after rubbish: %v %v", r, err)
	}
	n := s.view.Load().networksOf(netip.MustParseAddr(clientA))
	for name, q := range map[string]*dns.Msg{
		"two questions": {Question: []dns.Question{{Name: "a.", Qtype: 1, Qclass: 1}, {Name: "b.", Qtype: 1, Qclass: 1}}},
		"no question":   {},
		"class":         {Question: []dns.Question{{Name: "a.", Qtype: 1, Qclass: 3}}},
		"opcode":        {MsgHdr: dns.MsgHdr{Opcode: dns.OpcodeUpdate}, Question: []dns.Question{{Name: "a.", Qtype: 1, Qclass: 1}}},
	} {
		if m := s.answer(n, netip.MustParseAddr(clientA), q, false); m == nil || m.Rcode == dns.RcodeSuccess {
			t.Errorf("%s: %v", name, m)
		}
	}
	if m := s.answer(n, netip.MustParseAddr(clientA), &dns.Msg{MsgHdr: dns.MsgHdr{Response: true}}, false); m != nil {
		t.Errorf("an answer is answered: %v", m)
	}
}

func TestResolvConf(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	f := newForwarder(Options{Listen: "169.254.1.1:53", ResolvConf: conf, Logger: slog.New(slog.DiscardHandler)})
	if got := f.resolvers(); len(got) != 0 {
		t.Errorf("no file: %v", got)
	}
	for text, want := range map[string]string{
		"nameserver 169.254.1.1\nnameserver 192.0.2.1\n": "192.0.2.1:53",
		"# nothing\n": "",
		"nameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver fd00::1\nnameserver 3.3.3.3": "1.1.1.1:53 2.2.2.2:53 [fd00::1]:53",
		"nameserver bad\nnameserver 192.0.2.1\n":                                         "192.0.2.1:53",
	} {
		if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		f.read, f.mtime = time.Time{}, time.Time{}
		if got := strings.Join(f.resolvers(), " "); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestAddressTaken(t *testing.T) {
	s, addr := server(t)
	other := New(Options{Listen: addr, Logger: slog.New(slog.DiscardHandler)})
	if err := other.Start(); err == nil {
		t.Error("two on one address")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Errorf("after the first is gone: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
}

func TestBadViews(t *testing.T) {
	for _, r := range []*v1.NameRecord{
		{Network: "na", Name: ""},
		{Network: "na", Name: strings.Repeat("a", 70)},
		{Network: "na", Name: "x", Ips: []string{"::1"}},
		{Network: "na", Name: "x", Ips: []string{"nonsense"}},
	} {
		good := &v1.NameRecord{Network: "na", Name: "good", Ips: []string{"127.1.0.1"}}
		v, err := NewView(testNets, []*v1.NameRecord{r, good}, nil)
		if !errors.Is(err, errdefs.ErrInvalidArgument) || v == nil {
			t.Errorf("%v: %v", r, err)
		} else if n := v.networkOf(netip.MustParseAddr(clientA)); len(n.names) != 1 || n.names["good"] == nil {
			t.Errorf("%v: %v", r, n.names)
		}
	}
	if v, err := NewView([]*v1.NetworkSpec{{Id: "x", Cidr: "y"}}, nil, nil); err == nil || v != nil {
		t.Error("a view of no network")
	}
}

func BenchmarkAnswer(b *testing.B) {
	var rs []*v1.NameRecord
	for i := range 5000 {
		rs = append(rs, &v1.NameRecord{Network: "na", Name: fmt.Sprint("svc", i), Ips: []string{"127.1.0.1", "127.1.0.2"}})
	}
	v, err := NewView(testNets, rs, nil)
	if err != nil {
		b.Fatal(err)
	}
	s := New(Options{})
	s.Set(v)
	q := new(dns.Msg).SetQuestion("svc77.", dns.TypeA)
	client := netip.MustParseAddr(clientA)
	for b.Loop() {
		s.answer(v.networksOf(client), client, q, false)
	}
}
