package store

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// load fills the cache from etcd, page by page at one revision, and returns it.
func (s *Store) load(ctx context.Context) (int64, error) {
	seen := make(map[Key]bool)
	type item struct {
		k    Key
		r    Record
		last Record // of one that can't be read
		err  error
	}
	var items []item
	var rev int64
	from, end := Prefix, clientv3.GetPrefixRangeEnd(Prefix)
	for {
		rctx, cancel := s.reqCtx(ctx)
		res, err := s.client.Get(rctx, from, clientv3.WithRange(end), clientv3.WithLimit(2000), clientv3.WithRev(rev))
		cancel()
		if err != nil {
			return 0, s.wrap("reading the state", err)
		}
		if rev == 0 {
			rev = res.Header.Revision
		}
		for _, kv := range res.Kvs {
			k, ok := parsePath(string(kv.Key))
			if !ok {
				s.log.Warn("unknown key in the state store, left alone", "key", string(kv.Key))
				continue
			}
			seen[k] = true
			r, err := s.decode(k, kv.Value, kv.ModRevision)
			it := item{k: k, r: r, err: err}
			if err != nil {
				it.last = s.lastReadable(ctx, k, kv.Value, kv.ModRevision)
				s.log.Error("record left out", "err", err, "older_copy", it.last != nil)
			}
			items = append(items, it)
		}
		if !res.More || len(res.Kvs) == 0 {
			break
		}
		from = string(res.Kvs[len(res.Kvs)-1].Key) + "\x00"
	}
	c := &s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.kinds {
		for k := range m {
			if !seen[k] {
				c.set(k, nil, nil)
			}
		}
	}
	for k := range c.corrupt {
		if !seen[k] {
			c.set(k, nil, nil)
		}
	}
	for _, it := range items {
		if it.err != nil {
			c.set(it.k, nil, it.err)
			if it.last != nil && c.last[it.k] == nil {
				c.last[it.k] = it.last
			}
		} else if old := c.kinds[it.k.Kind][it.k]; old == nil || old.GetMeta().GetRevision() != it.r.GetMeta().GetRevision() {
			c.set(it.k, it.r, nil)
		}
	}
	c.advance(uint64(rev))
	return rev, nil
}

// follow feeds the cache from etcd's watch until the store closes.
func (s *Store) follow(rev int64) {
	defer close(s.done)
	for s.ctx.Err() == nil {
		wctx, cancel := context.WithCancel(s.ctx)
		for res := range s.client.Watch(wctx, Prefix, clientv3.WithPrefix(), clientv3.WithRev(rev+1), clientv3.WithProgressNotify()) {
			if err := res.Err(); err != nil {
				s.log.Warn("watch of the state broke, reading it again", "err", err)
				break
			}
			s.apply(res)
			if res.Header.Revision > rev {
				rev = res.Header.Revision
			}
		}
		cancel()
		if s.ctx.Err() != nil {
			return
		}
		if r, err := s.load(s.ctx); err == nil {
			rev = r
			continue
		}
		select {
		case <-time.After(time.Second):
		case <-s.ctx.Done():
		}
	}
}

func (s *Store) apply(res clientv3.WatchResponse) {
	type item struct {
		k    Key
		r    Record
		last Record
		err  error
	}
	items := make([]item, 0, len(res.Events))
	for _, e := range res.Events {
		k, ok := parsePath(string(e.Kv.Key))
		if !ok {
			continue
		}
		it := item{k: k}
		if e.Type == clientv3.EventTypePut {
			it.r, it.err = s.decode(k, e.Kv.Value, e.Kv.ModRevision)
			if it.err != nil {
				s.log.Error("record left out", "err", it.err)
				it.last = s.lastReadable(s.ctx, k, e.Kv.Value, e.Kv.ModRevision)
			}
		}
		items = append(items, it)
	}
	c := &s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, it := range items {
		c.set(it.k, it.r, it.err)
		if it.last != nil && c.last[it.k] == nil {
			c.last[it.k] = it.last
		}
	}
	c.advance(uint64(res.Header.Revision))
}

// Watch streams changes after revision from of these kinds (none: all), in
// order, each as etcd has it (Old is always nil). It ends with ctx, or with an
// error in the second channel: OutOfRange when from has been compacted away (List
// again, then watch).
func (s *Store) Watch(ctx context.Context, from uint64, kinds ...Kind) (<-chan Change, <-chan error) {
	out, errs := make(chan Change, 64), make(chan error, 1)
	want := make(map[Kind]bool)
	for _, k := range kinds {
		want[k] = true
	}
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(s.ctx, cancel)
	go func() {
		defer cancel()
		defer close(out)
		for res := range s.client.Watch(ctx, Prefix, clientv3.WithPrefix(), clientv3.WithRev(int64(from)+1)) {
			if res.CompactRevision != 0 {
				errs <- fmt.Errorf("revision %d is older than what is kept (%d): list again: %w", from, res.CompactRevision, errdefs.ErrOutOfRange)
				return
			}
			if err := res.Err(); err != nil {
				errs <- s.wrap("watching the state", err)
				return
			}
			for _, e := range res.Events {
				k, ok := parsePath(string(e.Kv.Key))
				if !ok || (len(want) > 0 && !want[k.Kind]) {
					continue
				}
				c := Change{Key: k}
				if e.Type == clientv3.EventTypePut {
					r, err := s.decode(k, e.Kv.Value, e.Kv.ModRevision)
					if err != nil {
						continue // reported where the cache meets it
					}
					c.New = r
				}
				select {
				case out <- c:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, errs
}
