package hostnet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	mnl "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// socketBuffer holds a whole transaction and its answers; the default fails
	// with ENOBUFS at about a thousand messages.
	socketBuffer = 16 << 20
	// elementsPerMessage keeps a message's nested attribute below 64 KiB.
	elementsPerMessage = 400
	nftTimeout         = time.Minute
	guardChain         = "guard"
)

// tables are the two nftables tables, and what is known to be in them.
type tables struct {
	netdev, inet          *nftables.Table
	tapPrefix, vethPrefix string
	log                   *slog.Logger
	dnsPort               uint16 // where the name server listens

	src, mac             *nftables.Set // netdev
	veth, pairs, nets    *nftables.Set
	svc, svcIP, be, beIP *nftables.Set
	cur                  *kernel // nil: not known; replace all
}

// kernel is what the last successful transaction left there.
type kernel struct {
	gen      uint32 // the ruleset's generation after it
	dnsPort  uint16 // that the rules know
	elems    map[*nftables.Set]elements
	taps     map[string]int // interface index by name
	services map[svcKey][]netip.AddrPort
	chains   map[string]bool // n_3, m_1
}

func newTables(name, prefix string, log *slog.Logger) *tables {
	t := &tables{
		netdev:     &nftables.Table{Name: name, Family: nftables.TableFamilyNetdev},
		inet:       &nftables.Table{Name: name, Family: nftables.TableFamilyINet},
		tapPrefix:  prefix + "t",
		vethPrefix: prefix + "v",
		log:        log,
	}
	id := uint32(0)
	set := func(tab *nftables.Table, name string, s nftables.Set, key ...nftables.SetDatatype) *nftables.Set {
		id++
		s.Table, s.Name, s.ID = tab, name, id
		s.KeyType = key[0]
		if len(key) > 1 {
			s.KeyType, s.Concatenation = nftables.MustConcatSetType(key...), true
		}
		return &s
	}
	plain, interval := nftables.Set{}, nftables.Set{Interval: true}
	ifname, mac, ip := nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr
	proto, port, mark := nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark
	verdicts := nftables.Set{IsMap: true, DataType: nftables.TypeVerdict}
	targets := nftables.Set{IsMap: true, DataType: nftables.MustConcatSetType(ip, port)}
	t.src = set(t.netdev, "src", interval, ifname, mac, ip)
	t.mac = set(t.netdev, "mac", plain, ifname, mac)
	t.veth = set(t.inet, "veth", plain, ifname, mac, ip)
	t.pairs = set(t.inet, "pairs", interval, ip, ip)
	t.nets = set(t.inet, "nets", interval, ip, mark)
	t.svc = set(t.inet, "svc", verdicts, proto, port)
	t.svcIP = set(t.inet, "svcip", verdicts, ip, proto, port)
	t.be = set(t.inet, "be", targets, mark, proto, port)
	t.beIP = set(t.inet, "beip", targets, mark, ip, proto, port)
	return t
}

// sets that hold other things than services.
func (t *tables) sets() []*nftables.Set {
	return []*nftables.Set{t.src, t.mac, t.veth, t.pairs, t.nets}
}

// sweep says which connections may be stale after a change.
type sweep struct {
	all bool            // check them all
	udp map[svcKey]bool // newly published: flows to the host itself are stale
}

// apply makes the tables what w says, in one transaction.
func (t *tables) apply(w *wanted, ls links) (sweep, error) {
	next := &kernel{
		elems:    t.elements(w),
		taps:     map[string]int{},
		services: w.services,
		chains:   map[string]bool{},
		dnsPort:  t.dnsPort,
	}
	for _, tap := range w.taps {
		next.taps[tap.name] = ls[tap.name].Attrs().Index
	}
	gen, err := generation()
	if err != nil {
		return sweep{}, err
	}
	if t.cur != nil && t.cur.gen == gen && t.cur.dnsPort == t.dnsPort && t.tapsAreThere(ls) {
		s, err := t.update(next, gen)
		if err == nil {
			return s, nil
		}
		// The kernel is not what we believed. All of it, then.
		t.log.Warn("nftables: a change failed; replacing the tables", "table", t.inet.Name, "error", err)
		next.chains = map[string]bool{}
	}
	return t.replace(next, gen)
}

// tapsAreThere tells whether every tap that has a filter chain still is the same
// interface; a chain goes with its interface.
func (t *tables) tapsAreThere(ls links) bool {
	for name, i := range t.cur.taps {
		if l := ls[name]; l == nil || l.Attrs().Index != i {
			return false
		}
	}
	return true
}

