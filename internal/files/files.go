// Package files writes small files so that no reader, and no crash at any
// instruction, ever sees half of one:
//
//	err := files.Replace(path, data, 0o600)        // readers see the old content or the new
//	err := files.ReplaceDurably(path, data, 0o600) // and a power cut does not undo it
//	err := files.SyncDir(dir)                      // the same for a rename of one's own
//
// The content is written under another name in the same directory (Temp and a
// random ending) and renamed. Who is killed in between leaves that file behind: it
// is no harm, and whoever lists the directory passes over such names or removes them.
package files

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Temp begins the names of files that are not finished.
const Temp = ".tmp-"

// Replace gives path this content and these permission bits, in one step. It
// follows no symbolic link at path: it replaces it.
func Replace(path string, data []byte, mode fs.FileMode) error {
	return replace(path, data, mode, false)
}

// ReplaceDurably is Replace whose result is on the disk when it returns.
func ReplaceDurably(path string, data []byte, mode fs.FileMode) error {
	if err := replace(path, data, mode, true); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir puts a directory's entries on the disk: what was made, renamed or
// removed in it before stays so.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func replace(path string, data []byte, mode fs.FileMode, sync bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), Temp+"*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}
