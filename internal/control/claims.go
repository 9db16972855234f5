package control

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// claims are all addresses, blocks and ports that are somebody's: of records, of
// the last readable copies of records that can't be read, and of containers that
// hosts speak of and that have no record.
type claims struct {
	containers []*v1.Container
	machines   []*v1.Machine
	addresses  []string
	// noAddress and noPort say why none may be given out; nil: they may.
	noAddress, noPort error
}

func (c *Controller) claims(snap *store.Snapshot) *claims {
	containers, allC := store.LastOf[*v1.Container](snap)
	machines, allM := store.LastOf[*v1.Machine](snap)
	k := &claims{containers: append(slices.Clip(snap.Containers), containers...), machines: append(slices.Clip(snap.Machines), machines...)}
	known := map[string]bool{}
	for _, x := range snap.Containers {
		known[x.Meta.Id] = true
	}
	var complete bool
	k.addresses, complete = c.Hosts.strangers(snap, known)
	// A container's address is known to its host at the latest; ports and a
	// machine's blocks are in their records alone.
	if !allC {
		k.noPort = unknown(snap, store.Containers, "ports")
	}
	switch {
	case !allC && !complete:
		k.noAddress = unknown(snap, store.Containers, "address")
	case !allM:
		k.noAddress = unknown(snap, store.Machines, "addresses")
	}
	return k
}

// unknown says which record keeps others waiting, and what to do.
func unknown(snap *store.Snapshot, kind store.Kind, what string) error {
	var names []string
	for _, x := range snap.Corrupt {
		if x.Kind == kind && !slices.ContainsFunc(snap.Last, func(r store.Record) bool { return store.KeyOf(r) == x }) {
			names = append(names, x.String())
		}
	}
	return fmt.Errorf("the record of %s can't be read, and nobody knows its %s: none is given out that could be its own. `tandem state ls` shows it, and `tandem state purge` removes it: %w",
		strings.Join(names, ", "), what, errdefs.ErrFailedPrecondition)
}

// Claimed lists all containers, and the last readable copies of those whose record
// can't be read: whoever looks for a free port looks through these.
func Claimed(snap *store.Snapshot) []*v1.Container {
	last, _ := store.LastOf[*v1.Container](snap)
	return append(slices.Clip(snap.Containers), last...)
}

// blocks says why this container can't be placed now.
func (k *claims) blocks(x *v1.Container) error {
	if k.noPort != nil && len(x.GetSpec().GetPorts()) > 0 {
		return k.noPort
	}
	if k.noAddress != nil && len(attachments(x)) > 0 {
		return k.noAddress
	}
	return nil
}

// strangers lists the addresses of containers that hosts speak of and that are not
// known, and says whether all hosts there are have told all they have.
func (h *Hosts) strangers(snap *store.Snapshot, known map[string]bool) (addresses []string, complete bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	complete = !snap.Unreadable(store.Hosts)
	for _, r := range snap.Hosts {
		if s := h.sessions[r.Meta.Id]; s == nil || !s.toldAll() {
			complete = false
		}
	}
	for _, of := range h.addresses {
		for id, ips := range of {
			if !known[id] {
				addresses = append(addresses, ips...)
			}
		}
	}
	slices.Sort(addresses)
	return addresses, complete
}

func (s *session) toldAll() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.full
}

// reported keeps the addresses that a host's containers have, also while it is away.
func (h *Hosts) reported(hostID string, in *v1.HostStatus) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.addresses[hostID]
	if m == nil || in.Full {
		m = map[string][]string{}
		h.addresses[hostID] = m
	}
	for _, x := range in.Containers {
		if len(x.Ips) > 0 {
			m[x.Id] = x.Ips
		} else if x.Ip != "" {
			m[x.Id] = []string{x.Ip}
		}
	}
	for _, id := range in.RemovedContainers {
		delete(m, id)
	}
}
