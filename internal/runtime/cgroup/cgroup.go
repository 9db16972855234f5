// Package cgroup reads and steers one container's control group, on hosts with
// cgroup v2, v1, or v1 controllers beside an empty v2 tree (hybrid). The OCI
// runtime makes the groups; this package only uses what is there:
//
//	l, err := cgroup.Detect()
//	g := l.Group("/tandem/web-1")
//	pids, err := g.Procs()
//	err = g.Kill(ctx)   // nothing is left in it
//	err = g.Remove(ctx) // and the directories are gone
//
// A group that does not exist is empty: no method fails because of that.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Layout is how control groups are mounted on this kernel.
type Layout struct {
	v2    string            // mount point of the v2 tree, "" if none
	v1    map[string]string // controller -> mount point
	roots []string          // every mount point once

	preparing atomic.Bool // one Prepare at a time
}

// Detect reads the layout from /proc/self/mountinfo.
func Detect() (*Layout, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroup layout: %w", err)
	}
	defer f.Close()
	l := &Layout{v1: map[string]string{}}
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		pre, post, ok := strings.Cut(sc.Text(), " - ")
		a, b := strings.Fields(pre), strings.Fields(post)
		if !ok || len(a) < 5 || len(b) < 3 {
			continue
		}
		dir := a[4]
		switch b[0] {
		case "cgroup2":
			if l.v2 == "" {
				l.v2 = dir
				l.roots = append(l.roots, dir)
			}
		case "cgroup":
			if slices.Contains(l.roots, dir) {
				continue
			}
			for _, o := range strings.Split(b[2], ",") {
				if _, dup := l.v1[o]; !dup && o != "rw" && o != "ro" {
					l.v1[o] = dir
				}
			}
			l.roots = append(l.roots, dir)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("cgroup layout: %w", err)
	}
	if len(l.roots) == 0 {
		return nil, fmt.Errorf("no cgroup file system is mounted; mount cgroup2 on /sys/fs/cgroup: %w", errdefs.ErrFailedPrecondition)
	}
	return l, nil
}

// Unified is true when controllers are those of cgroup v2.
func (l *Layout) Unified() bool { _, mem := l.v1["memory"]; return l.v2 != "" && !mem }

// Group names a group by its path below the mount points ("/tandem/web-1").
func (l *Layout) Group(path string) Group { return Group{l: l, path: filepath.Clean("/" + path)} }

// Open makes a group in the v2 tree, with those above it, and opens its directory for
// who is to be born in it. It returns nil where the controllers are those of v1: there
// a process can't be born in its groups. No controller is handed down for it.
func (l *Layout) Open(path string) (*os.File, error) {
	if !l.Unified() {
		return nil, nil
	}
	dir := filepath.Join(l.v2, filepath.Clean("/"+path))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", path, err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", path, err)
	}
	return f, nil
}

// MoveInto moves the processes of a v2 group that are not in a group below it into a
// child of that name. Elsewhere, and when there are none, it does nothing.
func (g Group) MoveInto(child string) error {
	if !g.l.Unified() || g.path == "/" {
		return nil
	}
	from := filepath.Join(g.dir(""), "cgroup.procs")
	for range 100 { // one of them may start another meanwhile
		b, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		pids := strings.Fields(string(b))
		if err != nil || len(pids) == 0 {
			return err
		}
		to := filepath.Join(g.dir(""), child)
		if err := os.Mkdir(to, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cgroup %s: %w", g.path, err)
		}
		for _, pid := range pids {
			if err := os.WriteFile(filepath.Join(to, "cgroup.procs"), []byte(pid), 0o644); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("move process %s of cgroup %s into %s: %w", pid, g.path, child, err)
			}
		}
	}
	return fmt.Errorf("cgroup %s: processes come faster than they can be moved: %w", g.path, errdefs.ErrUnavailable)
}

