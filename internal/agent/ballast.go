package agent

import (
	"errors"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// The records of the agent are small, and without them it can't even stop or remove
// what fills the disk. So a few blocks are kept in a file of no other use, and given
// away bit by bit when a record finds no space.
const (
	ballastSize = 4 << 20
	ballastStep = 256 << 10
)

type ballast struct {
	path string
	mu   sync.Mutex
	size int64 // what it holds now
}

func openBallast(path string) *ballast {
	b := &ballast{path: path}
	if st, err := os.Stat(path); err == nil {
		b.size = st.Size()
	}
	b.fill()
	return b
}

// fill takes what is missing of the ballast, if the disk has it.
func (b *ballast) fill() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size >= ballastSize {
		return
	}
	var st unix.Statfs_t
	if unix.Statfs(filepath.Dir(b.path), &st) != nil || int64(st.Bavail)*st.Bsize < 4*ballastSize {
		return // whoever writes now needs it more
	}
	f, err := os.OpenFile(b.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Fallocate(int(f.Fd()), 0, 0, ballastSize) == nil {
		b.size = ballastSize
		return
	}
	// Not all of it: what there was stays.
	_ = f.Truncate(b.size)
}

// spend gives a part of it back to the disk; false: nothing is left.
func (b *ballast) spend() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size <= 0 {
		return false
	}
	b.size = max(0, b.size-ballastStep)
	return os.Truncate(b.path, b.size) == nil
}

// write does what may find no space, at the ballast's expense if need be.
func (b *ballast) write(do func() error) error {
	for {
		err := do()
		if err == nil || !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) || !b.spend() {
			return err
		}
	}
}
