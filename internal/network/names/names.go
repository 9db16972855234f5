// Package names is the name server of one host: it answers containers for the
// names of their own networks, and asks the host's resolvers for all others.
//
// Who asks is known by the source address (which can't be forged: see package
// hostnet), so that a project never sees another's names. Set swaps the whole
// view at once; queries under way see the old or the new one.
//
//	s := names.New(names.Options{Listen: "169.254.1.1:53"})
//	v, err := names.NewView(networks, records, clients)
//	s.Set(v)
//	err = s.Start() // again and again: no error once it listens
//
// What is answered, for a client of network N of project P:
//
//	a name of N, type A        its addresses in random order, TTL 5 s
//	a name of N, other types   no data
//	a single label             NXDOMAIN (localhost: 127.0.0.1)
//	LABEL.P                    NXDOMAIN, never asked outside
//	reverse of N's addresses   the name that has just this address
//	all else                   forwarded; NXDOMAIN for internal networks
//
// A client that has addresses in several networks (clients) sees the names of all of
// them, whichever address it asks from: each name in the first of its networks that
// has it. It is internal when all of them are.
//
// On a host the server is a process of its own, so that names resolve while the
// agent is away: Serve is that process, Apart its client in the agent.
//
//	err := names.Serve(ctx, run+"/names.sock", run+"/names.state", o)
//
//	a := names.NewApart(names.ApartOptions{Socket: run + "/names.sock", Spawn: start, Identity: id})
//	a.Set(networks, records, clients)
//	err = a.Start() // again and again, as above
//
// Clients are hostile: sizes, times, connections and forwarded queries in flight
// are bounded, in all and for each client.
package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
)

const (
	ttl           = 5    // seconds: how long a client may believe a stale address
	maxUDP        = 1232 // bytes of an answer over UDP, whatever the client offers
	maxAnswers    = 128
	idleTimeout   = 10 * time.Second
	maxConns      = 512 // TCP, in all
	maxClientConn = 16  // TCP, each client
)

// Options of a Server.
type Options struct {
	Listen string // address:port, UDP and TCP
	// AnyPort lets the server take another port when Listen's is taken; Port tells.
	AnyPort    bool
	ResolvConf string // "/etc/resolv.conf" if empty
	// Timeout of one try at one resolver; 2 s if zero.
	Timeout time.Duration
	// Shuffle orders addresses; random if nil.
	Shuffle func(n int, swap func(i, j int))
	Logger  *slog.Logger
	// Identity of the program, for Serve: a process of another one gives way.
	Identity string
}

// Server answers queries. Its methods may be called from any goroutine.
type Server struct {
	o    Options
	view atomic.Pointer[View]
	fwd  *forwarder

	mu       sync.Mutex
	udp, tcp *dns.Server
	port     uint16
}

// New makes a server that does not listen yet.
func New(o Options) *Server {
	if o.ResolvConf == "" {
		o.ResolvConf = "/etc/resolv.conf"
	}
	if o.Timeout == 0 {
		o.Timeout = 2 * time.Second
	}
	if o.Shuffle == nil {
		o.Shuffle = rand.Shuffle
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	s := &Server{o: o, fwd: newForwarder(o)}
	s.view.Store(&View{})
	return s
}

// Set replaces what the server knows.
func (s *Server) Set(v *View) { s.view.Store(v) }

// Start listens, if it does not yet.
func (s *Server) Start() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.udp != nil {
		return nil
	}
	pc, l, err := listen(s.o.Listen)
	if errors.Is(err, syscall.EADDRINUSE) && s.o.AnyPort {
		if ap, perr := netip.ParseAddrPort(s.o.Listen); perr == nil {
			s.o.Logger.Warn("another program answers on the name server's port; using another one", "address", s.o.Listen)
			for range 10 { // UDP and TCP on the same port: it may be taken by one of them
				if pc, l, err = listen(netip.AddrPortFrom(ap.Addr(), 0).String()); err == nil {
					break
				}
			}
		}
	}
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s.port = pc.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	h := dns.HandlerFunc(s.serve)
	s.udp = &dns.Server{PacketConn: pc, Handler: h, UDPSize: maxUDP}
	s.tcp = &dns.Server{
		Listener: newLimitListener(l), Handler: h, MaxTCPQueries: 256,
		ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Second,
		IdleTimeout: func() time.Duration { return idleTimeout },
	}
	for _, d := range []*dns.Server{s.udp, s.tcp} {
		started := make(chan struct{})
		d.NotifyStartedFunc = func() { close(started) }
		failed := make(chan error, 1)
		go func() {
			err := d.ActivateAndServe()
			if err != nil && !errors.Is(err, net.ErrClosed) {
				s.o.Logger.Error("name server stopped", "address", s.o.Listen, "error", err)
			}
			failed <- err
		}()
		select { // so that Close finds it running
		case <-started:
		case err := <-failed:
			return fmt.Errorf("serve: %w", err)
		}
	}
	return nil
}

