package oci

import (
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestNodeBeforeItsDevice: a node without a device behind it can't be opened, and
// that is not taken for a disk.
func TestNodeBeforeItsDevice(t *testing.T) {
	node := filepath.Join(t.TempDir(), "sdx")
	if err := opens(node); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := unix.Mknod(node, unix.S_IFBLK|0o600, int(unix.Mkdev(259, 1048575))); err != nil {
		t.Fatal(err)
	}
	if err := opens(node); err == nil {
		t.Error("a node without a device opens")
	} else {
		t.Log(err)
	}
	if err := opens("/dev/null"); err != nil {
		t.Error(err)
	}
}
