package qemu

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups is the place in the control group hierarchies below which each
// machine gets a group of its own. Hosts with v1, v2 and both at once occur; a
// controller that the kernel offers in v1 can't be used in v2 at the same time.
type cgroups struct {
	parent string            // relative to each hierarchy's root
	v1     map[string]string // controller -> mount point
	v2     string            // mount point, when v2 has the controllers
}

// limits of one machine's group. They stop a VMM that runs wild; a machine's
// size is what limits the guest.
type limits struct {
	memory int64 // bytes
	shares int   // relative weight of CPU, 1024 for each virtual CPU
	pids   int
}

var wantedControllers = []string{"memory", "cpu", "pids"}

// findCgroups looks for usable hierarchies in /proc/self/mounts. There may be
// none (in a plain container): then machines run without a group.
func findCgroups(parent string) (*cgroups, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	defer f.Close()
	c := &cgroups{parent: parent, v1: map[string]string{}}
	for s := bufio.NewScanner(f); s.Scan(); {
		p := strings.Fields(s.Text())
		if len(p) < 4 {
			continue
		}
		options := "," + p[3] + ","
		if strings.Contains(options, ",ro,") {
			continue
		}
		switch p[2] {
		case "cgroup":
			for _, w := range wantedControllers {
				if strings.Contains(options, ","+w+",") {
					c.v1[w] = p[1]
				}
			}
		case "cgroup2":
			b, _ := os.ReadFile(filepath.Join(p[1], "cgroup.controllers"))
			if strings.Contains(" "+strings.TrimSpace(string(b))+" ", " memory ") {
				c.v2 = p[1]
			}
		}
	}
	return c, nil
}

// none says that no hierarchy can be used.
func (c *cgroups) none() bool { return len(c.v1) == 0 && c.v2 == "" }

// roots are the directories that machines' groups lie in, one a hierarchy.
func (c *cgroups) roots() []string {
	var r []string
	seen := map[string]bool{}
	for _, w := range wantedControllers {
		if m := c.v1[w]; m != "" && !seen[m] {
			seen[m] = true
			r = append(r, filepath.Join(m, c.parent))
		}
	}
	if c.v2 != "" {
		r = append(r, filepath.Join(c.v2, c.parent))
	}
	return r
}

// create makes the machine's group in all hierarchies, and sets its limits.
func (c *cgroups) create(id string, l limits) error {
	if c.v2 != "" {
		// Controllers must be handed down level by level.
		dir := c.v2
		for _, part := range strings.Split(filepath.Clean(c.parent), "/") {
			c.delegate(dir)
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("cgroup: %w", err)
			}
		}
		c.delegate(dir)
	}
	for _, r := range c.roots() {
		if err := os.MkdirAll(filepath.Join(r, id), 0o755); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return c.update(id, l)
}

// delegate hands the controllers of a v2 group down to those in it. What is handed
// down already is not written: groups above ours may be somebody else's (systemd's).
func (c *cgroups) delegate(dir string) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	have := strings.Fields(string(b))
	for _, w := range wantedControllers { // one by one: one that is missing must not take the others along
		if slices.Contains(have, w) {
			continue
		}
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+w), 0o644)
	}
}

// update changes the limits of a group.
func (c *cgroups) update(id string, l limits) error {
	var errs []error
	set := func(controller, file1, file2 string, v1, v2 int64) {
		file, v := "", int64(0)
		if m := c.v1[controller]; m != "" {
			file, v = filepath.Join(m, c.parent, id, file1), v1
		} else if c.v2 != "" {
			file, v = filepath.Join(c.v2, c.parent, id, file2), v2
			if _, err := os.Stat(file); err != nil {
				return // this controller is not delegated to us
			}
		} else {
			return
		}
		if err := os.WriteFile(file, []byte(strconv.FormatInt(v, 10)), 0o644); err != nil {
			errs = append(errs, fmt.Errorf("cgroup: %w", err))
		}
	}
	set("memory", "memory.limit_in_bytes", "memory.max", l.memory, l.memory)
	set("cpu", "cpu.shares", "cpu.weight", int64(l.shares), int64(min(10000, max(1, l.shares*100/1024))))
	set("pids", "pids.max", "pids.max", int64(l.pids), int64(l.pids))
	return errors.Join(errs...)
}

// enterThread moves the calling thread, and with it what it forks, into the v1
// groups; leave takes it back to where it was. v2 knows no groups of threads
// here: there the child is made in its group (see openV2).
func (c *cgroups) enterThread(id string) (leave func(), err error) {
	var back []string
	leave = func() {
		for _, file := range back {
			_ = os.WriteFile(file, []byte(strconv.Itoa(unix.Gettid())), 0o644)
		}
	}
	if len(c.v1) == 0 {
		return leave, nil
	}
	b, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return leave, fmt.Errorf("own cgroup: %w", err)
	}
	home := map[string]string{}
	for _, l := range strings.Split(string(b), "\n") {
		if p := strings.SplitN(l, ":", 3); len(p) == 3 {
			for _, w := range strings.Split(p[1], ",") {
				home[w] = p[2]
			}
		}
	}
	for w, mount := range c.v1 {
		file := filepath.Join(mount, c.parent, id, "tasks")
		if err := os.WriteFile(file, []byte(strconv.Itoa(unix.Gettid())), 0o644); err != nil {
			return leave, fmt.Errorf("enter cgroup: %w", err)
		}
		back = append(back, filepath.Join(mount, home[w], "tasks"))
	}
	return leave, nil
}

// openV2 opens the v2 group for clone3; nil when there is no v2.
func (c *cgroups) openV2(id string) (*os.File, error) {
	if c.v2 == "" {
		return nil, nil
	}
	f, err := os.Open(filepath.Join(c.v2, c.parent, id))
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return f, nil
}

// list names the machines that have a group.
func (c *cgroups) list() []string {
	seen := map[string]bool{}
	var ids []string
	for _, r := range c.roots() {
		entries, _ := os.ReadDir(r)
		for _, e := range entries {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				ids = append(ids, e.Name())
			}
		}
	}
	return ids
}

// procs are the processes in a machine's group.
func (c *cgroups) procs(id string) []int {
	seen := map[int]bool{}
	var pids []int
	for _, r := range c.roots() {
		b, _ := os.ReadFile(filepath.Join(r, id, "cgroup.procs"))
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 && pid != os.Getpid() && !seen[pid] {
				seen[pid] = true
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// remove kills what is left in a machine's group and removes it.
func (c *cgroups) remove(id string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		for _, pid := range c.procs(id) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		var errs []error
		for _, r := range c.roots() {
			if err := os.Remove(filepath.Join(r, id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		if len(errs) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cgroup: %w", errors.Join(errs...))
		}
		time.Sleep(5 * time.Millisecond) // a process that was killed leaves its group when it has been torn down
	}
}

// removeParent removes the directories of the driver itself, if they are empty.
func (c *cgroups) removeParent() {
	for _, r := range c.roots() {
		_ = os.Remove(r)
	}
}

// outOfMemory says whether the kernel killed something in the group because the
// group's memory limit was reached.
func (c *cgroups) outOfMemory(id string) bool {
	file := filepath.Join(c.v2, c.parent, id, "memory.events")
	if m := c.v1["memory"]; m != "" {
		file = filepath.Join(m, c.parent, id, "memory.oom_control")
	}
	b, _ := os.ReadFile(file)
	for _, l := range strings.Split(string(b), "\n") {
		if n, ok := strings.CutPrefix(l, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
