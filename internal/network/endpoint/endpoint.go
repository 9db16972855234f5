// Package endpoint gives a container its network on "this kernel": the same in
// a guest and on a metal host.
//
//	kernel side                              container's network namespace
//	tdv<hash>  ee:ee:ee:ee:ee:ee  ◄─ veth ─►  eth0  10.x.y.z/32
//	route 10.x.y.z/32 dev tdv<hash>           default via 169.254.1.1 on-link
//
// A container in several networks has an address in each, all on eth0, and for each
// network a route that makes its address there the source. With Options.Separate the
// kernel keeps networks apart (see separate.go); on hosts, package hostnet does.
//
// Everything is routed; nothing is bridged. Neighbours are pinned on both
// sides, so that no packet ever waits for ARP; proxy ARP is on for whoever asks
// all the same. The kernel checks sources itself: rp_filter is strict on the
// kernel's end, so that a container can't send in another's name.
//
// A namespace is a bind mount in Options.NetnsDir, named as its container. That
// and the deterministic interface name are the only state, both in the kernel:
// any process can take over after a kill, and Setup mends what is half done.
//
//	m, err := endpoint.New(endpoint.Options{NetnsDir: "/run/tandem/netns"})
//	path, err := m.Setup(ctx, "c-1", &v1.RuntimeNetwork{Address: "10.64.0.5/32"})
//	...                      // an OCI runtime joins path
//	err = m.Teardown(ctx, "c-1")
//
// What moves packets between this kernel and the rest (a guest's eth0, a host's
// NAT and filters) is not its business: see package hostnet for hosts.
//
// Errors belong to the classes of github.com/containerd/errdefs.
package endpoint

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

const (
	// DefaultPrefix begins the names of all of Tandem's interfaces.
	DefaultPrefix = "td"
	// DefaultGateway is the next hop of a container when none is given.
	DefaultGateway = "169.254.1.1"
	// DefaultMTU is used when a network names none.
	DefaultMTU = 1500

	minMTU, maxMTU = 68, 65521
)

// GatewayMAC is the address of the near end of every link. It is the same
// everywhere, so that what a container has in its ARP cache stays true wherever
// its machine moves.
var GatewayMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// Options say where a Manager keeps its namespaces.
type Options struct {
	// NetnsDir holds one bind mount per container; made if missing. Required.
	NetnsDir string
	// Prefix begins interface names: 1 to 4 lower-case letters; DefaultPrefix if
	// empty. Two managers on one kernel need two prefixes and two directories.
	Prefix string
	// Separate keeps this kernel from passing packets from one network to another:
	// for kernels on which nothing else does.
	Separate bool
	// Sole says that all links which come up on this kernel are this manager's: what
	// they need is made the kernel's default once, where that is quicker.
	Sole bool
	// RouteLocalnet lets replies to this kernel's 127.0.0.1 find their way: for kernels
	// whose rules keep containers from that network themselves (package hostnet).
	RouteLocalnet bool
	// Spare keeps one namespace ready after one was needed: for kernels with memory
	// and time to spare.
	Spare bool
}

// Manager makes and removes links. Its methods may be called from any
// goroutine; calls for one container are serialised.
type Manager struct {
	dir    string
	prefix string
	nl     *netlink.Handle
	raw    *nl.NetlinkSocket // for what nl has no words for
	locks  [64]sync.Mutex
	apart  *borders  // nil: does not separate
	spare  *spares   // nil: keeps none
	port   []setting // of this kernel's ends
	byself []setting // what new links have by themselves

	keptMu sync.Mutex
	kept   map[string]*pair // what Prepare has made, by container
}

