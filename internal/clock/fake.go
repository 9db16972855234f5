package clock

import (
	"slices"
	"sync"
	"time"
)

// Fake is a clock that stands still until it is told to go on. Safe for use by many
// goroutines.
type Fake struct {
	mu     sync.Mutex
	now    time.Time
	timers []timer
}

type timer struct {
	at time.Time
	ch chan time.Time
}

// NewFake makes a clock that shows now.
func NewFake(now time.Time) *Fake { return &Fake{now: now} }

// Now is the time that the clock shows.
func (f *Fake) Now() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.now
}

// After sends once the clock has gone on by d; at once when d is not positive.
func (f *Fake) After(d time.Duration) <-chan time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	ch := make(chan time.Time, 1)
	if d <= 0 {
		ch <- f.now
		return ch
	}
	f.timers = append(f.timers, timer{f.now.Add(d), ch})
	return ch
}

// Advance lets the clock go on by d (not backwards), and wakes who waited, the
// earliest first.
func (f *Fake) Advance(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now = f.now.Add(max(d, 0))
	slices.SortStableFunc(f.timers, func(a, b timer) int { return a.at.Compare(b.at) })
	due := 0
	for due < len(f.timers) && !f.timers[due].at.After(f.now) {
		f.timers[due].ch <- f.timers[due].at
		due++
	}
	f.timers = slices.Delete(f.timers, 0, due)
}

// Waiting is how many wait for the clock to go on.
func (f *Fake) Waiting() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.timers)
}