// commit sends a transaction and remembers what it led to.
func (t *tables) commit(c *nftables.Conn, next *kernel, before uint32) error {
	t.cur = nil
	if err := c.Flush(); err != nil {
		return err
	}
	gen, err := generation()
	if err != nil {
		return err
	}
	if gen == before+1 { // nobody else's change in between
		next.gen = gen
		t.cur = next
	}
	return nil
}

// replace makes both tables anew. Packets see the old or the new ones.
func (t *tables) replace(next *kernel, gen uint32) (sweep, error) {
	s := sweep{all: true, udp: map[svcKey]bool{}}
	c, err := dial()
	if err != nil {
		return s, err
	}
	for _, tab := range []*nftables.Table{t.netdev, t.inet} {
		c.AddTable(tab) // so that deleting it never fails
		c.DelTable(tab)
		c.AddTable(tab)
	}
	for _, set := range append(t.sets(), t.svc, t.svcIP, t.be, t.beIP) {
		if err := c.AddSet(set, nil); err != nil {
			return s, err
		}
	}
	t.staticChains(c)
	for name := range next.taps {
		t.addTapChain(c, name)
	}
	for _, set := range t.sets() {
		if err := add(c, set, next.elems[set]); err != nil {
			return s, err
		}
	}
	svc := t.serviceElements()
	for k, bs := range next.services {
		t.needChain(c, next, k, len(bs))
		svc.put(k, bs)
		if k.proto == unix.IPPROTO_UDP && len(bs) > 0 {
			s.udp[k] = true
		}
	}
	if err := svc.add(c); err != nil {
		return s, err
	}
	return s, t.commit(c, next, gen)
}

// update sends what differs.
func (t *tables) update(next *kernel, gen uint32) (sweep, error) {
	s := sweep{udp: map[svcKey]bool{}}
	c, err := dial()
	if err != nil {
		return s, err
	}
	cur, changed := t.cur, false
	for _, set := range t.sets() {
		gone, fresh := cur.elems[set].diff(next.elems[set])
		if len(gone) == 0 && len(fresh) == 0 {
			continue
		}
		changed = true
		if len(gone) > 0 && (set == t.pairs || set == t.nets) {
			s.all = true
		}
		if err := del(c, set, gone); err != nil {
			return s, err
		}
		if err := add(c, set, fresh); err != nil {
			return s, err
		}
	}
	for name := range cur.taps {
		if _, keep := next.taps[name]; !keep {
			changed = true
			c.DelChain(&nftables.Chain{Name: name, Table: t.netdev})
		}
	}
	for name := range next.taps {
		if _, had := cur.taps[name]; !had {
			changed = true
			t.addTapChain(c, name)
		}
	}
	next.chains = maps.Clone(cur.chains) // they stay until the next replacement
	old, fresh := t.serviceElements(), t.serviceElements()
	for k, was := range cur.services {
		if is := next.services[k]; !slices.Equal(was, is) {
			changed = true
			s.all = s.all || lost(was, is)
			old.put(k, was)
		}
	}
	for k, is := range next.services {
		if was := cur.services[k]; !slices.Equal(was, is) {
			changed = true
			if k.proto == unix.IPPROTO_UDP && len(was) == 0 {
				s.udp[k] = true
			}
			t.needChain(c, next, k, len(is))
			fresh.put(k, is)
		}
	}
	if !changed {
		next.gen = gen
		t.cur = next
		return s, nil
	}
	if err := errors.Join(old.del(c), fresh.add(c)); err != nil {
		return s, err
	}
	return s, t.commit(c, next, gen)
}

func lost(was, is []netip.AddrPort) bool {
	return slices.ContainsFunc(was, func(b netip.AddrPort) bool { return !slices.Contains(is, b) })
}

// remove deletes both tables.
func (t *tables) remove() error {
	t.cur = nil
	c, err := dial()
	if err != nil {
		return err
	}
	for _, tab := range []*nftables.Table{t.netdev, t.inet} {
		c.AddTable(tab)
		c.DelTable(tab)
	}
	return c.Flush()
}

// others tells whether another instance has tables here.
func (t *tables) others() (bool, error) {
	c, err := dial()
	if err != nil {
		return false, err
	}
	chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyNetdev)
	if err != nil {
		return false, fmt.Errorf("list chains: %w", err)
	}
	return slices.ContainsFunc(chains, func(ch *nftables.Chain) bool {
		return ch.Name == guardChain && ch.Table.Name != t.netdev.Name
	}), nil
}

