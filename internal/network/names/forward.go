package names

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	maxInFlight       = 1024 // forwarded queries, in all
	maxClientInFlight = 64   // each client
	maxResolvers      = 3    // as libc
	resolvTTL         = 5 * time.Second
)

// forwarder asks the host's resolvers.
type forwarder struct {
	o    Options
	self netip.Addr

	mu      sync.Mutex
	flights map[netip.Addr]int
	total   int
	servers []string
	read    time.Time
	mtime   time.Time
}

func newForwarder(o Options) *forwarder {
	f := &forwarder{o: o, flights: map[netip.Addr]int{}}
	if ap, err := netip.ParseAddrPort(o.Listen); err == nil {
		f.self = ap.Addr()
	}
	return f
}

// ask forwards q and returns the reply, or m as a failure; nil when the client
// has too much under way already: it asks again.
func (f *forwarder) ask(client netip.Addr, q, m *dns.Msg, tcp bool) *dns.Msg {
	if !f.enter(client) {
		return nil
	}
	defer f.leave(client)
	out := new(dns.Msg)
	out.SetQuestion(q.Question[0].Name, q.Question[0].Qtype)
	out.RecursionDesired, out.CheckingDisabled = q.RecursionDesired, q.CheckingDisabled
	if o := q.IsEdns0(); o != nil {
		out.SetEdns0(maxUDP, o.Do())
	}
	network := "udp"
	if tcp {
		network = "tcp"
	}
	c := dns.Client{Net: network, Timeout: f.o.Timeout, UDPSize: dns.MaxMsgSize}
	m.Rcode = dns.RcodeServerFailure
	for _, srv := range f.resolvers() {
		r, _, err := c.Exchange(out, srv)
		if err != nil || r.Id != out.Id || len(r.Question) != 1 || r.Question[0] != out.Question[0] {
			f.o.Logger.Debug("resolver does not answer", "resolver", srv, "error", err)
			continue
		}
		r.Id = q.Id
		r.Compress = true
		if r.Rcode == dns.RcodeServerFailure || r.Rcode == dns.RcodeRefused {
			m = r // another may know better
			continue
		}
		return r
	}
	return m
}

func (f *forwarder) enter(client netip.Addr) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.total >= maxInFlight || f.flights[client] >= maxClientInFlight {
		return false
	}
	f.total++
	f.flights[client]++
	return true
}

func (f *forwarder) leave(client netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.total--
	if f.flights[client]--; f.flights[client] == 0 {
		delete(f.flights, client)
	}
}

// resolvers are the host's, read again when resolv.conf changed; ourselves left out.
func (f *forwarder) resolvers() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if now.Sub(f.read) < resolvTTL {
		return f.servers
	}
	f.read = now
	st, err := os.Stat(f.o.ResolvConf)
	if err != nil || st.Size() > 64<<10 {
		f.o.Logger.Warn("no resolvers: names outside will not resolve", "file", f.o.ResolvConf, "error", err)
		f.servers = nil
		return nil
	}
	if st.ModTime().Equal(f.mtime) {
		return f.servers
	}
	conf, err := dns.ClientConfigFromFile(f.o.ResolvConf)
	if err != nil {
		f.o.Logger.Warn("resolvers can't be read", "file", f.o.ResolvConf, "error", err)
		return f.servers
	}
	f.mtime, f.servers = st.ModTime(), nil
	for _, s := range conf.Servers {
		ip, err := netip.ParseAddr(s)
		if err != nil || ip == f.self || len(f.servers) == maxResolvers {
			continue
		}
		f.servers = append(f.servers, net.JoinHostPort(s, conf.Port))
	}
	return f.servers
}

// limitListener bounds connections, in all and for each client.
type limitListener struct {
	net.Listener
	mu    sync.Mutex
	total int
	conns map[netip.Addr]int
}

func newLimitListener(l net.Listener) *limitListener {
	return &limitListener{Listener: l, conns: map[netip.Addr]int{}}
}

// Accept implements net.Listener; connections over the limit are closed at once.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		var ip netip.Addr
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			ip = a.AddrPort().Addr().Unmap()
		}
		l.mu.Lock()
		ok := l.total < maxConns && l.conns[ip] < maxClientConn
		if ok {
			l.total++
			l.conns[ip]++
		}
		l.mu.Unlock()
		if ok {
			return &limitedConn{Conn: c, l: l, ip: ip}, nil
		}
		c.Close()
	}
}

type limitedConn struct {
	net.Conn
	l    *limitListener
	ip   netip.Addr
	once sync.Once
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	c.once.Do(func() {
		c.l.mu.Lock()
		defer c.l.mu.Unlock()
		c.l.total--
		if c.l.conns[c.ip]--; c.l.conns[c.ip] == 0 {
			delete(c.l.conns, c.ip)
		}
	})
	return c.Conn.Close()
}
