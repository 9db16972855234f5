package jsonlog

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// follow goes on where rd stands (nil: the log has no file yet).
func follow(ctx context.Context, path string, rd *lineReader, w *watcher, o *Options, emit func([]byte) error) error {
	if rd != nil {
		// The file belongs to the caller's list; take a handle of its own.
		f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", rd.f.Fd()))
		if err != nil {
			return fmt.Errorf("container log: %w", err)
		}
		rd = &lineReader{f: f, off: rd.off}
	}
	defer func() {
		if rd != nil {
			rd.f.Close()
		}
	}()
	var until <-chan time.Time
	if !o.Until.IsZero() {
		t := time.NewTimer(time.Until(o.Until))
		defer t.Stop()
		until = t.C
	}
	for {
		if rd == nil {
			f, err := os.Open(path)
			if err == nil {
				rd = &lineReader{f: f}
			} else if !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("container log: %w", err)
			}
		}
		for rd != nil {
			if err := rd.all(ctx, emit); err != nil {
				return err
			}
			if same(rd.f, path) {
				break
			}
			// Rotated: nothing is added to this file any more; read what came
			// between, then go on with the next newer one.
			if err := rd.all(ctx, emit); err != nil {
				return err
			}
			next, err := newer(path, rd.f)
			if err != nil {
				return err
			}
			rd.f.Close()
			rd = nil
			if next == nil {
				break
			}
			rd = &lineReader{f: next}
		}
		if _, err := os.Stat(filepath.Dir(path)); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-until:
			return nil
		case <-w.changed:
		case <-time.After(2 * time.Second): // should a change have been missed
		}
	}
}

// newer opens the file that was begun after old; nil if it is not there yet.
func newer(path string, old *os.File) (*os.File, error) {
	st, err := old.Stat()
	if err != nil {
		return nil, fmt.Errorf("container log: %w", err)
	}
	files, err := openAll(path)
	if err != nil || len(files) == 0 {
		return nil, err
	}
	pick := 0 // old is gone: the oldest that is left
	for i, f := range files {
		if s, err := f.Stat(); err == nil && os.SameFile(s, st) {
			pick = i + 1
		}
	}
	var next *os.File
	if pick < len(files) {
		next = files[pick]
		files[pick] = files[len(files)-1]
		files = files[:len(files)-1]
	}
	closeAll(files)
	return next, nil
}

// watcher tells when something in the log's directory changed.
type watcher struct {
	f       *os.File
	changed chan struct{}
}

func newWatcher(path string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch container log: %w", err)
	}
	w := &watcher{f: os.NewFile(uintptr(fd), "inotify"), changed: make(chan struct{}, 1)}
	const mask = unix.IN_MODIFY | unix.IN_CREATE | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), mask); err != nil {
		w.f.Close()
		return nil, fmt.Errorf("watch container log: %w", err)
	}
	go func() {
		var buf [4096]byte
		for {
			if _, err := w.f.Read(buf[:]); err != nil {
				return
			}
			select {
			case w.changed <- struct{}{}:
			default:
			}
		}
	}()
	return w, nil
}

func (w *watcher) close() { w.f.Close() }
