package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// etcd dies of a write that finds no space: so none may. What it writes next is on
// the disk before it is needed:
//
//   - the data base's blocks, dbReserve beyond what it uses. Blocks that fallocate
//     gave to a file beyond its end stay its own when it grows (ext4, xfs, tmpfs);
//   - the log's segments: the one in use and the next two, each with logSlack more
//     for the record that crosses its end;
//   - a snapshot's small file, and the last records of a segment: etcd cuts it to
//     what is written, which gives the slack away, and writes some more. There is a
//     ballast for both, let go some entries before. Somebody else may be quicker to
//     take it: then nothing is written until there is space, and so neither comes.
//
// When the disk runs short, writes that make the state grow are refused (see
// Growing); all others go on from the reserve, and are refused before it is used
// up. File systems that write elsewhere when a block changes (btrfs, zfs) keep no
// such promise: there all writes are refused while little is left.
const (
	segmentBytes = 8 << 20
	logSlack     = 4 << 20
	dbReserve    = 16 << 20
	dbMargin     = 1 << 20 // of dbReserve: the data base's own pages
	ballastBytes = 1 << 20
	endSpace     = 256 << 10              // what a snapshot's file needs, or the end of a segment, generously
	cutMargin    = 1 << 20                // of a segment, before its end, at which endSpace must be there
	snapEvery    = 5000                   // entries of the log
	snapMargin   = 500                    // entries before the next snapshot at which its space must be there: more than can be on their way
	stolenWithin = 200 * time.Millisecond // in which somebody who takes every free block has taken what is let go
	keepEvery    = time.Second
	checkEvery   = 1 << 20 // bytes written after which the reserve is looked at again
)

// Space is how it stands with the disk of the state directory.
type Space struct {
	Dir  string
	Free uint64 // bytes that are free for everybody
	Need uint64 // bytes below which it is short
	// Short: what makes the state grow is refused.
	Short bool
}

// reserve keeps the space that etcd needs next.
type reserve struct {
	dir   string // the state directory
	log   *slog.Logger
	used  func() int64  // bytes of the data base that are in use
	index func() uint64 // of the newest entry in the log

	mu       sync.Mutex
	solid    bool  // blocks once given stay a file's own
	dbEnd    int64 // the data base has blocks up to here
	tail     string
	backed   string // the segment in use (tail) that has its slack
	spares   bool   // the next two segments are there
	unbacked int64  // bytes written since they were not
	refused  bool   // blocks were asked for in vain
	since    int64  // bytes written since the last look
	at       time.Time
	space    Space
	moved    chan struct{}
	told     bool // that the reserve is used up
}

func (r *reserve) etcd(parts ...string) string {
	return filepath.Join(append([]string{r.dir, "etcd", "member"}, parts...)...)
}

func (r *reserve) ballast() string { return filepath.Join(r.dir, "ballast") }

// newReserve makes what is still missing of the reserve: the member runs.
func newReserve(dir string, log *slog.Logger, used func() int64, index func() uint64) *reserve {
	r := &reserve{dir: dir, log: log, used: used, index: index, moved: make(chan struct{})}
	r.space.Dir = dir
	r.mu.Lock()
	defer r.mu.Unlock()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil {
		switch uint32(st.Type) {
		case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.TMPFS_MAGIC:
			r.solid = true
		}
	}
	r.look()
	return r
}

// keep holds the reserve until ctx ends.
func (r *reserve) keep(ctx context.Context) {
	t := time.NewTicker(keepEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			r.mu.Lock()
			r.look()
			r.mu.Unlock()
		}
	}
}

// look completes the reserve and sees how much is free. The lock is held.
func (r *reserve) look() {
	r.at, r.since, r.refused = time.Now(), 0, false
	free, total := freeBytes(r.dir)
	low := min(64<<20, total/16)
	if r.solid {
		r.growDB()
		r.growLog()
		if st, err := os.Stat(r.ballast()); (err != nil || blocks(st) < ballastBytes) && free > low {
			r.note(promise(r.ballast(), ballastBytes))
		}
		free, _ = freeBytes(r.dir)
	}
	if r.refused {
		free = 0 // whatever df says: a quota, or no more files
	}
	s := Space{Dir: r.dir, Free: free, Need: low, Short: free < low}
	if r.space.Short && !s.Short && free < low+low/4 {
		s.Short = true // not to and fro
	}
	was := r.space.Short
	r.space = s
	if s.Short == was {
		return
	}
	if s.Short {
		r.log.Warn("the disk of the state directory is full (no space left): nothing new is taken until some is freed; what runs goes on",
			"dir", r.dir, "free_mib", s.Free>>20, "needed_mib", s.Need>>20)
	} else {
		r.told = false
		r.log.Info("the disk of the state directory has space again", "dir", r.dir, "free_mib", s.Free>>20)
	}
	close(r.moved)
	r.moved = make(chan struct{})
}

