package qmp

import (
	"context"
	"fmt"
	"sync/atomic"
)

// Subscription receives events. Make it before the command whose event is
// waited for.
type Subscription struct {
	// C delivers events in order; it is closed when the connection ends.
	C      <-chan Event
	events chan Event
	lost   atomic.Uint64
	client *Client
}

// Subscribe starts to collect events.
func (c *Client) Subscribe() *Subscription {
	s := &Subscription{events: make(chan Event, eventQueue), client: c}
	s.C = s.events
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil {
		close(s.events)
		return s
	}
	c.subs[s] = struct{}{}
	return s
}

// Lost is how many events were dropped because they were not fetched in time.
func (s *Subscription) Lost() uint64 { return s.lost.Load() }

// Close ends the subscription. C is not closed by it.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	delete(s.client.subs, s)
}

// push never blocks. Its only caller is the reader, under the client's lock.
func (s *Subscription) push(e Event) {
	for {
		select {
		case s.events <- e:
			return
		default:
		}
		select {
		case <-s.events:
			s.lost.Add(1)
		default:
		}
	}
}

// Wait returns the first event that match accepts.
func (s *Subscription) Wait(ctx context.Context, match func(Event) bool) (Event, error) {
	for {
		select {
		case e, ok := <-s.C:
			if !ok {
				return Event{}, fmt.Errorf("wait for QMP event: %w", ErrClosed)
			}
			if match(e) {
				return e, nil
			}
		case <-ctx.Done():
			return Event{}, fmt.Errorf("wait for QMP event: %w", ctx.Err())
		}
	}
}
