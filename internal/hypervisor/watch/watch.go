// Package watch fans a driver's events out to any number of watchers without
// ever waiting for one. A watcher that is slow does not lose events: those of
// the same machine and kind are folded into the newest, so that what waits for
// it is bounded by the number of machines.
//
//	var hub watch.Hub
//	events := hub.Watch(ctx)
//	hub.Publish(hypervisor.Event{Machine: "web", Kind: hypervisor.EventStarted})
package watch

import (
	"context"
	"sync"

	"tandem/internal/hypervisor"
)

// Hub hands events to watchers. Its zero value is ready for use.
type Hub struct {
	mu       sync.Mutex
	watchers map[*watcher]struct{}
	closed   bool
}

type key struct {
	machine string
	kind    hypervisor.EventKind
}

type watcher struct {
	mu      sync.Mutex
	pending []hypervisor.Event // in order of their newest occurrence
	wake    chan struct{}
}

// Publish hands an event to all watchers. It never blocks.
func (h *Hub) Publish(e hypervisor.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watchers {
		w.add(e)
	}
}

// Watch returns the events from now on. The channel is closed when ctx ends or
// the hub is closed.
func (h *Hub) Watch(ctx context.Context) <-chan hypervisor.Event {
	w := &watcher{wake: make(chan struct{}, 1)}
	out := make(chan hypervisor.Event)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		close(out)
		return out
	}
	if h.watchers == nil {
		h.watchers = map[*watcher]struct{}{}
	}
	h.watchers[w] = struct{}{}
	go func() {
		defer close(out)
		defer func() {
			h.mu.Lock()
			delete(h.watchers, w)
			h.mu.Unlock()
		}()
		for {
			select {
			case <-ctx.Done():
				return
			case _, ok := <-w.wake:
				for e, more := w.next(); more; e, more = w.next() {
					select {
					case out <- e:
					case <-ctx.Done():
						return
					}
				}
				if !ok {
					return
				}
			}
		}
	}()
	return out
}

// Close ends all watches, after what is pending was delivered.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	h.closed = true
	for w := range h.watchers {
		close(w.wake)
	}
	h.watchers = nil
}

func (w *watcher) add(e hypervisor.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k := key{e.Machine, e.Kind}
	for i, p := range w.pending {
		if (key{p.Machine, p.Kind}) == k {
			w.pending = append(w.pending[:i], w.pending[i+1:]...)
			break
		}
	}
	w.pending = append(w.pending, e)
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) next() (hypervisor.Event, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.pending) == 0 {
		return hypervisor.Event{}, false
	}
	e := w.pending[0]
	w.pending = w.pending[1:]
	return e, true
}
