package volume

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/files"
)

const (
	// MinSize and MaxSize bound a disk's size, in bytes.
	MinSize = 16 << 20
	MaxSize = 64 << 40

	// DefaultReserve of Options.
	DefaultReserve = 64 << 20
)

// Options of a LocalStore. The zero value is good.
type Options struct {
	// Reserve is how many bytes must be free on the host's file system for a new
	// disk to be made: disks are sparse, so that many fit, until they fill up.
	// DefaultReserve if zero; negative for none.
	Reserve int64
	// LockTimeout is how long Open waits for another process to let go of the
	// directory; 10 s if zero.
	LockTimeout time.Duration
	// Logger; slog.Default() if nil.
	Logger *slog.Logger
}

// LocalStore keeps disks as files below one directory:
//
//	lock            flock: one process at a time, and the tools it started
//	disks/ID.img    the disks
//	uses/ID         who has it attached
//	templates/      scratch file systems, made once for each size
//	undo/ID*        that a disk is growing, and how to undo it
//	tmp/            disks not finished; emptied by Open
//
// A disk appears under its name by rename only, finished: a process killed at any
// point leaves no half disk. Methods may be called from any goroutine; calls on
// one disk are serialised.
type LocalStore struct {
	dir   string
	o     Options
	lock  *os.File
	locks [64]sync.Mutex
	tmpl  sync.Mutex
	tools tools
}

var _ Store = (*LocalStore)(nil)

var validID = regexp.MustCompile(`^[a-z0-9-]{1,64}$`)

// Open takes a directory, made if missing, for this process alone: while another
// has it, Open waits for Options.LockTimeout and is then Unavailable.
func Open(dir string, o Options) (*LocalStore, error) {
	if o.Reserve == 0 {
		o.Reserve = DefaultReserve
	}
	if o.LockTimeout == 0 {
		o.LockTimeout = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	lock, err := lockDir(dir, o.LockTimeout)
	if err != nil {
		return nil, err
	}
	s := &LocalStore{dir: dir, o: o, lock: lock}
	if s.tools, err = findTools(lock); err == nil {
		err = s.prepare()
	}
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("volumes in %s: %w", dir, err)
	}
	return s, nil
}

func lockDir(dir string, patience time.Duration) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if time.Now().After(end) {
			f.Close()
			return nil, fmt.Errorf("volumes in %s: another process uses them (or a file system tool that it started is still running): %w", dir, errdefs.ErrUnavailable)
		}
	}
}

func (s *LocalStore) prepare() error {
	if err := os.RemoveAll(filepath.Join(s.dir, "tmp")); err != nil {
		return err
	}
	for _, d := range []string{"disks", "uses", "templates", "undo", "tmp"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// Close implements Store. Disks and their uses stay.
func (s *LocalStore) Close() error { return s.lock.Close() }

func (s *LocalStore) path(id string) string { return filepath.Join(s.dir, "disks", id+".img") }

// hold checks an id and serialises calls on its disk.
func (s *LocalStore) hold(id string) (func(), error) {
	if !validID.MatchString(id) {
		return nil, fmt.Errorf("volume id %q: must be [a-z0-9-]{1,64}: %w", id, errdefs.ErrInvalidArgument)
	}
	h := fnv.New32a()
	h.Write([]byte(id))
	l := &s.locks[h.Sum32()%uint32(len(s.locks))]
	l.Lock()
	return l.Unlock, nil
}

// Ensure implements Store. The file system has a journal and a UUID of its own,
// and is empty: without lost+found, as databases want it.
func (s *LocalStore) Ensure(ctx context.Context, id string, sizeBytes int64) (Volume, error) {
	return s.ensure(ctx, id, sizeBytes, false)
}

// EnsureScratch implements Store.
func (s *LocalStore) EnsureScratch(ctx context.Context, id string, sizeBytes int64) (Volume, error) {
	return s.ensure(ctx, id, sizeBytes, true)
}

func (s *LocalStore) ensure(ctx context.Context, id string, size int64, scratch bool) (Volume, error) {
	unlock, err := s.hold(id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	if size < MinSize || size > MaxSize {
		return Volume{}, fmt.Errorf("volume %s: size %d bytes: must be %d to %d: %w", id, size, int64(MinSize), int64(MaxSize), errdefs.ErrInvalidArgument)
	}
	size = (size + 4095) &^ 4095
	v, err := s.get(id)
	if err == nil && scratch && fsSize(v.Path) <= 0 {
		// Scratch disks are not flushed when made: after a power cut one may be
		// rubbish. It is worth nothing either way.
		if holder, herr := s.holder(id); herr == nil && holder == "" {
			s.o.Logger.Warn("scratch disk is damaged; it is made anew", "disk", id)
			err = errdefs.ErrNotFound
		}
	}
	switch {
	case errors.Is(err, errdefs.ErrNotFound):
		if err := s.create(ctx, id, size, scratch); err != nil {
			return Volume{}, s.explain(id, size, err)
		}
	case err != nil:
		return Volume{}, err
	case size < v.SizeBytes:
		return Volume{}, fmt.Errorf("volume %s: has %d bytes and can't shrink to %d: %w", id, v.SizeBytes, size, errdefs.ErrInvalidArgument)
	default:
		if err := s.grow(ctx, v, size, scratch); err != nil {
			return Volume{}, s.explain(id, size, err)
		}
	}
	return s.get(id)
}

// explain turns a full disk into an error with numbers.
func (s *LocalStore) explain(id string, size int64, err error) error {
	free, total, serr := s.space()
	full := errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || strings.Contains(err.Error(), "No space left")
	if serr == nil && full {
		return fmt.Errorf("volume %s of %d bytes: the file system of %s has %d of %d bytes free: make room, or move the state directory: %w (%w)", id, size, s.dir, free, total, errdefs.ErrResourceExhausted, err)
	}
	return fmt.Errorf("volume %s: %w", id, err)
}

func (s *LocalStore) space() (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, 0, err
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

// Get implements Store.
func (s *LocalStore) Get(ctx context.Context, id string) (Volume, error) {
	unlock, err := s.hold(id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	return s.get(id)
}

func (s *LocalStore) get(id string) (Volume, error) {
	st, err := os.Lstat(s.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return Volume{}, fmt.Errorf("volume %s: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", id, err)
	}
	used := st.Size()
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		used = sys.Blocks * 512
	}
	holder, _ := s.holder(id) // a damaged mark is told by what needs it
	return Volume{ID: id, Path: s.path(id), SizeBytes: st.Size(), UsedBytes: used, Holder: holder}, nil
}

// List implements Store, sorted by id.
func (s *LocalStore) List(ctx context.Context) ([]Volume, error) {
	es, err := os.ReadDir(filepath.Join(s.dir, "disks"))
	if err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	var out []Volume
	for _, e := range es {
		id, ok := strings.CutSuffix(e.Name(), ".img")
		if !ok || !validID.MatchString(id) {
			continue
		}
		v, err := s.get(id)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, ctx.Err()
}

// Remove implements Store. What is gone is no error.
func (s *LocalStore) Remove(ctx context.Context, id string) error {
	unlock, err := s.hold(id)
	if err != nil {
		return err
	}
	defer unlock()
	holder, err := s.holder(id)
	if err != nil {
		return err
	}
	if holder != "" {
		return fmt.Errorf("volume %s: in use by %s: %w", id, holder, errdefs.ErrFailedPrecondition)
	}
	for _, p := range []string{s.undoPath(id), s.markPath(id), s.path(id)} {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("volume %s: %w", id, err)
		}
	}
	return files.SyncDir(filepath.Join(s.dir, "disks"))
}
