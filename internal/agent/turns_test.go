package agent

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
)

// A host or guest that shall start very many containers starts a few at a time,
// each within its limit of time, however long the last ones wait.
func TestStartsTakeTurns(t *testing.T) {
	rigged(t, func(r *rig) {
		var mu sync.Mutex
		now, most := 0, 0
		count := func(d int) {
			mu.Lock()
			defer mu.Unlock()
			now += d
			most = max(most, now)
		}
		r.w.rt.onStart = func(ctx context.Context, id string) error {
			count(1)
			defer count(-1)
			select {
			case <-time.After(20 * time.Second):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		limit := startsAtOnce(0)
		for i := range 300 {
			r.container(fmt.Sprintf("c%03d", i), "", "sleep")
		}
		r.a.metal.mu.Lock()
		r.a.metal.sess.turns = limit
		r.a.metal.mu.Unlock()
		r.apply()
		r.until(30*time.Minute, "all run", func() bool {
			for _, c := range r.spec.Containers {
				if st := r.status(c.Id); st.GetState() != running || strings.Contains(st.Message, "lost") {
					return false
				}
			}
			return true
		})
		if most != 4 {
			t.Errorf("%d containers were started at once, want 4", most)
		}
	})
}

// A container whose start got no answer is not called running before the
// runtime says so.
func TestStartWithoutAnAnswer(t *testing.T) {
	rigged(t, func(r *rig) {
		r.w.rt.onStart = func(context.Context, string) error {
			return fmt.Errorf("no answer: %w", context.DeadlineExceeded)
		}
		r.container("c", "", "sleep")
		r.apply()
		r.until(time.Minute, "the start is called", func() bool { return strings.Contains(r.status("c").GetMessage(), "no answer") })
		if st := r.status("c"); st.State != v1.ContainerState_CONTAINER_STATE_CREATING {
			t.Errorf("nobody knows whether it runs, its status says %v", st)
		}
		r.w.rt.mu.Lock()
		r.w.rt.onStart = nil
		r.w.rt.mu.Unlock()
		r.until(10*time.Minute, "it runs", r.state("c", running))
	})
}
