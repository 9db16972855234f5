package store

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// maxHistory is how many older values of a record that can't be read are tried.
const maxHistory = 50

// loose reads a record as far as that goes: without the content of files, which
// needs the key. nil if it can't.
func loose(k Key, b []byte, rev int64) Record {
	r := newRecord(k.Kind)
	if proto.Unmarshal(b, r) != nil || r.GetMeta().GetName() != k.Name || r.GetMeta().GetProject() != k.Project {
		return nil
	}
	for _, f := range filesOf(r) {
		f.Content = nil
	}
	r.GetMeta().Revision = uint64(rev)
	return r
}

// lastReadable finds the newest value of a record that can be read: this one, but
// for its sealed files, or an older one that etcd still has. nil if there is none.
func (s *Store) lastReadable(ctx context.Context, k Key, b []byte, rev int64) Record {
	for range maxHistory {
		if r := loose(k, b, rev); r != nil {
			return r
		}
		rctx, cancel := s.reqCtx(ctx)
		res, err := s.client.Get(rctx, k.path(), clientv3.WithRev(rev-1))
		cancel()
		if err != nil || len(res.Kvs) == 0 { // compacted, or there was none
			return nil
		}
		b, rev = res.Kvs[0].Value, res.Kvs[0].ModRevision
	}
	return nil
}

// lost lists the last readable copies of records that can't be read, in order. The lock is held.
func (c *cache) lost() []Record {
	out := make([]Record, 0, len(c.last))
	for _, k := range c.corruptKeys() {
		if r := c.last[k]; r != nil {
			out = append(out, r)
		}
	}
	return out
}

// LastOf picks one kind of the last readable copies out of a snapshot, and says
// whether there is one of every record of that kind that can't be read.
func LastOf[T Record](s *Snapshot) (list []T, all bool) {
	var zero T
	n := 0
	for _, k := range s.Corrupt {
		if k.Kind == KindOf(zero) {
			n++
		}
	}
	for _, r := range s.Last {
		if x, ok := r.(T); ok {
			list = append(list, x)
		}
	}
	return list, n == len(list)
}
