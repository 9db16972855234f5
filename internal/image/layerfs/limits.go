package layerfs

import (
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
)

// Limits bound what Scan accepts. A zero field takes its default.
type Limits struct {
	MaxEntries   int   // entries of the tar; default 500,000
	MaxBytes     int64 // sum of the declared file sizes, in bytes; default 32 GiB
	MaxFileBytes int64 // one file, in bytes; default and ceiling 32 GiB
	MaxPath      int   // bytes of one path or link target; default and ceiling 4095
	MaxXattrs    int   // bytes of all extended attributes of one entry; default and ceiling 3,800 (one ext4 block)
}

const (
	maxComponent = 255      // bytes of one name in ext4
	maxLinks     = 64000    // of ext4's 65,000 hard links, and of subdirectories
	maxFileBytes = 32 << 30 // the ext4 writer's extent tree is right up to 40 GiB
	maxXattrs    = 3800     // names and values that surely fit one ext4 block
	maxXattrName = 200      // bytes after the namespace
	maxFollow    = 40       // symbolic links followed for one path, as Linux does
	// stepsPerEntry, times MaxEntries, is the sum of all paths' depths.
	stepsPerEntry = 100
	maxID         = 1<<32 - 2 // (uid_t)-1 means "unchanged"
)

func (l Limits) withDefaults() Limits {
	if l.MaxEntries <= 0 {
		l.MaxEntries = 500_000
	}
	if l.MaxBytes <= 0 {
		l.MaxBytes = 32 << 30
	}
	if l.MaxFileBytes <= 0 || l.MaxFileBytes > maxFileBytes {
		l.MaxFileBytes = maxFileBytes
	}
	if l.MaxPath <= 0 || l.MaxPath > 4095 {
		l.MaxPath = 4095
	}
	if l.MaxXattrs <= 0 || l.MaxXattrs > maxXattrs {
		l.MaxXattrs = maxXattrs
	}
	return l
}

// EntryError says which entry of a layer was refused, and why. It is an
// errdefs.ErrInvalidArgument.
type EntryError struct {
	Entry  string // name as the tar has it; "" when the archive as a whole is wrong
	Reason string
}

// Error is `entry "NAME": REASON`; long names are cut.
func (e *EntryError) Error() string {
	if e.Entry == "" {
		return e.Reason
	}
	name := e.Entry
	if len(name) > 200 {
		name = name[:200] + "..."
	}
	return "entry " + strconv.Quote(name) + ": " + e.Reason
}

// Unwrap gives the error's class.
func (e *EntryError) Unwrap() error { return errdefs.ErrInvalidArgument }

func refuse(entry, format string, args ...any) error {
	return &EntryError{Entry: entry, Reason: fmt.Sprintf(format, args...)}
}
