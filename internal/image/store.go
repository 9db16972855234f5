package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/files"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// LocalStore is a Store in a directory of this host:
//
//	lock            held while the store is open
//	meta.db         images, names, leases, layers (bbolt)
//	blobs/sha256/   layer blobs as they came (or zstd, when they came as plain tar)
//	layers/sha256/  <diffID>.ext4
//	tmp/            work in progress; emptied by Open
//
// A file is complete before it gets its final name, and has its final name
// before meta.db speaks of it; meta.db forgets it before it is deleted. Open
// therefore removes whatever meta.db does not speak of.
//
// All methods may be called by several goroutines at once.
type LocalStore struct {
	dir  string
	opts Options
	lock *os.File
	db   *bolt.DB

	// mu guards pins, and makes "is it needed?" and "delete it" one step.
	mu     sync.Mutex
	pins   map[string]int // diffIDs that work in progress needs
	soonMu sync.Mutex
	soon   map[*soonLease]bool
	closed bool

	layerWork flightGroup[struct{}]  // by diffID
	pullWork  flightGroup[*v1.Image] // by reference, platform and credentials
	slots     chan struct{}          // conversions and downloads at once
	ops       sync.WaitGroup
}

var _ Store = (*LocalStore)(nil)

// Open opens the store in dir, making it when it is new, and removes what a
// crash left behind. Only one process at a time can have it open: FailedPrecondition
// names the directory otherwise.
func Open(dir string, o Options) (*LocalStore, error) {
	o = o.withDefaults()
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("image store: %w", err)
	}
	s := &LocalStore{dir: dir, opts: o, pins: map[string]int{}, soon: map[*soonLease]bool{}, slots: make(chan struct{}, o.Parallel)}
	for _, d := range []string{dir, s.path("blobs", "sha256"), s.path("layers", "sha256"), s.path("tmp")} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("image store %s: %w", dir, err)
		}
	}
	if s.lock, err = lockDir(s.path("lock"), dir); err != nil {
		return nil, err
	}
	if err = s.openDB(); err == nil {
		err = s.sweep()
	}
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("image store %s: %w", dir, s.diskError(err, 0))
	}
	return s, nil
}

// openDB opens meta.db. A new one is made under another name first, so that a
// crash leaves none rather than half of one.
func (s *LocalStore) openDB() error {
	path, fresh := s.path("meta.db"), s.path("tmp", "meta.db")
	open := func(p string) (err error) {
		s.db, err = bolt.Open(p, 0o600, &bolt.Options{Timeout: 5 * time.Second, FreelistType: bolt.FreelistMapType})
		return err
	}
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		if err := os.RemoveAll(fresh); err != nil {
			return err
		}
		err := open(fresh)
		if err == nil {
			err = errors.Join(s.initDB(), s.db.Close())
			s.db = nil
		}
		if err == nil {
			err = os.Rename(fresh, path)
		}
		if err == nil {
			err = files.SyncDir(s.dir)
		}
		if err != nil {
			return err
		}
	}
	if err := open(path); err != nil {
		s.db = nil
		if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch) {
			return fmt.Errorf("%s is damaged (%v); restore it, or remove the directory and pull again: %w", path, err, errdefs.ErrDataLoss)
		}
		return err
	}
	return s.initDB()
}

func lockDir(path, dir string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("image store %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("image store %s is in use by another process; stop it or use another directory: %w", dir, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("lock image store %s: %w", dir, err)
	}
	return f, nil
}

func (s *LocalStore) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func (s *LocalStore) blobPath(digest string) string {
	return s.path("blobs", "sha256", strings.TrimPrefix(digest, "sha256:"))
}

func (s *LocalStore) layerPath(diffID string) string {
	return s.path("layers", "sha256", strings.TrimPrefix(diffID, "sha256:")+".ext4")
}

// Close waits for work in progress and closes the store. It may be called twice.
func (s *LocalStore) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.pullWork.cancelAll()
	s.layerWork.cancelAll()
	s.ops.Wait()
	var err error
	if s.db != nil {
		err = s.db.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// begin counts an operation that Close must wait for.
func (s *LocalStore) begin(ctx context.Context) (func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("image store %s is closed: %w", s.dir, errdefs.ErrUnavailable)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.ops.Add(1)
	return s.ops.Done, nil
}

// sweep removes what is not in meta.db: it was in progress when the process
// died. Layers that no image has go too.
func (s *LocalStore) sweep() error {
	tmp, err := os.ReadDir(s.path("tmp"))
	if err != nil {
		return err
	}
	for _, e := range tmp {
		if err := os.RemoveAll(s.path("tmp", e.Name())); err != nil {
			return err
		}
	}
	if _, _, err := s.collect(nil); err != nil {
		return err
	}
	keep := map[string]bool{}
	err = s.db.View(func(tx *bolt.Tx) error {
		return eachRecord(tx, bucketLayers, func(diffID string, l layerRecord) error {
			keep[s.blobPath(l.Blob)], keep[s.layerPath(diffID)] = true, true
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, d := range []string{s.path("blobs", "sha256"), s.path("layers", "sha256")} {
		entries, err := os.ReadDir(d)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if p := filepath.Join(d, e.Name()); !keep[p] {
				s.opts.Logger.Info("removing a file that was left behind", "path", p)
				if err := os.RemoveAll(p); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// workDir is a directory for one operation's files; it goes with its last user.
type workDir struct {
	path string
	mu   sync.Mutex
	refs int
}

func (s *LocalStore) newWorkDir() (*workDir, error) {
	p, err := os.MkdirTemp(s.path("tmp"), "work-")
	if err != nil {
		return nil, s.diskError(fmt.Errorf("make a work directory: %w", err), 0)
	}
	return &workDir{path: p, refs: 1}, nil
}

func (w *workDir) hold() *workDir {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refs++
	return w
}

func (w *workDir) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refs--; w.refs == 0 {
		os.RemoveAll(w.path)
	}
}
