package agent

import (
	"context"
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

// ready returns when all that was asked for before is in force; or with the
// error that keeps it from being so.
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
		n.mu.Lock()
		n.err, n.tried = err, ticket
		if err == nil {
			n.applied = ticket
		}
		close(n.changed)
		n.changed = make(chan struct{})
		n.mu.Unlock()
		timer = nil
		if err != nil && ctx.Err() == nil {
			wait := retry.next(n.a.o.Tuning.RetryDelay, n.a.o.Tuning.RetryDelayMax)
			n.a.log.Warn("the host's network could not be set up", "error", err, "retry", wait)
			timer = n.a.o.Clock.After(wait)
		} else {
			retry.reset()
		}
	}
}
