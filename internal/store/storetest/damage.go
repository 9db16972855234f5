// Package storetest harms a state on disk as a bad disk would, for tests of what
// happens then:
//
//	s.Close()
//	storetest.Damage(t, dir, store.Key{Kind: store.Containers, Project: "shop", Name: "web-1"}, storetest.Newest)
//	s, err = store.Open(ctx, store.Options{Dir: dir}) // goes on without that record
package storetest

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"tandem/internal/store"
)

// What of a record is damaged.
const (
	Newest = false // older copies can still be read
	All    = true  // none can
)

// Damage puts rubbish in the place of a record's value, or of all values that it
// ever had, in the state directory dir. No store uses the directory.
func Damage(t testing.TB, dir string, k store.Key, all bool) {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "etcd/member/snap/db"), 0o600, &bbolt.Options{Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	project := k.Project
	if project == "" {
		project = "_"
	}
	key := store.Prefix + string(k.Kind) + "/" + project + "/" + k.Name
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("key"))
		bad := map[string][]byte{}
		err := b.ForEach(func(rev, v []byte) error {
			kv := &mvccpb.KeyValue{}
			if err := proto.Unmarshal(v, kv); err != nil {
				return err
			}
			if string(kv.Key) != key || len(kv.Value) == 0 {
				return nil
			}
			if !all {
				clear(bad)
			}
			kv.Value = []byte("\xff\xff rubbish")
			v, err := proto.Marshal(kv)
			bad[string(bytes.Clone(rev))] = v
			return err
		})
		if err == nil && len(bad) == 0 {
			t.Errorf("there is no %s", k)
		}
		for rev, v := range bad {
			if err == nil {
				err = b.Put([]byte(rev), v)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
