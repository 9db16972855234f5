package image

import (
	"context"
	"sync"

	v1 "tandem/api/tandem/v1"
)

// flightGroup lets callers that want the same thing share the work for it. The
// work runs until it is done or the last caller has gone; every caller sees its
// progress.
type flightGroup[T any] struct {
	mu    sync.Mutex
	calls map[string]*flight[T]
}

type flight[T any] struct {
	cancel  context.CancelFunc
	done    chan struct{}
	value   T
	err     error
	waiters int
	subs    map[int]ProgressFunc
	nextSub int
}

// do runs work for key, or joins the one that runs. joined tells which: a caller
// whose joined work failed may want to try for itself.
func (g *flightGroup[T]) do(ctx context.Context, key string, p ProgressFunc, work func(context.Context, ProgressFunc) (T, error)) (value T, joined bool, err error) {
	g.mu.Lock()
	f, joined := g.calls[key]
	if !joined {
		wctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		f = &flight[T]{cancel: cancel, done: make(chan struct{}), subs: map[int]ProgressFunc{}}
		if g.calls == nil {
			g.calls = map[string]*flight[T]{}
		}
		g.calls[key] = f
		go func() {
			defer cancel()
			f.value, f.err = work(wctx, func(m *v1.Progress) { g.tell(f, m) })
			g.mu.Lock()
			if g.calls[key] == f {
				delete(g.calls, key)
			}
			g.mu.Unlock()
			close(f.done)
		}()
	}
	f.waiters++
	sub := f.nextSub
	f.nextSub++
	if p != nil {
		f.subs[sub] = p
	}
	g.mu.Unlock()

	defer func() {
		g.mu.Lock()
		delete(f.subs, sub)
		f.waiters--
		last := f.waiters == 0
		if last && g.calls[key] == f {
			delete(g.calls, key) // a later caller must not join work that ends
		}
		g.mu.Unlock()
		if last {
			f.cancel()
			<-f.done // so that nothing of it is left when the caller is told
		}
	}()
	select {
	case <-f.done:
		return f.value, joined, f.err
	case <-ctx.Done():
		return value, joined, ctx.Err()
	}
}

func (g *flightGroup[T]) tell(f *flight[T], m *v1.Progress) {
	g.mu.Lock()
	subs := make([]ProgressFunc, 0, len(f.subs))
	for _, p := range f.subs {
		subs = append(subs, p)
	}
	g.mu.Unlock()
	for _, p := range subs {
		p(m)
	}
}

// cancelAll ends all work, for Close.
func (g *flightGroup[T]) cancelAll() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, f := range g.calls {
		f.cancel()
	}
}