// Children lists the names of the groups directly below path.
func (l *Layout) Children(path string) []string {
	var names []string
	for _, r := range l.roots {
		es, _ := os.ReadDir(filepath.Join(r, path))
		for _, e := range es {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// Group is one container's group.
type Group struct {
	l    *Layout
	path string
}

// Path is the group's path below the mount points.
func (g Group) Path() string { return g.path }

// Exists is true if the group is there, in any hierarchy.
func (g Group) Exists() bool {
	for _, r := range g.l.roots {
		if st, err := os.Stat(filepath.Join(r, g.path)); err == nil && st.IsDir() {
			return true
		}
	}
	return false
}

// dir is where a controller's files are ("" if that controller is missing).
func (g Group) dir(controller string) string {
	if g.l.Unified() {
		return filepath.Join(g.l.v2, g.path)
	}
	if r, ok := g.l.v1[controller]; ok {
		return filepath.Join(r, g.path)
	}
	return ""
}

// Has is true if pid is in the group or below it.
func (g Group) Has(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for _, line := range strings.Split(string(b), "\n") {
		p := strings.SplitN(line, ":", 3)
		if len(p) == 3 && (p[2] == g.path || strings.HasPrefix(p[2], g.path+"/")) {
			return true
		}
	}
	return false
}

// Procs lists the processes in the group and below it.
func (g Group) Procs() ([]int, error) {
	var pids []int
	for _, r := range g.l.roots {
		err := filepath.WalkDir(filepath.Join(r, g.path), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.Name() != "cgroup.procs" {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			b, err := os.ReadFile(p)
			if err != nil {
				return nil // the group went, or is threaded
			}
			for _, s := range strings.Fields(string(b)) {
				if n, err := strconv.Atoi(s); err == nil && n > 0 {
					pids = append(pids, n)
				}
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("processes of cgroup %s: %w", g.path, err)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Signal sends a signal to every process of the group.
func (g Group) Signal(sig unix.Signal) error {
	pids, err := g.Procs()
	if err != nil {
		return err
	}
	for _, p := range pids {
		// A pidfd keeps a number that was given away meanwhile from being hit.
		fd, err := unix.PidfdOpen(p, 0)
		if err != nil {
			continue
		}
		if g.Has(p) {
			err = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
		unix.Close(fd)
		if err != nil && err != unix.ESRCH {
			return fmt.Errorf("signal %d to process %d: %w", sig, p, err)
		}
	}
	return nil
}

// Kill ends every process of the group and waits until it is empty.
func (g Group) Kill(ctx context.Context) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 {
			return err
		}
		if g.l.Unified() && os.WriteFile(filepath.Join(g.dir(""), "cgroup.kill"), []byte("1"), 0) == nil {
			err = nil
		} else {
			err = g.Signal(unix.SIGKILL)
		}
		if err != nil {
			return err
		}
		g.thawAll() // a frozen process does not die
		select {
		case <-ctx.Done():
			return fmt.Errorf("cgroup %s still has %d processes after SIGKILL: %w", g.path, len(pids), context.DeadlineExceeded)
		case <-time.After(wait):
		}
	}
}

// Remove deletes the group's directories everywhere; it must be empty.
func (g Group) Remove(ctx context.Context) error {
	if g.path == "/" {
		return fmt.Errorf("the root cgroup is not removed: %w", errdefs.ErrInvalidArgument)
	}
	for _, r := range g.l.roots {
		top := filepath.Join(r, g.path)
		for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
			err := rmdirs(top)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("remove cgroup %s: %w", top, err)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("remove cgroup %s: %w", top, err)
			case <-time.After(wait):
			}
		}
	}
	return nil
}

func rmdirs(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	es, rerr := os.ReadDir(dir)
	if rerr != nil {
		if errors.Is(rerr, fs.ErrNotExist) {
			return nil
		}
		return rerr
	}
	for _, e := range es {
		if e.IsDir() {
			if err := rmdirs(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err = unix.Rmdir(dir); err == unix.ENOENT {
		return nil
	}
	return err
}

// thawAfter is how long v1's freezer is given before it is asked anew.
const thawAfter = 100 * time.Millisecond

// Freeze stops (true) or continues (false) all processes and waits until they are.
//
// The freezer of v1 can wait for ever: a program of several threads that execs
// while it is frozen waits for its other threads to end, and they are stopped
// already. Letting all of them go on for a moment gets it out of that.
func (g Group) Freeze(ctx context.Context, frozen bool) error {
	var waited time.Duration
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		if waited > thawAfter && frozen && !g.l.Unified() {
			waited = 0
			if err := g.freeze(false); err != nil {
				return fmt.Errorf("freezer of cgroup %s: %w", g.path, err)
			}
			time.Sleep(time.Millisecond) // for the threads that are to end
		}
		if err := g.freeze(frozen); err != nil {
			return fmt.Errorf("freezer of cgroup %s: %w", g.path, err)
		}
		if now, err := g.Frozen(); err != nil || now == frozen {
			return err
		}
		select {
		case <-ctx.Done():
			if frozen {
				_ = g.freeze(false)
			}
			return fmt.Errorf("cgroup %s does not freeze: %w", g.path, context.DeadlineExceeded)
		case <-time.After(wait):
			waited += wait
		}
	}
}

// thawAll continues the group and all below it.
func (g Group) thawAll() {
	if g.l.Unified() {
		return // SIGKILL reaches frozen processes there
	}
	if top := g.dir("freezer"); top != "" {
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "freezer.state" {
				_ = os.WriteFile(p, []byte("THAWED"), 0)
			}
			return nil
		})
	}
}

func (g Group) freeze(frozen bool) error {
	dir := g.dir("freezer")
	if dir == "" {
		return fmt.Errorf("this kernel has no freezer: %w", errdefs.ErrNotImplemented)
	}
	file, word := "freezer.state", map[bool]string{true: "FROZEN", false: "THAWED"}[frozen]
	if g.l.Unified() {
		file, word = "cgroup.freeze", map[bool]string{true: "1", false: "0"}[frozen]
	}
	err := os.WriteFile(filepath.Join(dir, file), []byte(word), 0)
	if !frozen && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)) {
		return nil // what was in it has ended
	}
	return err
}

// Frozen is true when all processes are stopped by Freeze.
func (g Group) Frozen() (bool, error) {
	dir := g.dir("freezer")
	if dir == "" {
		return false, nil
	}
	if g.l.Unified() {
		return kv(filepath.Join(dir, "cgroup.events"))["frozen"] == 1, nil
	}
	b, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	return strings.TrimSpace(string(b)) == "FROZEN", err
}
