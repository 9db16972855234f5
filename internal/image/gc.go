package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sort"
	"sync"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Lease keeps an image and its layers for holder until Release. A holder may
// lease several images; leasing one twice is the same as once.
func (s *LocalStore) Lease(ctx context.Context, holder, id string) error {
	kept, err := s.LeaseSoon(ctx, holder, id)
	if err != nil {
		return err
	}
	return kept()
}

// soonLease is a lease that is on its way to the disk.
type soonLease struct{ holder, id string }

// LeaseSoon implements Store.
func (s *LocalStore) LeaseSoon(ctx context.Context, holder, id string) (kept func() error, err error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	if holder == "" || len(holder) > 256 {
		done()
		return nil, fmt.Errorf("lease: a holder's name has 1 to 256 bytes: %w", errdefs.ErrInvalidArgument)
	}
	l := &soonLease{holder: holder}
	err = s.db.View(func(tx *bolt.Tx) (err error) {
		l.id, err = resolve(tx, id)
		return err
	})
	if err != nil {
		done()
		return nil, err
	}
	s.soonMu.Lock()
	s.soon[l] = true
	s.soonMu.Unlock()
	res := make(chan error, 1)
	go func() {
		defer done()
		err := s.writeLease(l.holder, l.id)
		s.soonMu.Lock()
		delete(s.soon, l)
		s.soonMu.Unlock()
		res <- err
	}()
	return sync.OnceValue(func() error { return <-res }), nil
}

func (s *LocalStore) writeLease(holder, id string) error {
	return s.diskError(s.db.Update(func(tx *bolt.Tx) error {
		full, err := resolve(tx, id)
		if err != nil {
			return err
		}
		l, _, err := record[leaseRecord](tx, bucketLeases, holder)
		if err != nil || slices.Contains(l.IDs, full) {
			return err
		}
		l.IDs = append(l.IDs, full)
		sort.Strings(l.IDs)
		return putRecord(tx, bucketLeases, holder, l)
	}), 0)
}

// Release ends all leases of holder; it is no error when there are none.
func (s *LocalStore) Release(ctx context.Context, holder string) error {
	done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	return s.diskError(s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketLeases).Delete([]byte(holder))
	}), 0)
}

// Leases returns the ids that each holder keeps.
func (s *LocalStore) Leases(ctx context.Context) (map[string][]string, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	out := map[string][]string{}
	err = s.db.View(func(tx *bolt.Tx) error {
		return eachRecord(tx, bucketLeases, func(holder string, l leaseRecord) error {
			out[holder] = l.IDs
			return nil
		})
	})
	return out, err
}

// Prune removes images without a name and without a lease (all: every image
// without a lease), and the layers that no image has. It returns the ids and
// diffIDs that went, and the bytes of disk that came free.
func (s *LocalStore) Prune(ctx context.Context, all bool) (deleted []string, reclaimed int64, err error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	layers, reclaimed, err := s.collect(func(tx *bolt.Tx) error {
		names, leased, err := s.usage(tx)
		if err != nil {
			return err
		}
		var ids []string
		err = eachRecord(tx, bucketImages, func(id string, _ imageRecord) error {
			if leased[id] == "" && (all || len(names[id]) == 0) {
				ids = append(ids, id)
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, id := range ids {
			for _, n := range names[id] {
				if err := tx.Bucket(bucketNames).Delete([]byte(n)); err != nil {
					return err
				}
			}
			if err := tx.Bucket(bucketImages).Delete([]byte(id)); err != nil {
				return err
			}
		}
		deleted = ids
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("prune images: %w", s.diskError(err, 0))
	}
	return append(deleted, layers...), reclaimed, nil
}

// collect runs change (nil: none), and in the same transaction forgets the
// layers that no image and no work in progress needs; then it deletes their
// files. A crash in between leaves files that the next Open removes.
func (s *LocalStore) collect(change func(*bolt.Tx) error) (layers []string, reclaimed int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var files []string
	err = s.db.Update(func(tx *bolt.Tx) error {
		layers, files = nil, nil
		if change != nil {
			if err := change(tx); err != nil {
				return err
			}
		}
		needed := map[string]bool{}
		err := eachRecord(tx, bucketImages, func(_ string, rec imageRecord) error {
			for _, d := range rec.Layers {
				needed[d] = true
			}
			return nil
		})
		if err != nil {
			return err
		}
		err = eachRecord(tx, bucketLayers, func(d string, l layerRecord) error {
			if !needed[d] && s.pins[d] == 0 {
				layers = append(layers, d)
				files = append(files, s.blobPath(l.Blob), s.layerPath(d))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, d := range layers {
			if err := tx.Bucket(bucketLayers).Delete([]byte(d)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	for _, f := range files {
		var st unix.Stat_t
		if unix.Lstat(f, &st) == nil {
			reclaimed += st.Blocks * 512
		}
		if rerr := os.Remove(f); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
			s.opts.Logger.Warn("an unused file stays until the store is opened again", "path", f, "error", rerr)
		}
	}
	return layers, reclaimed, nil
}

// collectFailed removes what a failed operation left.
func (s *LocalStore) collectFailed() {
	if _, _, err := s.collect(nil); err != nil {
		s.opts.Logger.Warn("layers of a failed operation stay until the store is opened again", "error", err)
	}
}
