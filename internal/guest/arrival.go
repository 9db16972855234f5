package guest

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// arrivals tells those who wait for a device that one has come.
type arrivals struct {
	mu      sync.Mutex
	ch      chan struct{} // closed at the next arrival; nil: nobody waits
	watched bool
}

// arrived is fed by the agent; elsewhere nothing arrives, and one has to look.
var arrived arrivals

// next is closed when a disk or a network interface comes, and says whether
// somebody watches for that.
func (a *arrivals) next() (<-chan struct{}, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ch == nil {
		a.ch = make(chan struct{})
	}
	return a.ch, a.watched
}

// tell wakes all who wait.
func (a *arrivals) tell() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ch != nil {
		close(a.ch)
		a.ch = nil
	}
}

func (a *arrivals) watch(yes bool) {
	a.mu.Lock()
	a.watched = yes
	a.mu.Unlock()
	a.tell()
}

// follow feeds arrivals by the kernel's events until ctx ends (seen at the next
// event: the process ends then, too).
func (a *arrivals) follow(ctx context.Context, log *slog.Logger) {
	for ctx.Err() == nil {
		err := eachUevent(func() { a.watch(true) }, func(action, subsystem string) {
			if (subsystem == "block" || subsystem == "net") && action != "remove" {
				a.tell()
			}
		})
		a.watch(false)
		log.Warn("events of devices can't be read; looking for them instead", "error", err)
		time.Sleep(time.Second)
	}
}
