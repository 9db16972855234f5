package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/errdefs"

	"tandem/internal/files"
)

// A use is a file named as its disk; its content is the holder's id.

var validHolder = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}$`)

func (s *LocalStore) usePath(id string) string { return filepath.Join(s.dir, "uses", id) }

// holder is who has the disk attached; empty if nobody.
func (s *LocalStore) holder(id string) (string, error) {
	b, err := os.ReadFile(s.usePath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("volume %s: who uses it: %w", id, err)
	}
	if !validHolder.Match(b) {
		return "", fmt.Errorf("volume %s: %s is damaged; it should hold the id of the machine that has the disk: remove the file if no machine has: %w", id, s.usePath(id), errdefs.ErrDataLoss)
	}
	return string(b), nil
}

// Use implements Store.
func (s *LocalStore) Use(ctx context.Context, id, holder string) error {
	unlock, err := s.hold(id)
	if err != nil {
		return err
	}
	defer unlock()
	if !validHolder.MatchString(holder) {
		return fmt.Errorf("volume %s: holder %q: %w", id, holder, errdefs.ErrInvalidArgument)
	}
	if _, err := s.get(id); err != nil {
		return err
	}
	now, err := s.holder(id)
	if err != nil || now == holder {
		return err
	}
	if now != "" {
		return fmt.Errorf("volume %s: in use by %s: %w", id, now, errdefs.ErrFailedPrecondition)
	}
	if err := s.writeUse(id, holder); err != nil {
		return s.explain(id, int64(len(holder)), err)
	}
	return nil
}

func (s *LocalStore) writeUse(id, holder string) error {
	f, err := os.CreateTemp(filepath.Join(s.dir, "tmp"), "use-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(holder)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), s.usePath(id)); err != nil {
		return err
	}
	return files.SyncDir(filepath.Join(s.dir, "uses"))
}

// Unuse implements Store. A disk that holder does not have is no error, unless
// another has it: then FailedPrecondition.
func (s *LocalStore) Unuse(ctx context.Context, id, holder string) error {
	unlock, err := s.hold(id)
	if err != nil {
		return err
	}
	defer unlock()
	now, err := s.holder(id)
	if err != nil || now == "" {
		return err
	}
	if now != holder {
		return fmt.Errorf("volume %s: in use by %s, not by %s: %w", id, now, holder, errdefs.ErrFailedPrecondition)
	}
	if err := os.Remove(s.usePath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	return files.SyncDir(filepath.Join(s.dir, "uses"))
}
