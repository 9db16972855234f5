package watch

import (
	"context"
	"fmt"
	"testing"
	"time"

	"tandem/internal/hypervisor"
)

func TestSlowWatcherSeesFoldedButAll(t *testing.T) {
	var h Hub
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	slow := h.Watch(ctx)
	for i := range 1000 { // nobody reads: must not block
		for _, m := range []string{"a", "b"} {
			h.Publish(hypervisor.Event{Machine: m, Kind: hypervisor.EventExited, Message: fmt.Sprint(i)})
		}
	}
	h.Publish(hypervisor.Event{Machine: "a", Kind: hypervisor.EventStarted})
	last := map[string]string{}
	started := false
	for !started {
		select {
		case e := <-slow:
			if e.Kind == hypervisor.EventStarted {
				started = true
			} else {
				last[e.Machine] = e.Message
			}
		case <-time.After(10 * time.Second):
			t.Fatal("events lost")
		}
	}
	if last["a"] != "999" || last["b"] != "999" {
		t.Errorf("newest events not seen: %v", last)
	}
	cancel()
	for range slow { // closed in the end
	}
}

func TestClose(t *testing.T) {
	var h Hub
	c := h.Watch(context.Background())
	h.Publish(hypervisor.Event{Machine: "a", Kind: hypervisor.EventPanic})
	h.Close()
	h.Close()
	if e, ok := <-c; !ok || e.Kind != hypervisor.EventPanic {
		t.Errorf("pending event lost: %v %v", e, ok)
	}
	if _, ok := <-c; ok {
		t.Error("not closed")
	}
	if _, ok := <-h.Watch(context.Background()); ok {
		t.Error("watch of a closed hub")
	}
}