// New returns a manager for the network namespace that the calling thread is in.
func New(o Options) (*Manager, error) {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if !validPrefix(o.Prefix) {
		return nil, fmt.Errorf("interface prefix %q: must be 1 to 4 lower-case letters: %w", o.Prefix, errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(o.NetnsDir) {
		return nil, fmt.Errorf("network namespace directory %q: must be an absolute path: %w", o.NetnsDir, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(o.NetnsDir, 0o711); err != nil {
		return nil, fmt.Errorf("network namespace directory: %w", err)
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink (is CAP_NET_ADMIN there?): %w", err)
	}
	raw, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	m := &Manager{dir: o.NetnsDir, prefix: o.Prefix, nl: h, raw: raw, port: portSettings, kept: map[string]*pair{}}
	if o.RouteLocalnet {
		m.port = append(slices.Clip(m.port), routeLocalnet)
	}
	if o.Sole {
		if m.byself, err = defaults(); err != nil {
			m.Close()
			return nil, err
		}
	}
	if o.Spare {
		m.spare = &spares{}
	}
	if o.Separate {
		m.apart = &borders{nl: h, prefix: o.Prefix + "v", known: map[netip.Prefix]map[string]bool{}}
	}
	return m, nil
}

// Close lets go of the manager's socket; links stay.
func (m *Manager) Close() error {
	m.spare.close()
	m.keptMu.Lock()
	for id := range m.kept {
		m.dropLocked(id)
	}
	m.keptMu.Unlock()
	m.nl.Close()
	m.raw.Close()
	return nil
}

func validPrefix(p string) bool {
	if len(p) < 1 || len(p) > 4 {
		return false
	}
	return strings.Trim(p, "abcdefghijklmnopqrstuvwxyz") == ""
}

// InstancePrefix is the interface prefix of an instance of Tandem: DefaultPrefix
// for "tandem" (or ""), and one of its own for each other, so that several can
// share a kernel.
func InstancePrefix(instance string) string {
	if instance == "" || instance == "tandem" {
		return DefaultPrefix
	}
	h := sha256.Sum256([]byte(instance))
	return DefaultPrefix + string([]byte{'a' + h[0]%26, 'a' + h[1]%26})
}

// Name is a deterministic interface name of at most 15 bytes: prefix, one letter
// for the kind ('v' for a container's link, 't' for a machine's tap), and 50 bits
// of the id's hash.
func Name(prefix string, kind byte, id string) string {
	if prefix == "" {
		prefix = DefaultPrefix
	}
	h := sha256.Sum256([]byte(id))
	return prefix + string(kind) + strings.ToLower(base32.StdEncoding.EncodeToString(h[:])[:10])
}

// HostName is the name of the kernel's end of a container's link.
func (m *Manager) HostName(id string) string { return Name(m.prefix, 'v', id) }

// MAC is the hardware address of the container that has this IPv4 address:
// derived from it, so that a filter knows it before the link exists.
func MAC(ip netip.Addr) net.HardwareAddr {
	b := ip.As4()
	return net.HardwareAddr{0x06, 0x74, b[0], b[1], b[2], b[3]}
}

// Setup makes a container's namespace and link, or makes them right again, and
// returns the namespace's path. Mode "none" has a loopback only. Mode "host" has
// no namespace, and is InvalidArgument here.
func (m *Manager) Setup(ctx context.Context, id string, n *v1.RuntimeNetwork) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	w, err := parse(id, n)
	if err != nil {
		return "", err
	}
	defer m.lock(id)()
	path := filepath.Join(m.dir, id)
	if err := m.ensureNetns(path); err != nil {
		return "", fmt.Errorf("network namespace of %s: %w", id, err)
	}
	if w.none {
		// A link from an earlier, routed life of this id must not linger.
		if err := m.deleteLink(id); err != nil {
			return "", err
		}
		return path, nil
	}
	if err := m.link(id, path, w); err != nil {
		return "", fmt.Errorf("network of %s: %w", id, err)
	}
	return path, nil
}

// Prepare makes what takes longest of what Setup makes: the namespace, and the link,
// which is down and has no address, so that nobody can use it and nothing leads to
// it. Setup does the rest, or all of it; Teardown removes it.
func (m *Manager) Prepare(ctx context.Context, id string, n *v1.RuntimeNetwork) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w, err := parse(id, n)
	if err != nil {
		return err
	}
	defer m.lock(id)()
	path := filepath.Join(m.dir, id)
	if err := m.ensureNetns(path); err != nil {
		return fmt.Errorf("network namespace of %s: %w", id, err)
	}
	if w.none {
		return nil
	}
	p, err := m.open(id, path, w)
	if err != nil {
		return fmt.Errorf("network of %s: %w", id, err)
	}
	m.keep(id, p)
	return nil
}

// Teardown removes a container's link and namespace. What is gone is no error.
func (m *Manager) Teardown(ctx context.Context, id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("container id %q: %w", id, errdefs.ErrInvalidArgument)
	}
	defer m.lock(id)()
	m.keptMu.Lock()
	m.dropLocked(id)
	m.keptMu.Unlock()
	if err := m.deleteLink(id); err != nil {
		return err
	}
	if err := removeNetns(filepath.Join(m.dir, id)); err != nil {
		return fmt.Errorf("network namespace of %s: %w", id, err)
	}
	if err := m.apart.forget(id); err != nil {
		return fmt.Errorf("borders of networks: %w", err)
	}
	return nil
}

// List is the ids of all containers that have a namespace, sorted; half-made
// ones too: Setup mends and Teardown removes them.
func (m *Manager) List() ([]string, error) {
	es, err := os.ReadDir(m.dir)
	if err != nil {
		return nil, fmt.Errorf("network namespace directory: %w", err)
	}
	var ids []string
	for _, e := range es {
		if validID.MatchString(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	sort.Strings(ids)
	return ids, nil
}

func (m *Manager) lock(id string) func() {
	h := fnv.New32a()
	h.Write([]byte(id))
	l := &m.locks[h.Sum32()%uint32(len(m.locks))]
	l.Lock()
	return l.Unlock
}

func (m *Manager) deleteLink(id string) error {
	l, err := m.nl.LinkByName(m.HostName(id))
	if isNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link of %s: %w", id, err)
	}
	if err := m.nl.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link of %s: %w", id, err)
	}
	return nil
}

func isNotFound(err error) bool {
	var nf netlink.LinkNotFoundError
	return errors.As(err, &nf)
}

// wanted is a RuntimeNetwork, checked.
type wanted struct {
	none   bool
	addr   netip.Addr // the first
	addrs  []address  // all
	source netip.Addr
	gw     netip.Addr
	mtu    int
}

// address is one in a network, which may be unknown.
type address struct {
	ip  netip.Addr
	net netip.Prefix
}

func (w wanted) has(prefix string) bool {
	for _, a := range w.addrs {
		if a.ip.String()+"/32" == prefix {
			return true
		}
	}
	return false
}

// maxAddresses of one container: a project may have 100 networks.
const maxAddresses = 128

func parse(id string, n *v1.RuntimeNetwork) (wanted, error) {
	bad := func(format string, a ...any) (wanted, error) {
		return wanted{}, fmt.Errorf("network of %q: %s: %w", id, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if !validID.MatchString(id) {
		return bad("the id is not [A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
	}
	switch n.GetMode() {
	case "none":
		return wanted{none: true}, nil
	case "", "routed":
	case "host":
		return bad("mode host has no network namespace of its own")
	default:
		return bad("unknown mode %q", n.GetMode())
	}
	w := wanted{mtu: DefaultMTU}
	list := n.GetAddresses()
	if len(list) == 0 {
		list = []*v1.RuntimeAddress{{Address: n.GetAddress()}}
	}
	if len(list) > maxAddresses {
		return bad("%d addresses are more than %d", len(list), maxAddresses)
	}
	if list[0].GetAddress() != n.GetAddress() {
		return bad("the first of its addresses, %q, is not %q", list[0].GetAddress(), n.GetAddress())
	}
	for _, x := range list {
		p, err := netip.ParsePrefix(x.GetAddress())
		if err != nil || !p.Addr().Is4() || p.Bits() != 32 || !usable(p.Addr()) || w.has(p.String()) {
			return bad("address %q: must be an IPv4 unicast address with /32, once", x.GetAddress())
		}
		a := address{ip: p.Addr()}
		if x.GetNetwork() != "" {
			a.net, err = netip.ParsePrefix(x.GetNetwork())
			if err != nil || !a.net.Contains(a.ip) || a.net != a.net.Masked() || a.net.Bits() < 8 {
				return bad("network %q of address %s: must be an IPv4 network that it is in", x.GetNetwork(), a.ip)
			}
		}
		w.addrs = append(w.addrs, a)
	}
	w.addr = w.addrs[0].ip
	w.source = w.addr
	if s := n.GetSource(); s != "" {
		if !w.has(s + "/32") {
			return bad("source %q: must be one of its addresses", s)
		}
		w.source = netip.MustParseAddr(s)
	}
	gw := n.GetGateway()
	if gw == "" {
		gw = DefaultGateway
	}
	var err error
	w.gw, err = netip.ParseAddr(gw)
	if err != nil || !w.gw.Is4() || !usable(w.gw) || w.has(gw+"/32") {
		return bad("gateway %q: must be another IPv4 unicast address", gw)
	}
	if n.GetMtu() != 0 {
		if n.GetMtu() < minMTU || n.GetMtu() > maxMTU {
			return bad("mtu %d: must be %d to %d", n.GetMtu(), minMTU, maxMTU)
		}
		w.mtu = int(n.GetMtu())
	}
	return w, nil
}

func usable(a netip.Addr) bool {
	return !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && a.As4() != [4]byte{255, 255, 255, 255}
}
