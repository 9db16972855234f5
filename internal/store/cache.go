package store

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
)

// cache holds every record, decoded. A record in it is never modified, only
// replaced.
type cache struct {
	mu      sync.RWMutex
	rev     uint64
	kinds   map[Kind]map[Key]Record
	ids     map[string]Key // kind + "/" + id
	corrupt map[Key]error
	last    map[Key]Record // last readable copies of corrupt ones
	moved   chan struct{}  // closed and renewed when rev grows
	subs    map[*Subscription]struct{}
	closed  bool
}

func (c *cache) init() {
	c.kinds = make(map[Kind]map[Key]Record)
	for _, k := range Kinds {
		c.kinds[k] = make(map[Key]Record)
	}
	c.ids = make(map[string]Key)
	c.corrupt = make(map[Key]error)
	c.last = make(map[Key]Record)
	c.moved = make(chan struct{})
	c.subs = make(map[*Subscription]struct{})
}

func (c *cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		close(c.moved)
	}
}

// set replaces a record (r nil: deletes it). The lock is held.
func (c *cache) set(k Key, r Record, bad error) {
	m := c.kinds[k.Kind]
	old := m[k]
	_, wasBad := c.corrupt[k]
	delete(c.corrupt, k)
	if old != nil && old.GetMeta().GetId() != "" {
		delete(c.ids, string(k.Kind)+"/"+old.GetMeta().GetId())
	}
	if bad == nil {
		delete(c.last, k)
	} else if old != nil {
		c.last[k] = old
	}
	if r == nil {
		delete(m, k)
		if bad != nil {
			c.corrupt[k] = bad
		}
	} else {
		m[k] = r
		if id := r.GetMeta().GetId(); id != "" {
			c.ids[string(k.Kind)+"/"+id] = k
		}
	}
	if old == nil && r == nil && wasBad == (bad != nil) {
		return
	}
	// That a record can't be read, or that such a one went, wakes subscribers too:
	// the lists are no longer, or again, complete.
	for s := range c.subs {
		s.add(Change{Key: k, Old: old, New: r})
	}
}

// advance says that the cache is at rev. The lock is held.
func (c *cache) advance(rev uint64) {
	if rev > c.rev && !c.closed {
		c.rev = rev
		close(c.moved)
		c.moved = make(chan struct{})
	}
}

// Revision is the revision of etcd that the cache has reached.
func (s *Store) Revision() uint64 {
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	return s.cache.rev
}

// Changed returns the revision that the cache has reached and a channel that is
// closed when it goes beyond. It is closed too when the store closes: see Failed.
func (s *Store) Changed() (uint64, <-chan struct{}) {
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	return s.cache.rev, s.cache.moved
}

// WaitRevision returns when the cache has reached rev.
func (s *Store) WaitRevision(ctx context.Context, rev uint64) error {
	for {
		at, moved := s.Changed()
		if at >= rev {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return fmt.Errorf("waiting for revision %d (at %d): %w", rev, at, ctx.Err())
		}
		if s.ctx.Err() != nil {
			return s.gone()
		}
	}
}

func (s *Store) gone() error {
	if err := s.Err(); err != nil {
		return err
	}
	return fmt.Errorf("the state store is closed: %w", errdefs.ErrUnavailable)
}

// Get reads a record from the cache. Do not modify it.
func Get[T Record](s *Store, k Key) (T, error) {
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	var zero T
	if r, ok := s.cache.kinds[k.Kind][k].(T); ok {
		return r, nil
	}
	if err := s.cache.corrupt[k]; err != nil {
		return zero, err
	}
	return zero, fmt.Errorf("%s: %w", k, errdefs.ErrNotFound)
}

// ByID finds a record by kind and id. Do not modify it.
func ByID[T Record](s *Store, kind Kind, id string) (T, error) {
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	var zero T
	if k, ok := s.cache.ids[string(kind)+"/"+id]; ok {
		if r, ok := s.cache.kinds[kind][k].(T); ok {
			return r, nil
		}
	}
	return zero, fmt.Errorf("%s with id %s: %w", kind, id, errdefs.ErrNotFound)
}

// List reads all records of T's kind, of one project unless that is empty,
// ordered by project and name. Do not modify them.
func List[T Record](s *Store, project string) []T {
	var zero T
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	return list[T](&s.cache, KindOf(zero), project)
}

func list[T Record](c *cache, kind Kind, project string) []T {
	m := c.kinds[kind]
	out := make([]T, 0, len(m))
	for k, r := range m {
		if project == "" || k.Project == project {
			out = append(out, r.(T))
		}
	}
	slices.SortFunc(out, func(a, b T) int {
		x, y := a.GetMeta(), b.GetMeta()
		return cmp.Or(cmp.Compare(x.GetProject(), y.GetProject()), cmp.Compare(x.GetName(), y.GetName()))
	})
	return out
}

// Corrupt names the records that could not be decoded, each with its error.
func (s *Store) Corrupt() map[Key]error {
	s.cache.mu.RLock()
	defer s.cache.mu.RUnlock()
	out := make(map[Key]error, len(s.cache.corrupt))
	for k, e := range s.cache.corrupt {
		out[k] = e
	}
	return out
}

// corruptKeys lists them in order. The lock is held.
func (c *cache) corruptKeys() []Key {
	if len(c.corrupt) == 0 {
		return nil
	}
	out := make([]Key, 0, len(c.corrupt))
	for k := range c.corrupt {
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b Key) int { return cmp.Compare(a.String(), b.String()) })
	return out
}

// Change is one record's change: Old nil when it was made, New nil when it went.
type Change struct {
	Key      Key
	Old, New Record
}

// Subscription collects changes of some kinds. Changes of one record between two
// Takes become one.
type Subscription struct {
	s     *Store
	kinds map[Kind]bool
	ready chan struct{}

	mu      sync.Mutex
	pending map[Key]int
	queue   []Change
}

// Subscribe starts to collect changes of these kinds (none: all). With initial,
// the records that are there come first, as if just made. Close it after use.
func (s *Store) Subscribe(initial bool, kinds ...Kind) *Subscription {
	if len(kinds) == 0 {
		kinds = Kinds
	}
	sub := &Subscription{s: s, kinds: make(map[Kind]bool), ready: make(chan struct{}, 1), pending: make(map[Key]int)}
	for _, k := range kinds {
		sub.kinds[k] = true
	}
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	if initial {
		for _, kind := range Kinds {
			for k, r := range s.cache.kinds[kind] {
				sub.add(Change{Key: k, New: r})
			}
		}
	}
	s.cache.subs[sub] = struct{}{}
	return sub
}

func (s *Subscription) add(c Change) {
	if !s.kinds[c.Key.Kind] {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.pending[c.Key]; ok {
		s.queue[i].New = c.New
	} else {
		s.pending[c.Key] = len(s.queue)
		s.queue = append(s.queue, c)
	}
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

// Ready receives when there is something to Take.
func (s *Subscription) Ready() <-chan struct{} { return s.ready }

// Take returns what has changed since the last Take, in order of first change.
func (s *Subscription) Take() []Change {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.queue
	s.queue, s.pending = nil, make(map[Key]int)
	out := q[:0]
	for _, c := range q {
		if c.Old != nil || c.New != nil {
			out = append(out, c)
		}
	}
	return out
}

// Close ends the collecting.
func (s *Subscription) Close() {
	s.s.cache.mu.Lock()
	defer s.s.cache.mu.Unlock()
	delete(s.s.cache.subs, s)
}
