package store

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/files"
)

// minFree is what must be free for the store to start without a reserve of its
// own: the segments of the log, and slack.
const minFree = 24 << 20

// prepareDir makes the directory, takes it for this process (the kernel lets go
// when it dies), and proves that it can be written durably.
func prepareDir(dir string) (_ *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory %s: %w: %w", dir, err, diskClass(err))
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	reserved := reserveForStart(dir)
	f, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return nil, fmt.Errorf("state directory %s can't be written: %w: %w", dir, err, diskClass(err))
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err = f.Write(make([]byte, 64<<10)); err == nil {
		err = f.Sync()
	}
	if err != nil {
		return nil, fmt.Errorf("state directory %s can't be written: %w: %w", dir, err, diskClass(err))
	}
	if free, _ := freeBytes(dir); !reserved && free < minFree {
		return nil, fmt.Errorf("state directory %s has no space left: %d MiB are free and %d are needed to start: free some: %w", dir,
			free>>20, minFree>>20, errdefs.ErrResourceExhausted)
	}
	return lock, nil
}

// lockDir takes the directory.
func lockDir(dir string) (*os.File, error) {
	p := filepath.Join(dir, "lock")
	f, err := os.OpenFile(p, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock of state directory %s: %w: %w", dir, err, diskClass(err))
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		who := "another server" + Holder(f)
		f.Close()
		return nil, fmt.Errorf("%s is using the state directory %s: stop it first or choose another --state-dir: %w", who, dir, errdefs.ErrFailedPrecondition)
	}
	pid := fmt.Appendf(nil, "%d\n", os.Getpid())
	if _, err := f.WriteAt(pid, 0); err == nil { // over the old one: its block is there, also on a full disk
		f.Truncate(int64(len(pid)))
	}
	return f, nil
}

// Holder names the process that a lock file says holds it, as " (pid 12)", or is "".
func Holder(lock io.ReaderAt) string {
	b := make([]byte, 32)
	n, _ := lock.ReadAt(b, 0)
	pid := strings.TrimSpace(string(b[:n]))
	if pid == "" || strings.Trim(pid, "0123456789") != "" {
		return ""
	}
	return " (pid " + pid + ")"
}

// loadKey reads the key that seals secrets, or makes it.
func loadKey(path string) (cipher.AEAD, error) {
	key, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		key = make([]byte, 32)
		rand.Read(key)
		if err = files.ReplaceDurably(path, key, 0o600); err != nil {
			return nil, fmt.Errorf("key file %s: %w: %w", path, err, diskClass(err))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w: %w", path, err, diskClass(err))
	}
	if len(key) != 32 {
		return nil, fmt.Errorf("key file %s has %d bytes, not 32: restore it from a backup, secrets can't be read without it: %w", path, len(key), errdefs.ErrDataLoss)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func diskClass(err error) error {
	switch {
	case errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrPermission):
		return errdefs.ErrFailedPrecondition
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return errdefs.ErrResourceExhausted
	}
	return errdefs.ErrUnavailable
}

func classOfFatal(dir, msg string) error {
	switch {
	case strings.Contains(msg, "no space left"), strings.Contains(msg, "quota exceeded"):
		return fmt.Errorf("the disk of the state directory %s is full: free some space and start again (%s): %w", dir, msg, errdefs.ErrResourceExhausted)
	case strings.Contains(msg, "read-only file system"):
		return fmt.Errorf("the state directory %s has become read-only (%s): %w", dir, msg, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("the state in %s can't be used: restore a backup (%s): %w", dir, msg, errdefs.ErrDataLoss)
}

type atomicString struct{ v atomic.Value }

func (a *atomicString) store(s string) { a.v.Store(s) }
func (a *atomicString) load() string   { s, _ := a.v.Load().(string); return s }
