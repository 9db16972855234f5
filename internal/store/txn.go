package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// Txn collects writes that happen together or not at all.
type Txn struct {
	s    *Store
	ops  []clientv3.Op
	cmps []clientv3.Cmp
	recs []Record
	keys []Key
	new  map[Key]bool
	size int64 // bytes written
	adds bool  // it does more than take things away
	err  error
}

// Txn starts a transaction.
func (s *Store) Txn() *Txn { return &Txn{s: s, new: make(map[Key]bool)} }

// Len is the number of writes so far.
func (t *Txn) Len() int { return len(t.ops) }

func (t *Txn) put(r Record, cmp clientv3.Cmp, k Key) {
	b, err := t.s.encode(k, r)
	if err == nil {
		err = checkKey(k)
	}
	if err != nil && t.err == nil {
		t.err = err
	}
	t.cmps, t.ops = append(t.cmps, cmp), append(t.ops, clientv3.OpPut(k.path(), string(b)))
	t.recs, t.keys = append(t.recs, r), append(t.keys, k)
	t.size += int64(len(b))
	t.adds = t.adds || !r.GetMeta().GetDeleting()
}

// Create adds a record that must not be there.
func (t *Txn) Create(r Record) *Txn {
	k := KeyOf(r)
	t.new[k] = true
	t.put(r, clientv3.Compare(clientv3.CreateRevision(k.path()), "=", 0), k)
	return t
}

// Update replaces a record that must still be at r's Meta.Revision.
func (t *Txn) Update(r Record) *Txn {
	k := KeyOf(r)
	t.put(r, clientv3.Compare(clientv3.ModRevision(k.path()), "=", int64(r.GetMeta().GetRevision())), k)
	return t
}

// Delete removes a record that must still be at r's Meta.Revision.
func (t *Txn) Delete(r Record) *Txn {
	k := KeyOf(r)
	t.cmps = append(t.cmps, clientv3.Compare(clientv3.ModRevision(k.path()), "=", int64(r.GetMeta().GetRevision())))
	t.ops = append(t.ops, clientv3.OpDelete(k.path()))
	t.keys = append(t.keys, k)
	return t
}

// Check lets the transaction fail unless r is still at its Meta.Revision.
func (t *Txn) Check(r Record) *Txn {
	k := KeyOf(r)
	t.cmps = append(t.cmps, clientv3.Compare(clientv3.ModRevision(k.path()), "=", int64(r.GetMeta().GetRevision())))
	t.keys = append(t.keys, k)
	return t
}

// Commit writes. It returns when the cache shows the writes, and sets the new
// revision in the records given. A record that moved on is Conflict, one that was
// to be created and is there AlreadyExists; nothing is written then. An empty
// transaction is nothing.
func (t *Txn) Commit(ctx context.Context) (uint64, error) {
	if t.err != nil {
		return 0, t.err
	}
	if len(t.ops) == 0 {
		return t.s.Revision(), nil
	}
	if len(t.ops) > maxTxnOps {
		return 0, fmt.Errorf("a transaction of %d writes (at most %d): %w", len(t.ops), maxTxnOps, errdefs.ErrInvalidArgument)
	}
	if t.s.ctx.Err() != nil {
		return 0, t.s.gone()
	}
	if err := t.s.admit(ctx, t.size+int64(128*(len(t.ops)+len(t.cmps))), t.adds); err != nil {
		return 0, err
	}
	rctx, cancel := t.s.reqCtx(ctx)
	defer cancel()
	res, err := t.s.client.Txn(rctx).If(t.cmps...).Then(t.ops...).Commit()
	if err != nil {
		return 0, t.s.wrap("writing the state", err)
	}
	rev := uint64(res.Header.Revision)
	if err := t.s.WaitRevision(rctx, rev); err != nil && res.Succeeded {
		return rev, err
	}
	if !res.Succeeded {
		return 0, t.why()
	}
	for _, r := range t.recs {
		r.GetMeta().Revision = rev
	}
	return rev, nil
}

// why finds what made a transaction fail.
func (t *Txn) why() error {
	var names []string
	for _, k := range t.keys {
		if t.new[k] {
			t.s.cache.mu.RLock()
			_, there := t.s.cache.kinds[k.Kind][k]
			bad := t.s.cache.corrupt[k]
			t.s.cache.mu.RUnlock()
			if bad != nil {
				return bad
			}
			if there {
				return fmt.Errorf("%s exists already: %w", k, errdefs.ErrAlreadyExists)
			}
		}
		if len(names) < 3 {
			names = append(names, k.String())
		}
	}
	return fmt.Errorf("somebody else changed one of %s: %w", strings.Join(names, ", "), errdefs.ErrConflict)
}

// Create writes one record; AlreadyExists when it is there.
func (s *Store) Create(ctx context.Context, r Record) (uint64, error) {
	return s.Txn().Create(r).Commit(ctx)
}

// Delete removes a record that is still at r's Meta.Revision.
func (s *Store) Delete(ctx context.Context, r Record) error {
	_, err := s.Txn().Delete(r).Commit(ctx)
	return err
}

// Purge removes whatever is at k, decodable or not: the way out of DataLoss.
func (s *Store) Purge(ctx context.Context, k Key) error {
	if err := checkKey(k); err != nil {
		return err
	}
	if err := s.admit(ctx, 256, false); err != nil {
		return err
	}
	rctx, cancel := s.reqCtx(ctx)
	defer cancel()
	res, err := s.client.Delete(rctx, k.path())
	if err != nil {
		return s.wrap("purging "+k.String(), err)
	}
	if res.Deleted == 0 {
		return fmt.Errorf("%s: %w", k, errdefs.ErrNotFound)
	}
	return s.WaitRevision(rctx, uint64(res.Header.Revision))
}

// Update reads a record, lets fn change a copy and writes it; when somebody wrote
// in between it does so again with what is there now. No change is no write.
func Update[T Record](ctx context.Context, s *Store, k Key, fn func(T) error) (T, error) {
	var zero T
	for try := 0; ; try++ {
		old, err := Get[T](s, k)
		if err != nil {
			return zero, err
		}
		r := proto.Clone(old).(T)
		if err := fn(r); err != nil {
			return zero, err
		}
		if proto.Equal(old, r) {
			return old, nil
		}
		r.GetMeta().Revision = old.GetMeta().GetRevision()
		_, err = s.Txn().Update(r).Commit(ctx)
		if err == nil {
			return r, nil
		}
		if !errdefs.IsConflict(err) || try == 20 {
			return zero, err
		}
	}
}

// wrap gives an error of etcd's a class.
func (s *Store) wrap(what string, err error) error {
	if f := s.Err(); f != nil {
		return f
	}
	var class error = errdefs.ErrUnavailable
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace), strings.Contains(err.Error(), "database space exceeded"):
		class = errdefs.ErrResourceExhausted
	case errors.Is(err, rpctypes.ErrRequestTooLarge), errors.Is(err, rpctypes.ErrTooManyOps), strings.Contains(err.Error(), "request is too large"):
		class = errdefs.ErrInvalidArgument
	case errors.Is(err, context.Canceled):
		class = context.Canceled
	}
	return fmt.Errorf("%s: %w: %w", what, err, class)
}