// note looks at what became of a wish for blocks, and says whether they are there.
func (r *reserve) note(err error) bool {
	switch {
	case err == nil:
		return true
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		r.refused = true
	case errors.Is(err, fs.ErrExist), errors.Is(err, fs.ErrNotExist): // etcd was quicker
	case r.solid:
		r.solid = false
		r.log.Warn("no space can be kept in reserve for the state", "dir", r.dir, "err", err)
	}
	return false
}

// ask refuses what would take the space that was let go for others' sake, see endFits.
func (r *reserve) ask(bytes int64) error {
	if free, _ := freeBytes(r.dir); free < uint64(max(bytes, 0))+ballastBytes {
		return unix.ENOSPC
	}
	return nil
}

// growDB gives the data base its next blocks.
func (r *reserve) growDB() {
	const step = 1 << 20
	want := (r.used() + dbReserve + step - 1) &^ (step - 1)
	if r.dbEnd < want-dbReserve/8 && r.note(r.ask(want-r.dbEnd)) && r.note(promise(r.etcd("snap", "db"), want)) {
		r.dbEnd = want
	}
}

// growLog sees to the slack of the segment in use and to the next two: etcd opens
// the one as 0.tmp or 1.tmp long before it is used, and finds the other made.
func (r *reserve) growLog() {
	dir := r.etcd("wal")
	list, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	tail, have := "", [2]bool{}
	for _, e := range list {
		switch n := e.Name(); {
		case strings.HasSuffix(n, ".wal"):
			tail = max(tail, n)
		case n == "0.tmp", n == "1.tmp":
			have[n[0]-'0'] = true
		}
	}
	if r.tail = tail; tail != r.backed && r.note(promise(filepath.Join(dir, tail), segmentBytes+logSlack)) {
		r.backed = tail
	}
	if have[0] != have[1] {
		i := 0
		if have[0] {
			i = 1
		}
		have[i] = r.note(r.ask(segmentBytes+logSlack)) && r.note(r.spare(dir, strconv.Itoa(i)+".tmp"))
	}
	for i := range have {
		f := filepath.Join(dir, strconv.Itoa(i)+".tmp")
		st, err := os.Stat(f)
		have[i] = have[i] && err == nil && (blocks(st) >= segmentBytes+logSlack || r.note(r.ask(segmentBytes+logSlack-blocks(st))) && r.note(promise(f, segmentBytes+logSlack)))
	}
	if r.spares = have[0] && have[1]; r.spares {
		r.unbacked = 0
	}
}

// spare makes a segment of this name, whole or not at all; one that etcd makes
// meanwhile stays.
func (r *reserve) spare(dir, name string) error {
	tmp := filepath.Join(dir, "spare.tmp")
	os.Remove(tmp)
	defer os.Remove(tmp)
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	if err := promise(tmp, segmentBytes+logSlack); err != nil {
		return err
	}
	return os.Link(tmp, filepath.Join(dir, name))
}

// admit lets a write of so many bytes through, or says why not. One that grows
// leaves the reserve alone.
func (r *reserve) admit(bytes int64, grows bool) error {
	bytes += 256 // what etcd adds
	r.mu.Lock()
	defer r.mu.Unlock()
	r.since += bytes
	if r.since > checkEvery || r.space.Short || time.Since(r.at) > 2*keepEvery {
		r.look()
	} else if grows {
		if free, _ := freeBytes(r.dir); free < r.space.Need+uint64(4*bytes) {
			r.look()
		}
	}
	if !r.spares {
		r.unbacked += bytes
	}
	if s := r.space; !s.Short && s.Free >= s.Need+uint64(4*bytes) {
		return nil
	}
	if grows {
		return fmt.Errorf("the disk of the state directory %s is full (no space left: %d MiB are free, %d are needed): nothing new is taken; free some space there, and it goes on by itself: %w",
			r.dir, r.space.Free>>20, (r.space.Need+uint64(4*bytes))>>20, errdefs.ErrResourceExhausted)
	}
	why := r.lacks(bytes)
	if why == "" {
		return nil
	}
	if !r.told {
		r.told = true
		r.log.Error("the disk of the state directory is full (no space left) and the reserve is used up: nothing can be written until some is freed", "dir", r.dir, "lacks", why)
	}
	return fmt.Errorf("the disk of the state directory %s is full (no space left) and the reserve is used up (%s): free some space there, and it goes on by itself: %w",
		r.dir, why, errdefs.ErrResourceExhausted)
}

