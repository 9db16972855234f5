package agent

import (
	"context"
	"fmt"
	goruntime "runtime"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
)

// current is the intent as last accepted; nil when there never was one.
func (a *Agent) current() *v1.HostSpec {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.spec
}

// networkState is what the host's network shall be. Machines and metal
// containers that are still being removed keep their links until they are gone.
func (a *Agent) networkState() *network.State {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &network.State{Networks: a.spec.GetNetworks(), Ports: a.spec.GetPorts(), Names: a.spec.GetNames()}
	for _, m := range a.spec.GetMachines() {
		if m.Mac != "" {
			s.Machines = append(s.Machines, network.Machine{ID: m.Id, MAC: m.Mac, Prefixes: m.Prefixes})
		}
	}
	for _, c := range a.spec.GetContainers() {
		if c.MachineId == "" && c.Ip != "" && c.Spec.GetNetworkMode() != "host" && c.Spec.GetNetworkMode() != "none" {
			s.Containers = append(s.Containers, network.MetalContainer{ID: c.Id, IP: c.Ip, Further: further(c)})
		}
		if f := further(c); len(f) > 0 {
			s.Clients = append(s.Clients, append([]string{c.Ip}, f...))
		}
	}
	return s
}

// further are the addresses of a container beside its first.
func further(c *v1.ContainerAssignment) (ips []string) {
	for i, x := range c.GetAddresses() {
		if i > 0 && x.Ip != "" {
			ips = append(ips, x.Ip)
		}
	}
	return ips
}

// networkSpecs finds a container's networks, in the order of its addresses.
func (a *Agent) networkSpecs(c *v1.ContainerAssignment) ([]*v1.NetworkSpec, error) {
	ids := []string{c.Network}
	if c.Network == "" {
		ids = nil
	}
	for i, x := range c.Addresses {
		if i > 0 {
			ids = append(ids, x.NetworkId)
		}
	}
	var out []*v1.NetworkSpec
next:
	for _, id := range ids {
		for _, n := range a.current().GetNetworks() {
			if n.Id == id {
				out = append(out, n)
				continue next
			}
		}
		return nil, fmt.Errorf("network %s is not known on this host: %w", id, errdefs.ErrNotFound)
	}
	return out, nil
}

// mtu is the smallest of the host's networks: a machine's one NIC carries all.
func (a *Agent) mtu() int {
	mtu := uint32(1500)
	for _, n := range a.current().GetNetworks() {
		if n.Mtu >= 576 && n.Mtu < mtu {
			mtu = n.Mtu
		}
	}
	return int(mtu)
}

// volumeSize finds how large a named volume shall be.
func (a *Agent) volumeSize(id string) (int64, error) {
	for _, v := range a.current().GetVolumes() {
		if v.Id == id {
			if v.SizeBytes <= 0 {
				return a.o.Tuning.AnonymousSize, nil
			}
			return v.SizeBytes, nil
		}
	}
	return 0, fmt.Errorf("volume %s is not assigned to this host: %w", id, errdefs.ErrNotFound)
}

// longestGrace is how long a machine's containers may take to end.
func (a *Agent) longestGrace(machine string) time.Duration {
	grace := time.Duration(0)
	for _, c := range a.current().GetContainers() {
		if c.MachineId == machine {
			grace = max(grace, a.grace(c))
		}
	}
	return min(grace, 10*time.Minute)
}

// grace is how long a container may take to end.
func (a *Agent) grace(c *v1.ContainerAssignment) time.Duration {
	switch {
	case c.StopTimeout != nil:
		return c.StopTimeout.AsDuration()
	case c.Spec.GetStopGracePeriod() != nil:
		return c.Spec.StopGracePeriod.AsDuration()
	}
	return a.o.Tuning.StopGrace
}

// metalDisks are the disks of the host's own kernel: nothing to attach.
func (a *Agent) metalDisks() *diskSet {
	return &diskSet{
		boot: "host", disks: map[string]*heldDisk{}, idle: a.o.Tuning.DiskIdle, clock: a.o.Clock,
		use:   func(ctx context.Context, vol string) error { return a.o.Volumes.Use(ctx, vol, volumeHolder("")) },
		unuse: func(ctx context.Context, vol string) error { return a.o.Volumes.Unuse(ctx, vol, volumeHolder("")) },
	}
}

// runMetal keeps a session with the host's own runtime, and lets go of layers
// that no container uses.
func (a *Agent) runMetal(ctx context.Context) {
	boot := "host-" + a.bootID
	a.metal.disks.reset(boot)
	a.metal.found()
	var retry backoff
	for ctx.Err() == nil {
		sctx, end := context.WithCancel(ctx)
		sess := &session{rt: a.o.Metal, boot: boot, ctx: sctx, end: end, turns: startsAtOnce(goruntime.NumCPU())}
		if err := a.metal.open(sess); err != nil {
			end()
			a.metal.setDown(err.Error(), false)
			wait := retry.next(a.o.Tuning.RetryDelay, a.o.Tuning.RetryDelayMax)
			a.log.Warn("the host's runtime", "error", err, "retry", wait)
			select {
			case <-ctx.Done():
			case <-a.o.Clock.After(wait):
			}
			continue
		}
		retry.reset()
		for ctx.Err() == nil {
			wait, err := a.metal.disks.sweep(ctx, sess, false, nil)
			if err != nil {
				a.log.Debug("an unused layer stays mounted until the next try", "error", err)
			}
			select {
			case <-ctx.Done():
			case <-a.o.Clock.After(max(wait, 10*time.Second)):
			}
		}
		a.metal.close(sess, "the agent stops")
	}
}
