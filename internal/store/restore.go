package store

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"tandem/internal/files"
)

// restoreJump is how far revisions jump: hosts remember the newest intent that they
// took and refuse older ones, and since the backup the state may have gone on.
const restoreJump = 1_000_000_000

const restoreTemp = ".restore-"

// Restore makes an empty state directory what a backup file has. While a server
// uses the directory, or when a state is in it, it is FailedPrecondition; a file
// that is damaged, cut off or no backup is DataLoss. Either all is restored or
// nothing is left behind; who is killed in the middle begins again.
func Restore(ctx context.Context, dir string, file io.Reader, log *slog.Logger) (_ *BackupHeader, err error) {
	_, before := os.Stat(dir)
	_, locked := os.Stat(filepath.Join(dir, "lock"))
	lock, err := prepareDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && errors.Is(locked, fs.ErrNotExist) {
			os.Remove(filepath.Join(dir, "lock"))
		}
		if err != nil && errors.Is(before, fs.ErrNotExist) {
			os.Remove(dir)
		}
		lock.Close()
	}()
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range list {
		switch n := e.Name(); {
		case strings.HasPrefix(n, restoreTemp):
			os.RemoveAll(filepath.Join(dir, n))
		case n != "lock" && n != "secret.key" && n != "ballast":
			return nil, fmt.Errorf("there is a state in %s already (%s): move it away first: %w", dir, n, errdefs.ErrFailedPrecondition)
		}
	}
	tmp, err := os.MkdirTemp(dir, restoreTemp)
	if err != nil {
		return nil, fmt.Errorf("restoring to %s: %w: %w", dir, err, diskClass(err))
	}
	defer os.RemoveAll(tmp)
	h, err := unpack(file, filepath.Join(tmp, "db"))
	if err != nil {
		return nil, err
	}
	key := filepath.Join(dir, "secret.key")
	if old, err := os.ReadFile(key); err == nil && string(old) != string(h.SecretKey) {
		return nil, fmt.Errorf("%s is another than the backup's: move it away first: %w", key, errdefs.ErrFailedPrecondition)
	}
	made := filepath.Join(tmp, "state")
	if err := os.Mkdir(made, 0o700); err != nil {
		return nil, fmt.Errorf("restoring to %s: %w: %w", dir, err, diskClass(err))
	}
	if err := files.ReplaceDurably(filepath.Join(made, "secret.key"), h.SecretKey, 0o600); err != nil {
		return nil, fmt.Errorf("restoring to %s: %w: %w", dir, err, diskClass(err))
	}
	if err := rebuild(ctx, made, filepath.Join(tmp, "db"), h, log); err != nil {
		return nil, err
	}
	// The data base comes last: with it the directory holds a state.
	for _, n := range []string{"secret.key", "etcd"} {
		if err := os.Rename(filepath.Join(made, n), filepath.Join(dir, n)); err != nil {
			return nil, fmt.Errorf("restoring to %s: %w", dir, err)
		}
		if err := files.SyncDir(dir); err != nil {
			return nil, fmt.Errorf("restoring to %s: %w", dir, err)
		}
	}
	return h, nil
}

// unpack checks a backup file and puts its data base into a file.
func unpack(file io.Reader, db string) (*BackupHeader, error) {
	f, err := os.OpenFile(db, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	h, err := readBackup(file, f)
	return h, errors.Join(err, f.Close())
}

// rebuild makes a new member, gives it the backup's records, and proves that it
// works.
func rebuild(ctx context.Context, dir, from string, h *BackupHeader, log *slog.Logger) error {
	s, err := Open(ctx, Options{Dir: dir, Logger: log})
	if err != nil {
		return fmt.Errorf("making a new state: %w", err)
	}
	if err := s.Close(); err != nil {
		return fmt.Errorf("making a new state: %w", err)
	}
	rev, err := transplant(from, filepath.Join(dir, "etcd", "member", "snap", "db"))
	if err != nil {
		return fmt.Errorf("the backup's data base: %w", err)
	}
	if s, err = Open(ctx, Options{Dir: dir, Logger: log}); err != nil {
		return fmt.Errorf("opening the restored state: %w", err)
	}
	defer s.Close()
	if s.ClusterID() != h.Cluster || s.Revision() != rev {
		return fmt.Errorf("the restored state is of cluster %s at revision %d instead of %s at %d: %w", s.ClusterID(), s.Revision(), h.Cluster, rev, errdefs.ErrDataLoss)
	}
	return s.Close()
}

// transplant replaces all of etcd's keys in one data base by those in another, and
// lets revisions jump: the cluster's id is written again that much later. What a
// member knows of itself stays its own.
func transplant(from, to string) (rev uint64, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("it is damaged (%v): %w", p, errdefs.ErrDataLoss)
		}
	}()
	src, err := bbolt.Open(from, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return 0, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	defer src.Close()
	dst, err := bbolt.Open(to, 0o600, &bbolt.Options{Timeout: 10 * time.Second, NoFreelistSync: true})
	if err != nil {
		return 0, err
	}
	defer dst.Close()
	var id *mvccpb.KeyValue
	err = src.View(func(stx *bbolt.Tx) error {
		keys := stx.Bucket([]byte("key"))
		if keys == nil {
			return fmt.Errorf("it has no keys: %w", errdefs.ErrDataLoss)
		}
		return dst.Update(func(dtx *bbolt.Tx) error {
			if err := dtx.DeleteBucket([]byte("key")); err != nil {
				return err
			}
			b, err := dtx.CreateBucket([]byte("key"))
			if err != nil {
				return err
			}
			b.FillPercent = 0.9 // they come in order
			err = keys.ForEach(func(k, v []byte) error {
				if len(k) < 17 || k[8] != '_' {
					return fmt.Errorf("key %q: %w", k, errdefs.ErrDataLoss)
				}
				rev = max(rev, binary.BigEndian.Uint64(k))
				kv := &mvccpb.KeyValue{}
				if err := proto.Unmarshal(v, kv); err != nil {
					return fmt.Errorf("key %x: %w: %w", k, err, errdefs.ErrDataLoss)
				}
				if string(kv.Key) == clusterKey {
					id = kv
				}
				return b.Put(k, v)
			})
			if err != nil {
				return err
			}
			if id == nil || rev > 1<<62 {
				return fmt.Errorf("it is no state of Tandem's: %w", errdefs.ErrDataLoss)
			}
			rev += restoreJump
			id.ModRevision, id.Version = int64(rev), id.Version+1
			v, err := proto.Marshal(id)
			if err != nil {
				return err
			}
			at := append(binary.BigEndian.AppendUint64(nil, rev), '_')
			if err := b.Put(binary.BigEndian.AppendUint64(at, 0), v); err != nil {
				return err
			}
			// What had been compacted is so here too.
			sm, dm := stx.Bucket([]byte("meta")), dtx.Bucket([]byte("meta"))
			for _, name := range []string{"finishedCompactRev", "scheduledCompactRev"} {
				if sm == nil || dm == nil {
					break
				}
				if v := sm.Get([]byte(name)); v != nil {
					err = dm.Put([]byte(name), v)
				} else {
					err = dm.Delete([]byte(name))
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
	return rev, err
}
