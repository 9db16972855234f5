package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// A volume is filled in two steps, so that a crash leaves no half-filled one:
// copy into copying, rename it to copied, move its entries up. Either name tells
// the next start where to go on.
const (
	copying = ".tandem-copying"
	copied  = ".tandem-copied"
)

// copyUp fills an empty volume with what the image has at target.
func copyUp(ctx context.Context, root, target, volume string) error {
	names, err := os.ReadDir(volume)
	if err != nil {
		return fmt.Errorf("fill volume: %w", err)
	}
	halfway := false
	for _, n := range names {
		switch n.Name() {
		case "lost+found", copying:
		case copied:
			halfway = true
		default:
			if _, err := os.Lstat(filepath.Join(volume, copied)); err != nil {
				return nil // in use
			}
		}
	}
	if !halfway {
		h, err := securejoin.OpenInRoot(root, target)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("fill volume from the image: %w", err)
		}
		defer h.Close()
		if st, err := h.Stat(); err != nil || !st.IsDir() {
			return err
		}
		tmp := filepath.Join(volume, copying)
		if err := os.RemoveAll(tmp); err != nil {
			return fmt.Errorf("fill volume: %w", err)
		}
		if err := copyTree(ctx, fmt.Sprintf("/proc/self/fd/%d", h.Fd()), tmp); err != nil {
			os.RemoveAll(tmp)
			return fmt.Errorf("fill volume from the image: %w", err)
		}
		if err := copyAttrs(tmp, volume, 0); err != nil {
			return fmt.Errorf("fill volume: %w", err)
		}
		// The name promises the content: after a crash of the machine the file system
		// may know the one without the other.
		if err := syncFS(volume); err != nil {
			return fmt.Errorf("fill volume: %w", err)
		}
		if err := os.Rename(tmp, filepath.Join(volume, copied)); err != nil {
			return fmt.Errorf("fill volume: %w", err)
		}
	}
	from := filepath.Join(volume, copied)
	es, err := os.ReadDir(from)
	if err != nil {
		return fmt.Errorf("fill volume: %w", err)
	}
	for _, e := range es {
		if err := os.Rename(filepath.Join(from, e.Name()), filepath.Join(volume, e.Name())); err != nil {
			return fmt.Errorf("fill volume: %w", err)
		}
	}
	return os.Remove(from)
}

// syncFS puts all that was written to dir's file system on its disk.
func syncFS(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
}

// copyTree copies a directory with owners, modes, times, links, nodes and
// extended attributes.
func copyTree(ctx context.Context, src, dst string) error {
	links := map[[2]uint64]string{}
	return copyDir(ctx, src, dst, links)
}

func copyDir(ctx context.Context, src, dst string, links map[[2]uint64]string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := os.Mkdir(dst, 0o700); err != nil {
		return err
	}
	es, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	for _, e := range es {
		if err := copyEntry(ctx, filepath.Join(src, e.Name()), filepath.Join(dst, e.Name()), links); err != nil {
			return err
		}
	}
	return copyAttrs(src, dst, 0)
}

func copyEntry(ctx context.Context, src, dst string, links map[[2]uint64]string) error {
	var st unix.Stat_t
	if err := unix.Lstat(src, &st); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR {
		return copyDir(ctx, src, dst, links)
	}
	key := [2]uint64{uint64(st.Dev), st.Ino}
	if first, ok := links[key]; ok && st.Nlink > 1 {
		return os.Link(first, dst)
	}
	var err error
	switch kind {
	case unix.S_IFREG:
		err = copyFile(src, dst)
	case unix.S_IFLNK:
		var to string
		if to, err = os.Readlink(src); err == nil {
			err = os.Symlink(to, dst)
		}
	default:
		err = unix.Mknod(dst, st.Mode, int(st.Rdev))
	}
	if err != nil {
		return err
	}
	links[key] = dst
	return copyAttrs(src, dst, unix.AT_SYMLINK_NOFOLLOW)
}

func copyFile(src, dst string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// copyAttrs copies owner, mode, extended attributes and times; flags 0 follows a link.
func copyAttrs(src, dst string, flags int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(unix.AT_FDCWD, src, &st, flags); err != nil {
		return err
	}
	if err := unix.Fchownat(unix.AT_FDCWD, dst, int(st.Uid), int(st.Gid), flags); err != nil {
		return err
	}
	link := st.Mode&unix.S_IFMT == unix.S_IFLNK
	if !link {
		if err := unix.Chmod(dst, st.Mode&0o7777); err != nil {
			return err
		}
		if err := copyXattrs(src, dst); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, dst, []unix.Timespec{st.Atim, st.Mtim}, flags)
}

func copyXattrs(src, dst string) error {
	buf := make([]byte, 64<<10)
	n, err := unix.Listxattr(src, buf)
	if err == unix.ENOTSUP {
		return nil
	}
	if err != nil {
		return err
	}
	val := make([]byte, 64<<10)
	for names := buf[:n]; len(names) > 0; {
		k := 0
		for k < len(names) && names[k] != 0 {
			k++
		}
		name := string(names[:k])
		names = names[min(k+1, len(names)):]
		m, err := unix.Getxattr(src, name, val)
		if err != nil {
			continue // the kernel's own (trusted.overlay.*) or gone
		}
		if err := unix.Setxattr(dst, name, val[:m], 0); err != nil && err != unix.ENOTSUP && err != unix.EPERM {
			return err
		}
	}
	return nil
}
