package server

import (
	"context"
	"testing"
	"time"
)

// A request waits for the endings that were told before it, not for later ones, and
// not longer than its own life.
func TestEndingsAreWaitedFor(t *testing.T) {
	var e endings
	e.wait(context.Background()) // there are none
	done := e.begin()
	waited := make(chan struct{})
	go func() {
		e.wait(context.Background())
		close(waited)
	}()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	e.wait(ctx)
	select {
	case <-waited:
		t.Fatal("nobody waited for an ending that is not recorded")
	case <-time.After(20 * time.Millisecond):
	}
	done()
	<-waited
	if len(e.all) != 0 {
		t.Errorf("%d endings are kept", len(e.all))
	}
}