// lacks says what is not there for a write of so many bytes, or "".
func (r *reserve) lacks(bytes int64) string {
	floor := min(16<<20, r.space.Need)
	if r.space.Free >= floor+uint64(4*bytes) {
		return ""
	}
	if !r.solid {
		return "this file system keeps none"
	}
	switch {
	case bytes > logSlack/2:
		return "the write is large"
	case r.dbEnd-r.used() < 2*bytes+dbMargin:
		return "for the data base"
	case r.backed != r.tail, !r.spares && r.unbacked > segmentBytes/2:
		return "for the log"
	}
	if at, ok := offset(r.etcd("wal", r.tail)); (!ok || at >= segmentBytes-cutMargin) && !r.endFits() {
		return "for the end of a segment of the log"
	}
	if r.index() >= r.snapshotIndex()+snapEvery-snapMargin && !r.endFits() {
		return "for a snapshot"
	}
	return ""
}

// endFits sees to endSpace, from the ballast. The lock is held.
func (r *reserve) endFits() bool {
	if free, _ := freeBytes(r.dir); free >= endSpace {
		return true
	}
	if os.Remove(r.ballast()) != nil {
		return false
	}
	if d, err := os.Open(r.dir); err == nil {
		_ = d.Sync() // what is let go is free when the journal says so
		d.Close()
	}
	time.Sleep(stolenWithin)
	free, _ := freeBytes(r.dir)
	return free >= ballastBytes/2
}

// offset is how far this process has come in a file that it has open: the kernel
// tells of each.
func offset(file string) (at int64, ok bool) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, false
	}
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name())); err != nil || to != file {
			continue
		}
		b, err := os.ReadFile(filepath.Join("/proc/self/fdinfo", fd.Name()))
		if err != nil {
			continue
		}
		line, _, _ := strings.Cut(string(b), "\n")
		if n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimPrefix(line, "pos:")), 10, 64); err == nil {
			at, ok = max(at, n), true
		}
	}
	return at, ok
}

// snapshotIndex is the entry of the log that the newest snapshot stands for.
func (r *reserve) snapshotIndex() uint64 {
	list, err := filepath.Glob(r.etcd("snap", "*-*.snap"))
	if err != nil {
		return 0
	}
	var newest uint64
	for _, f := range list {
		_, hex, _ := strings.Cut(strings.TrimSuffix(filepath.Base(f), ".snap"), "-")
		if n, err := strconv.ParseUint(hex, 16, 64); err == nil {
			newest = max(newest, n)
		}
	}
	return newest
}

// promise gives a file blocks up to end without changing its size.
func promise(file string, end int64) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) && filepath.Base(file) == "ballast" {
		f, err = os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o600)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, end)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("%d bytes for %s: %w", end, file, err)
	}
	return nil
}

// blocks is how many bytes of the disk are a file's own.
func blocks(st fs.FileInfo) int64 {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512
	}
	return 0
}

// freeBytes is what df calls available, and the size of the file system. Without
// room for one more file nothing is free.
func freeBytes(dir string) (free, total uint64) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Bsize <= 0 {
		return 1 << 62, 1 << 62 // not known: etcd will tell
	}
	free, total = st.Bavail*uint64(st.Bsize), st.Blocks*uint64(st.Bsize)
	if st.Files > 0 && st.Ffree == 0 {
		free = 0
	}
	return free, total
}

// reserveForStart puts what a former server kept where the member looks for it,
// and says whether that is enough to start on a full disk. The lock is held.
func reserveForStart(dir string) bool {
	wal := filepath.Join(dir, "etcd", "member", "wal")
	first := filepath.Join(wal, "0.tmp")
	os.Remove(filepath.Join(wal, "spare.tmp"))
	if _, err := os.Stat(first); err != nil {
		os.Rename(filepath.Join(wal, "1.tmp"), first) // 0 is what etcd opens first
	}
	for _, f := range []string{first, filepath.Join(wal, "1.tmp")} {
		if err := zero(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
			os.Remove(f)
		}
	}
	if free, _ := freeBytes(dir); free < minFree {
		os.Remove(filepath.Join(dir, "ballast"))
	}
	st, err := os.Stat(first)
	return err == nil && blocks(st) >= segmentBytes
}

// zero takes out of a segment what a server wrote that died while it began to use
// it; its blocks stay.
func zero(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, 0, segmentBytes+logSlack)
}
