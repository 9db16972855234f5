// Package clock is where time comes from, so that tests can bring their own and
// failures in time can be replayed. What waits or stamps takes a Clock in its
// options, and uses System when it was given none:
//
//	if o.Clock == nil {
//		o.Clock = clock.System{}
//	}
//
// Tests that move time by themselves bring a Fake:
//
//	c := clock.NewFake(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC))
//	c.Advance(3 * time.Second) // whoever waits for less than that goes on
package clock

import "time"

// Clock tells the time.
type Clock interface {
	// Now is the time of day, as time.Now.
	Now() time.Time
	// After sends once, d from now, as time.After.
	After(d time.Duration) <-chan time.Time
}

// System is this computer's clock.
type System struct{}

// Now is time.Now.
func (System) Now() time.Time { return time.Now() }

// After is time.After.
func (System) After(d time.Duration) <-chan time.Time { return time.After(d) }
