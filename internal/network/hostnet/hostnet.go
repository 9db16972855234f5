// Package hostnet is the network of a real Linux host: it makes the kernel what
// a network.State says, by rtnetlink and nftables, without any other program.
//
//	h, err := hostnet.New(hostnet.Options{Logger: log})
//	err = h.Apply(ctx, &state)   // again and again; cheap when nothing changed
//	err = h.Close()              // the kernel's state stays: workloads go on; so does Options.Names
//	err = h.Teardown(ctx)        // or: nothing of it is left
//
// What it makes, all of it recognisable by name:
//
//   - taps tdt<hash>, one per machine, with routes to the machine's prefixes;
//     the veths tdv<hash> of metal containers are made by package endpoint;
//   - 169.254.1.1/32 on lo, where the name server (package names) answers;
//   - two nftables tables of the same name, Options.Table: family netdev filters
//     what leaves a machine before anything else sees it, family inet separates
//     networks, guards the host, and does NAT and published ports.
//
// The tables are replaced as a whole, atomically, by the first Apply of a
// process and whenever another program touched the ruleset; otherwise only
// elements that differ are sent. rules.go shows the ruleset.
//
// A Host belongs to the network namespace of the thread that called New; all
// threads of the process must be in it.
//
// Errors belong to the classes of github.com/containerd/errdefs.
package hostnet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"regexp"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
	"tandem/internal/network/endpoint"
	"tandem/internal/network/names"
)

const dnsPort = 53

var gateway = netip.MustParseAddr(network.Gateway)

// Options of a host's network. The zero value is right for one Tandem per host.
type Options struct {
	// Table is the name of both nftables tables; "tandem" if empty. Instances that
	// share a network namespace need different ones, and different prefixes.
	Table string
	// Prefix begins interface names; endpoint.InstancePrefix(Table) if empty. The
	// endpoint.Manager of this host's metal containers needs the same.
	Prefix string
	// TapOwner and TapGroup may open the taps without privilege.
	TapOwner, TapGroup uint32
	// MTU of taps whose networks name none; endpoint.DefaultMTU if zero.
	MTU int
	// NoNames leaves 169.254.1.1:53 alone.
	NoNames bool
	// Names is the name server as a process that outlives this one, started with
	// NamesOptions; nil: it runs in this process.
	Names *names.Apart
	// ResolvConf lists the resolvers for all other names; "/etc/resolv.conf" if empty.
	ResolvConf string
	// Logger; slog.Default() if nil.
	Logger *slog.Logger
}

// Host programs the network of this host. It implements network.Network. Calls
// are serialised.
type Host struct {
	o   Options
	log *slog.Logger
	nl  *netlink.Handle

	mu     sync.Mutex
	nft    *tables
	dns    nameServer
	closed bool
}

var _ network.Network = (*Host)(nil)

