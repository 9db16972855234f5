package agent

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
)

// world is a host without the agent: it outlives agents.
type world struct {
	drv  *fakeDriver
	rt   *fakeRuntime // metal
	imgs *fakeImages
	vols *fakeVolumes
	net  *fakeNetwork

	gmu    sync.Mutex
	gen    int    // the agent that lives; calls of others do nothing
	killIn int    // calls until it is killed; 0: never
	after  bool   // that call still takes effect
	killed func() // keeps what is on disk at that instant
}

type genKey struct{}

// gate is passed by every call of an agent into the world. It kills the agent at
// a chosen call: from then on nothing that it does has an effect.
func (w *world) gate(ctx context.Context) error {
	gen, ok := ctx.Value(genKey{}).(int)
	if !ok {
		return nil
	}
	w.gmu.Lock()
	defer w.gmu.Unlock()
	dead := fmt.Errorf("this agent was killed: %w", errdefs.ErrUnavailable)
	if gen != w.gen {
		return dead
	}
	if w.killIn > 0 {
		if w.killIn--; w.killIn == 0 {
			w.gen++
			w.killed()
			if !w.after {
				return dead
			}
		}
	}
	return nil
}

func newWorld() *world {
	w := &world{rt: newFakeRuntime(), imgs: newFakeImages(), vols: newFakeVolumes(), net: &fakeNetwork{}}
	w.drv = &fakeDriver{w: w, ms: map[string]*fakeMachine{}, templates: map[string]bool{}, watchers: map[chan hypervisor.Event]bool{},
		bootTime: 6 * time.Second, cloneTime: 400 * time.Millisecond, nextPID: 100}
	w.rt.w, w.imgs.w, w.vols.w, w.net.w = w, w, w, w
	w.vols.removed = func(id string) {
		w.drv.mu.Lock()
		defer w.drv.mu.Unlock()
		if m := w.drv.ms[strings.TrimPrefix(id, "scratch-")]; m != nil {
			m.keep = false
		}
	}
	return w
}
