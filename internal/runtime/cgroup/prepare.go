package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Prepare tells the kernel that a process will soon be put into a group. It returns
// at once, and nothing is different afterwards but the time that takes.
//
// Putting a process into a group keeps all processes from being made and ended
// meanwhile, and after a quiet time the kernel first waits until all processors have
// noticed (an RCU grace period): 5 to 15 ms, a fifth of what a container's start
// takes. For about as long afterwards nobody waits again. So who knows that a
// container will start lets that time pass while other things are made ready: here
// this process is put into the group in which it is. (In the kernel:
// cgroup_threadgroup_rwsem and rcu_sync; the mount option favordynmods buys the same
// for a slower fork and exit of everybody.)
func (l *Layout) Prepare() {
	if !l.preparing.CompareAndSwap(false, true) {
		return // it is being waited for
	}
	go func() {
		defer l.preparing.Store(false)
		_ = l.prepare() // without it a start takes a little longer
	}()
}

func (l *Layout) prepare() error {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	dir := l.own(string(b))
	if dir == "" {
		return fmt.Errorf("no group of this process is mounted: %w", errors.ErrUnsupported)
	}
	f, err := os.OpenFile(filepath.Join(dir, "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("0") // who writes
	return errors.Join(err, f.Close())
}

// own finds a directory of the group that a process is in, by its /proc/PID/cgroup.
func (l *Layout) own(groups string) string {
	for line := range strings.Lines(groups) {
		p := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(p) != 3 {
			continue
		}
		root := l.v2
		if p[1] != "" {
			name, _, _ := strings.Cut(p[1], ",")
			root = l.v1[name]
		}
		if root == "" {
			continue
		}
		dir := filepath.Join(root, filepath.Clean("/"+p[2]))
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			return dir
		}
	}
	return ""
}