func (t *tables) chain(c *nftables.Conn, tab *nftables.Table, name string, rs []rule) {
	ch := c.AddChain(&nftables.Chain{Table: tab, Name: name})
	t.fill(c, ch, rs)
}

func (t *tables) baseChain(c *nftables.Conn, name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, rs []rule) {
	ch := c.AddChain(&nftables.Chain{Table: t.inet, Name: name, Type: typ, Hooknum: hook, Priority: prio})
	t.fill(c, ch, rs)
}

func (t *tables) fill(c *nftables.Conn, ch *nftables.Chain, rs []rule) {
	for _, r := range rs {
		c.AddRule(&nftables.Rule{Table: ch.Table, Chain: ch, Exprs: r})
	}
}

func (t *tables) staticChains(c *nftables.Conn) {
	filter, nat := nftables.ChainTypeFilter, nftables.ChainTypeNAT
	t.chain(c, t.netdev, guardChain, t.guard())
	t.chain(c, t.inet, "separate", t.separateRules())
	t.chain(c, t.inet, "host", t.hostRules())
	t.baseChain(c, "source", filter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, t.sourceRules())
	t.baseChain(c, "forward", filter, nftables.ChainHookForward, nftables.ChainPriorityFilter, t.forwardRules())
	t.baseChain(c, "input", filter, nftables.ChainHookInput, nftables.ChainPriorityFilter, t.inputRules())
	t.baseChain(c, "pre", nat, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, t.publishRules(true))
	t.baseChain(c, "out", nat, nftables.ChainHookOutput, nftables.ChainPriorityNATDest, t.publishRules(false))
	t.baseChain(c, "post", nat, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, t.postRules())
}

func (t *tables) addTapChain(c *nftables.Conn, name string) {
	policy := nftables.ChainPolicyDrop
	ch := c.AddChain(&nftables.Chain{
		Table: t.netdev, Name: name, Type: nftables.ChainTypeFilter, Policy: &policy,
		Hooknum: nftables.ChainHookIngress, Priority: nftables.ChainPriorityRef(-500), Device: name,
	})
	t.fill(c, ch, []rule{rules(jump(guardChain))})
}

// needChain makes the chain that balances over n backends, if it is not there.
func (t *tables) needChain(c *nftables.Conn, k *kernel, s svcKey, n int) {
	name := chainFor(s, n)
	if n == 0 || k.chains[name] {
		return
	}
	k.chains[name] = true
	t.chain(c, t.inet, name, []rule{t.pickRule(n, s.ip.IsUnspecified())})
}

func chainFor(s svcKey, n int) string {
	if s.ip.IsUnspecified() {
		return fmt.Sprintf("n_%d", n)
	}
	return fmt.Sprintf("m_%d", n)
}

func dial() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(tune))
}

func tune(c *mnl.Conn) error {
	if err := c.SetWriteBuffer(socketBuffer); err != nil {
		return fmt.Errorf("send buffer: %w", err)
	}
	if err := c.SetReadBuffer(socketBuffer); err != nil {
		return fmt.Errorf("receive buffer: %w", err)
	}
	return c.SetDeadline(time.Now().Add(nftTimeout))
}

// generation is the ruleset's: it grows with every transaction of anybody.
func generation() (uint32, error) {
	c, err := mnl.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return 0, fmt.Errorf("open netfilter netlink (nf_tables in the kernel?): %w", err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(nftTimeout)); err != nil {
		return 0, err
	}
	ms, err := c.Execute(mnl.Message{
		Header: mnl.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: mnl.Request},
		Data:   make([]byte, 4), // struct nfgenmsg
	})
	if err != nil {
		return 0, fmt.Errorf("ruleset generation: %w", err)
	}
	for _, m := range ms {
		if len(m.Data) < 4 {
			continue
		}
		as, err := mnl.UnmarshalAttributes(m.Data[4:])
		if err != nil {
			return 0, fmt.Errorf("ruleset generation: %w", err)
		}
		for _, a := range as {
			if a.Type == unix.NFTA_GEN_ID && len(a.Data) == 4 {
				return binary.BigEndian.Uint32(a.Data), nil
			}
		}
	}
	return 0, errors.New("ruleset generation: the kernel's answer has none")
}

func same(a, b nftables.SetElement) bool {
	return bytes.Equal(a.KeyEnd, b.KeyEnd) && bytes.Equal(a.Val, b.Val)
}