func listen(addr string) (net.PacketConn, net.Listener, error) {
	pc, err := net.ListenPacket("udp4", addr)
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("tcp4", pc.LocalAddr().String())
	if err != nil {
		pc.Close()
		return nil, nil, err
	}
	return pc, l, nil
}

// free tells whether no program has the server's port.
func (s *Server) free() bool {
	pc, l, err := listen(s.o.Listen)
	if err == nil {
		pc.Close()
		l.Close()
	}
	return !errors.Is(err, syscall.EADDRINUSE)
}

// Port is where the server listens; 0 while it does not.
func (s *Server) Port() uint16 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.port
}

// Close stops listening. Start may be called again.
func (s *Server) Close() error { return s.closeWithin(time.Second) }

// closeWithin lets queries under way end for so long.
func (s *Server) closeWithin(d time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.udp == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	var errs []error
	for _, d := range []*dns.Server{s.udp, s.tcp} {
		if err := d.ShutdownContext(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			errs = append(errs, err)
		}
	}
	s.udp, s.tcp, s.port = nil, nil, 0
	return errors.Join(errs...)
}

func (s *Server) serve(w dns.ResponseWriter, q *dns.Msg) {
	n := s.view.Load().networksOf(clientIP(w))
	if len(n) == 0 {
		return // not a container of this host: silence, no amplification
	}
	m := s.answer(n, clientIP(w), q, isTCP(w))
	if m == nil {
		return
	}
	size := dns.MaxMsgSize
	if !isTCP(w) {
		size = dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = min(max(int(o.UDPSize()), dns.MinMsgSize), maxUDP)
		}
	}
	m.Truncate(size)
	if err := w.WriteMsg(m); err != nil {
		s.o.Logger.Debug("name server: answer not sent", "client", w.RemoteAddr(), "error", err)
	}
}

// answer builds the reply to q; nil means none.
func (s *Server) answer(n scope, client netip.Addr, q *dns.Msg, tcp bool) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	if q.Response {
		return nil
	}
	if q.Opcode != dns.OpcodeQuery {
		m.Rcode = dns.RcodeNotImplemented
		return m
	}
	if len(q.Question) != 1 || q.Question[0].Qclass != dns.ClassINET {
		m.Rcode = dns.RcodeFormatError
		return m
	}
	if q.IsEdns0() != nil {
		m.SetEdns0(maxUDP, false)
	}
	qu := q.Question[0]
	name := strings.TrimSuffix(strings.ToLower(qu.Name), ".")
	switch labels := dns.CountLabel(qu.Name); {
	case name == "localhost":
		s.addresses(m, qu, []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})})
	case n.lookup(name) != nil:
		s.addresses(m, qu, n.lookup(name))
	case labels == 1, labels == 2 && n.owns(name):
		m.Rcode = dns.RcodeNameError
		m.Authoritative = true
		m.Ns = []dns.RR{soa(qu.Name)}
	case n.reverse(m, qu, name, s.view.Load()):
	case n.internal():
		m.Rcode = dns.RcodeNameError
	default:
		return s.fwd.ask(client, q, m, tcp)
	}
	return m
}

func (s *Server) addresses(m *dns.Msg, q dns.Question, ips []netip.Addr) {
	m.Authoritative = true
	if q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY {
		order := make([]netip.Addr, len(ips))
		copy(order, ips)
		s.o.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, ip := range order[:min(len(order), maxAnswers)] {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl},
				A:   ip.AsSlice(),
			})
		}
	}
	if len(m.Answer) == 0 { // resolvers want an SOA to believe that there is no data
		m.Ns = []dns.RR{soa(q.Name)}
	}
}

func soa(name string) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: ttl},
		Ns:  "ns.tandem.invalid.", Mbox: "root.tandem.invalid.",
		Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: ttl,
	}
}

func isTCP(w dns.ResponseWriter) bool {
	_, ok := w.RemoteAddr().(*net.TCPAddr)
	return ok
}

func clientIP(w dns.ResponseWriter) netip.Addr {
	switch a := w.RemoteAddr().(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}
