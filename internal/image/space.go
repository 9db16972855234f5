package image

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	units "github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// free returns the bytes that can still be written to the store.
func (s *LocalStore) free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// needSpace fails early when n more bytes surely don't fit.
func (s *LocalStore) needSpace(what string, n int64) error {
	free, err := s.free()
	if err != nil || n <= free {
		return err
	}
	return noSpace(what, n, free, s.dir)
}

func noSpace(what string, need, free int64, dir string) error {
	n := "more"
	if need > 0 {
		n = units.BytesSize(float64(need))
	}
	return fmt.Errorf("%s: no space: needs %s, %s free in %s; make room or prune images: %w",
		what, n, units.BytesSize(float64(free)), dir, errdefs.ErrResourceExhausted)
}

// diskError gives the error of a write its class when the disk is full.
func (s *LocalStore) diskError(err error, need int64) error {
	if err == nil || errors.Is(err, errdefs.ErrResourceExhausted) {
		return err
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		free, ferr := s.free()
		if ferr != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
		}
		return noSpace(err.Error(), need, free, s.dir)
	}
	return err
}
