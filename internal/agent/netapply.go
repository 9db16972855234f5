package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"tandem/internal/network"
)

// netApplier keeps the host's network what the spec says. Changes that come
// while one is being applied are folded into the next.
type netApplier struct {
	a     *Agent
	state func() *network.State

	mu      sync.Mutex
	asked   uint64 // counts requests
	applied uint64 // the last request that is in force
	tried   uint64 // the last request that was tried
	err     error  // of the last attempt
	lacks   error  // what is in force lacks something (a port, the name server), but all else is there
	changed chan struct{}
	wake    chan struct{}
}

func newNetApplier(a *Agent, state func() *network.State) *netApplier {
	return &netApplier{a: a, state: state, changed: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// kick asks for the network to be applied.
func (n *netApplier) kick() {
	n.mu.Lock()
	n.asked++
	n.mu.Unlock()
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// degraded is what the network in force lacks, or nil.
func (n *netApplier) degraded() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lacks
}

// ready returns when all that was asked for before is in force, be it degraded; or
// with the error that keeps it from being so.
func (n *netApplier) ready(ctx context.Context) error {
	n.mu.Lock()
	ticket := n.asked
	n.mu.Unlock()
	for {
		n.mu.Lock()
		applied, tried, err, changed := n.applied, n.tried, n.err, n.changed
		n.mu.Unlock()
		if applied >= ticket {
			return nil
		}
		if err != nil && tried >= ticket {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (n *netApplier) run(ctx context.Context) {
	var retry backoff
	var timer <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-timer:
		}
		n.mu.Lock()
		ticket := n.asked
		n.mu.Unlock()
		err := n.a.o.Network.Apply(ctx, n.state())
		var lacks *network.Degraded
		errors.As(err, &lacks)
		n.mu.Lock()
		before := n.lacks
		n.err, n.tried = err, ticket
		if err == nil || lacks != nil {
			n.err, n.applied, n.lacks = nil, ticket, err
		}
		close(n.changed)
		n.changed = make(chan struct{})
		n.mu.Unlock()
		timer = nil
		if ctx.Err() != nil {
			continue
		}
		if err == nil {
			retry.reset()
		} else {
			wait := retry.next(n.a.o.Tuning.RetryDelay, n.a.o.Tuning.RetryDelayMax)
			timer = n.a.o.Clock.After(wait)
			if lacks == nil {
				n.a.log.Warn("the host's network could not be set up", "error", err, "retry", wait)
				continue
			}
		}
		n.tell(before, err)
	}
}

// tell says, once per change, what the network in force lacks.
func (n *netApplier) tell(before, now error) {
	switch {
	case now != nil && (before == nil || before.Error() != now.Error()):
		n.a.log.Warn("the host's network is in force, but not all of it; it is tried again", "error", now)
		e := n.a.newEvent("network", "degraded", n.a.hostID, n.a.o.HostName, "")
		e.Attributes["reason"] = cut(now.Error(), 512)
		n.a.hub.event(e)
	case now == nil && before != nil:
		n.a.log.Info("the host's network is whole again")
		n.a.hub.event(n.a.newEvent("network", "restored", n.a.hostID, n.a.o.HostName, ""))
	}
}