var validTable = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,30}$`)

// New prepares a host's network and changes nothing yet.
func New(o Options) (*Host, error) {
	if o.Table == "" {
		o.Table = "tandem"
	}
	if o.Prefix == "" {
		o.Prefix = endpoint.InstancePrefix(o.Table)
	}
	if o.MTU == 0 {
		o.MTU = endpoint.DefaultMTU
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if !validTable.MatchString(o.Table) {
		return nil, fmt.Errorf("nftables table name %q: must be %s: %w", o.Table, validTable, errdefs.ErrInvalidArgument)
	}
	if len(o.Prefix) > 4 || strings.Trim(o.Prefix, "abcdefghijklmnopqrstuvwxyz") != "" {
		return nil, fmt.Errorf("interface prefix %q: must be 1 to 4 lower-case letters: %w", o.Prefix, errdefs.ErrInvalidArgument)
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open netlink (is CAP_NET_ADMIN there?): %w", err)
	}
	h := &Host{o: o, log: o.Logger, nl: nl, nft: newTables(o.Table, o.Prefix, o.Logger)}
	if h.dns = h.newNames(); o.Names != nil {
		h.dns = o.Names
	}
	return h, nil
}

// NamesOptions are for a name server that guests find where the rules of a Host
// lead them. resolvConf is Options.ResolvConf.
func NamesOptions(resolvConf string, log *slog.Logger) names.Options {
	return names.Options{
		Listen:     netip.AddrPortFrom(gateway, dnsPort).String(),
		AnyPort:    true,
		ResolvConf: resolvConf,
		Logger:     log,
	}
}

// nameServer is one in this process, or one apart.
type nameServer interface {
	Set([]*v1.NetworkSpec, []*v1.NameRecord, [][]string)
	Start() error
	Port() uint16
	Close() error // let go of it
	Stop() error  // end it; Start begins anew
}

type inProcess struct{ *names.Server }

func (s inProcess) Set(networks []*v1.NetworkSpec, records []*v1.NameRecord, clients [][]string) {
	if v, _ := names.NewView(networks, records, clients); v != nil { // parse has told of errors
		s.Server.Set(v)
	}
}

func (s inProcess) Stop() error { return s.Close() }

func (h *Host) newNames() nameServer {
	return inProcess{names.New(NamesOptions(h.o.ResolvConf, h.log))}
}

// TapName implements network.Network.
func (h *Host) TapName(machineID string) string { return endpoint.Name(h.o.Prefix, 't', machineID) }

// VethName implements network.Network.
func (h *Host) VethName(containerID string) string {
	return endpoint.Name(h.o.Prefix, 'v', containerID)
}

// Apply implements network.Network. What is invalid in s (but for single
// published ports and names) is InvalidArgument, and nothing changes. Ports and
// names that can't be had, and a name server that can't listen, are reported as
// network.Degraded after all else is done: the caller shows the error and applies
// again later.
func (h *Host) Apply(ctx context.Context, s *network.State) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fmt.Errorf("the host's network is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	w, skipped, err := h.parse(s)
	if err != nil {
		return fmt.Errorf("network state: %w", err)
	}
	if err := h.base(); err != nil {
		return err
	}
	links, err := h.ensureTaps(w)
	if err != nil {
		return err
	}
	namesErr := h.serveNames(w)
	busy := h.nft.dropBusy(w)
	gone, err := h.nft.apply(w, links)
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	if err := h.route(w, links); err != nil {
		return err
	}
	if err := h.removeStale(w, links); err != nil {
		return err
	}
	if err := h.forget(w, gone); err != nil {
		h.log.Warn("connection tracking was not cleaned: old connections may hang until they time out", "error", err)
	}
	if err := errors.Join(skipped, busy, namesErr); err != nil {
		return &network.Degraded{Err: err}
	}
	return nil
}

// serveNames also tells the rules where the name server is: guests always ask
// port 53, and are led to another one if a program of this host has that.
func (h *Host) serveNames(w *wanted) error {
	h.nft.dnsPort = dnsPort
	if h.o.NoNames {
		return nil
	}
	h.dns.Set(w.dnsNets, w.dnsNames, w.clients)
	if err := h.dns.Start(); err != nil {
		return fmt.Errorf("name server on %s: %w", gateway, err)
	}
	h.nft.dnsPort = h.dns.Port()
	return nil
}

// Close implements network.Network.
func (h *Host) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil
	}
	h.closed = true
	err := h.dns.Close()
	h.nl.Close()
	return err
}

// Teardown implements network.Network. Settings of the kernel as a whole
// (ip_forward) stay: others may rely on them by now.
func (h *Host) Teardown(ctx context.Context) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return fmt.Errorf("the host's network is closed: %w", errdefs.ErrFailedPrecondition)
	}
	errs := []error{h.dns.Stop()}
	// Links first: a link without its filter must never be up.
	errs = append(errs, h.removeLinks())
	if err := h.nft.remove(); err != nil {
		errs = append(errs, fmt.Errorf("nftables: %w", err))
	}
	if others, err := h.nft.others(); err != nil || !others {
		errs = append(errs, err, h.removeGateway())
	}
	return errors.Join(errs...)
}
