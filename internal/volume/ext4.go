package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/files"
)

// tools are the programs of e2fsprogs. They inherit the lock: as long as one that
// a killed process had started is writing, nobody else opens the store.
type tools struct {
	mkfs, fsck, resize, undo, debugfs string
	lock                              *os.File
}

func findTools(lock *os.File) (t tools, err error) {
	t.lock = lock
	for name, p := range map[string]*string{
		"mkfs.ext4": &t.mkfs, "e2fsck": &t.fsck, "resize2fs": &t.resize, "e2undo": &t.undo, "debugfs": &t.debugfs,
	} {
		if *p, err = exec.LookPath(name); err == nil {
			continue
		}
		for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in every PATH
			if f := filepath.Join(dir, name); unix.Access(f, unix.X_OK) == nil {
				*p = f
			}
		}
		if *p == "" {
			return t, fmt.Errorf("%s is missing: install e2fsprogs: %w", name, errdefs.ErrFailedPrecondition)
		}
	}
	return t, nil
}

// run runs a tool; codes up to okUpTo are success.
func (t tools) run(ctx context.Context, okUpTo int, prog string, args ...string) error {
	c := exec.CommandContext(ctx, prog, args...)
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	c.ExtraFiles = []*os.File{t.lock}
	out := &tail{}
	c.Stdout, c.Stderr = out, out
	err := c.Run()
	var ee *exec.ExitError
	if errors.As(err, &ee) && ee.ExitCode() > 0 && ee.ExitCode() <= okUpTo {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(prog), errors.Join(err, ctx.Err()), bytes.TrimSpace(out.b))
	}
	return nil
}

// tail keeps the last words of a program.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	if t.b = append(t.b, p...); len(t.b) > 4096 {
		t.b = t.b[len(t.b)-2048:]
	}
	return len(p), nil
}

// create makes a disk under a temporary name, finished, and renames it.
func (s *LocalStore) create(ctx context.Context, id string, size int64, scratch bool) error {
	if err := s.room(); err != nil {
		return err
	}
	tmp, err := s.temp(id)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if scratch {
		err = s.fromTemplate(ctx, tmp, size)
	} else {
		err = s.format(ctx, tmp, size, false)
	}
	if err != nil {
		return err
	}
	if !scratch {
		if err := syncFile(tmp); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, s.path(id)); err != nil {
		return err
	}
	if scratch {
		return nil
	}
	return files.SyncDir(filepath.Join(s.dir, "disks"))
}

func (s *LocalStore) room() error {
	free, _, err := s.space()
	if err != nil {
		return err
	}
	if free < s.o.Reserve {
		return fmt.Errorf("%d bytes are kept free: %w", s.o.Reserve, unix.ENOSPC)
	}
	return nil
}

func (s *LocalStore) temp(id string) (string, error) {
	f, err := os.CreateTemp(filepath.Join(s.dir, "tmp"), id+"-")
	if err != nil {
		return "", err
	}
	return f.Name(), f.Close()
}

