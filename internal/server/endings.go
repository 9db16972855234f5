package server

import (
	"context"
	"net/http"
	"sync"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/rpc"
	"tandem/internal/store"
)

// endings are containers whose exit code a client was told and whose record does not
// have it yet. The code comes by the stream that the client is attached to, and is
// told at once; the record follows within milliseconds. Whoever asks for anything in
// between waits for it: who has an exit code and then asks finds it so.
type endings struct {
	mu  sync.Mutex
	all map[chan struct{}]bool
}

// begin notes an ending; done says that it is recorded.
func (e *endings) begin() (done func()) {
	ch := make(chan struct{})
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.all == nil {
		e.all = map[chan struct{}]bool{}
	}
	e.all[ch] = true
	return func() {
		e.mu.Lock()
		delete(e.all, ch)
		e.mu.Unlock()
		close(ch)
	}
}

// wait returns when those that have begun are recorded, or ctx ends.
func (e *endings) wait(ctx context.Context) {
	e.mu.Lock()
	list := make([]chan struct{}, 0, len(e.all))
	for ch := range e.all {
		list = append(list, ch)
	}
	e.mu.Unlock()
	for _, ch := range list {
		select {
		case <-ch:
		case <-ctx.Done():
			return
		}
	}
}

// ended is called before a client is told the exit code of c's run.
func (s *Server) ended(c *v1.Container) {
	done := s.endings.begin()
	go func() {
		defer done()
		s.waitEnded(s.ctx, c)
	}()
}

// afterEndings lets every request but an agent's see the endings that were told
// before it came.
func (s *Server) afterEndings(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != rpc.TunnelPath {
			s.endings.wait(r.Context())
		}
		next.ServeHTTP(w, r)
	})
}

// endPatience is how long requests wait for the record of an exit code.
const endPatience = time.Second

// waitEnded returns when the record says that the container's run, of which c is an
// earlier copy, has ended, or when that takes too long.
func (s *Server) waitEnded(ctx context.Context, c *v1.Container) {
	ctx, cancel := context.WithTimeout(ctx, endPatience)
	defer cancel()
	for {
		_, changed := s.store.Changed()
		n, err := store.ByID[*v1.Container](s.store, store.Containers, c.Meta.Id)
		if err != nil {
			return
		}
		if st := n.GetStatus(); st.GetFinishedAt() != nil || st.GetRestartCount() > c.GetStatus().GetRestartCount() {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-s.store.Failed():
			return
		case <-changed:
		}
	}
}