// format makes a sparse file with an ext4 file system.
func (s *LocalStore) format(ctx context.Context, path string, size int64, scratch bool) error {
	if err := os.Truncate(path, size); err != nil {
		return err
	}
	args := []string{"-q", "-F", "-m", "0", "-b", "4096",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"}
	if scratch { // lost with its machine: a journal would only cost
		args = append(args, "-O", "^has_journal")
	}
	if err := s.tools.run(ctx, 0, s.tools.mkfs, append(args, path)...); err != nil {
		return err
	}
	if scratch {
		return nil
	}
	return s.tools.run(ctx, 0, s.tools.debugfs, "-w", "-R", "rmdir lost+found", path)
}

// fromTemplate copies the scratch file system of this size, made once.
func (s *LocalStore) fromTemplate(ctx context.Context, path string, size int64) error {
	tmpl := filepath.Join(s.dir, "templates", "scratch-"+strconv.FormatInt(size, 10)+".img")
	if fsSize(tmpl) != size {
		if err := s.makeTemplate(ctx, tmpl, size); err != nil {
			return err
		}
	}
	return cloneSparse(tmpl, path)
}

func (s *LocalStore) makeTemplate(ctx context.Context, tmpl string, size int64) error {
	s.tmpl.Lock()
	defer s.tmpl.Unlock()
	if fsSize(tmpl) == size {
		return nil
	}
	tmp, err := s.temp("template")
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	if err := s.format(ctx, tmp, size, true); err != nil {
		return err
	}
	if err := syncFile(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, tmpl)
}

// grow makes a disk larger, while nobody has it attached, and ends what an
// earlier call began.
func (s *LocalStore) grow(ctx context.Context, v Volume, size int64, scratch bool) error {
	_, markErr := os.Lstat(s.markPath(v.ID))
	interrupted := markErr == nil
	if size == v.SizeBytes && !interrupted && fsSize(v.Path) == size {
		return nil
	}
	holder, err := s.holder(v.ID)
	if err != nil {
		return err
	}
	if holder != "" {
		if size == v.SizeBytes {
			return nil // at most a smaller file system; next time it is free
		}
		return fmt.Errorf("can't grow to %d bytes while %s uses it: stop that first: %w", size, holder, errdefs.ErrFailedPrecondition)
	}
	if interrupted {
		if err := s.rollBack(ctx, v); err != nil {
			return err
		}
	}
	if err := s.room(); err != nil {
		return err
	}
	// From here on the tools write in place: whoever comes after us must know.
	if err := os.WriteFile(s.markPath(v.ID), nil, 0o600); err != nil {
		return err
	}
	if err := files.SyncDir(filepath.Dir(s.markPath(v.ID))); err != nil {
		return err
	}
	// 1: errors corrected, also those of a machine that was cut off.
	if err := s.tools.run(ctx, 1, s.tools.fsck, "-f", "-y", v.Path); err != nil {
		return err
	}
	if err := os.Truncate(v.Path, size); err != nil {
		return err
	}
	if err := s.tools.run(ctx, 0, s.tools.resize, "-z", s.undoPath(v.ID), v.Path); err != nil {
		return err
	}
	if !scratch { // fsck made it again; fails if there is something in it: then it stays
		if err := s.tools.run(ctx, 0, s.tools.debugfs, "-w", "-R", "rmdir lost+found", v.Path); err != nil {
			s.o.Logger.Debug("lost+found stays", "volume", v.ID, "error", err)
		}
	}
	if err := syncFile(v.Path); err != nil {
		return err
	}
	// In this order: an undo file without its mark would be taken for nothing.
	if err := os.Remove(s.undoPath(v.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Remove(s.markPath(v.ID))
}

func (s *LocalStore) undoPath(id string) string { return filepath.Join(s.dir, "undo", id) }
func (s *LocalStore) markPath(id string) string { return filepath.Join(s.dir, "undo", id+".growing") }

// rollBack undoes a growth that was killed half way.
func (s *LocalStore) rollBack(ctx context.Context, v Volume) error {
	st, err := os.Lstat(s.undoPath(v.ID))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err == nil && st.Size() > 0 {
		s.o.Logger.Warn("a growth of this disk was interrupted; undoing it", "volume", v.ID)
		if err := s.tools.run(ctx, 0, s.tools.undo, "-f", s.undoPath(v.ID), v.Path); err != nil {
			// Nothing was recorded yet, so nothing was changed; fsck judges next.
			s.o.Logger.Warn("nothing to undo", "volume", v.ID, "error", err)
		}
		if err := syncFile(v.Path); err != nil {
			return err
		}
	}
	if err := os.Remove(s.undoPath(v.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// fsSize is the size of the ext4 file system in a file, from its superblock, in
// bytes; 0 if there is none.
func fsSize(path string) int64 {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	sb := make([]byte, 1024)
	if _, err := f.ReadAt(sb, 1024); err != nil {
		return 0
	}
	if binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return 0
	}
	blocks := int64(binary.LittleEndian.Uint32(sb[0x4:]))
	if binary.LittleEndian.Uint32(sb[0x60:])&0x80 != 0 { // 64bit
		blocks |= int64(binary.LittleEndian.Uint32(sb[0x150:])) << 32
	}
	shift := binary.LittleEndian.Uint32(sb[0x18:])
	if shift > 6 || blocks < 0 || blocks > MaxSize>>10 {
		return 0
	}
	return blocks << (10 + shift)
}

// cloneSparse copies a file by reflink, or only its data.
func cloneSparse(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer dst.Close()
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return dst.Close()
	}
	st, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(st.Size()); err != nil {
		return err
	}
	for off := int64(0); off < st.Size(); {
		data, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.NewOffsetWriter(dst, data), io.NewSectionReader(src, data, hole-data)); err != nil {
			return err
		}
		off = hole
	}
	return dst.Close()
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
