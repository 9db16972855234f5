package host

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"tandem/internal/network/endpoint"

	"go.etcd.io/bbolt"
)

// Process is a process in a host's namespaces or below them.
type Process struct {
	Pid  int // as seen from outside
	Args []string
}

// Name is the program's name without its directory.
func (p Process) Name() string { return filepath.Base(p.Args[0]) }

// AllProcesses lists the live processes of the host, those of containers on metal
// too, without the host's own first process.
func (h *Host) AllProcesses() []Process {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.init.Process.Pid))
	if err != nil {
		return nil
	}
	parent := map[int]int{}
	inside := map[int]bool{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		b, err := os.ReadFile(d + "/stat")
		if err != nil {
			continue
		}
		// The name in brackets may hold anything: fields count from its end.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 2 || f[0] == "Z" || f[0] == "X" {
			continue
		}
		parent[pid], _ = strconv.Atoi(f[1])
		n, _ := os.Readlink(d + "/ns/pid")
		inside[pid] = n == ns
	}
	var out []Process
	for pid := range parent {
		if pid == h.init.Process.Pid {
			continue
		}
		for p := pid; p > 1; p = parent[p] {
			if !inside[p] {
				continue
			}
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00"); args[0] != "" {
				out = append(out, Process{Pid: pid, Args: args})
			}
			break
		}
	}
	slices.SortFunc(out, func(a, b Process) int { return a.Pid - b.Pid })
	return out
}

// Pids lists the host's processes of a program, with that first argument if it
// is not empty: Pids("tandemd", "monitor").
func (h *Host) Pids(program, arg string) []int {
	var out []int
	for _, p := range h.AllProcesses() {
		if p.Name() == program && (arg == "" || len(p.Args) > 1 && p.Args[1] == arg) {
			out = append(out, p.Pid)
		}
	}
	return out
}

// Mounts lists mount points in the host below its directory.
func (h *Host) Mounts() []string {
	var out []string
	h.lines("mounts", func(f []string) {
		if len(f) > 1 && strings.HasPrefix(f[1], h.Dir+"/") {
			out = append(out, f[1])
		}
	})
	return out
}

// Links lists the host's taps and veths that are Tandem's.
func (h *Host) Links() []string {
	var out []string
	h.lines("net/dev", func(f []string) {
		if strings.HasPrefix(f[0], endpoint.DefaultPrefix) { // then letters of the instance, and t or v
			out = append(out, strings.TrimSuffix(f[0], ":"))
		}
	})
	return out
}

// lines calls fn with the fields of each line of /proc/INIT/name.
func (h *Host) lines(name string, fn func(fields []string)) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/%s", h.init.Process.Pid, name))
	if err != nil {
		h.t.Errorf("%v", err)
		return
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if p := strings.Fields(s.Text()); len(p) > 0 {
			fn(p)
		}
	}
}

// LoopDevices lists backing files below the host's directory of loop devices.
func (h *Host) LoopDevices() []string {
	var out []string
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), h.Dir+"/") {
			out = append(out, strings.TrimSpace(string(b)))
		}
	}
	return out
}

// ControlGroups lists the groups of single machines and containers.
func (h *Host) ControlGroups() []string {
	sum := sha256.Sum256([]byte(h.RunDir()))
	name := "tandem-" + hex.EncodeToString(sum[:4])
	seen := map[string]bool{}
	for _, root := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
		for _, kind := range []string{"/machines/*", "/containers/*"} {
			dirs, _ := filepath.Glob(root + name + kind)
			for _, d := range dirs {
				if st, err := os.Stat(d); err == nil && st.IsDir() {
					seen[d] = true
				}
			}
		}
	}
	out := make([]string, 0, len(seen))
	for d := range seen {
		out = append(out, d)
	}
	slices.Sort(out)
	return out
}

// perThing are the places below the state and run directories where each
// machine, container or disk has an entry of its own.
var perThing = []string{
	"s/machines/machines/*", "s/agent/machines/*", "s/agent/containers/*",
	"s/metal/containers/*", "s/volumes/uses/*", "s/volumes/undo/*", "s/volumes/tmp/*",
	"s/images/tmp/*", "r/m/*", "r/monitor/*/*", "r/netns/*", "r/metal/c/*", "r/metal/runc/*",
}

// Leases lists who keeps images from being removed. The store's file is looked
// at as a copy, since the server holds it.
func (h *Host) Leases() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(h.State(), "images/meta.db"))
	if err != nil {
		return nil, err
	}
	file := filepath.Join(h.Dir, "meta-copy.db")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return nil, err
	}
	defer os.Remove(file)
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer db.Close()
	var out []string
	err = db.View(func(tx *bbolt.Tx) error {
		l := tx.Bucket([]byte("leases"))
		if l == nil {
			return fmt.Errorf("no leases in meta.db: %w", fs.ErrNotExist)
		}
		return l.ForEach(func(k, _ []byte) error { out = append(out, string(k)); return nil })
	})
	return out, err
}

// Orphans lists what is left on a host on which nothing should run: processes,
// mounts, links, control groups, loop devices, files, leases. It leaves out the
// server, the monitor of containers on metal, the name server, cached layers of images (see
// CachedLayers), and volumes: their number is the caller's to know.
func (h *Host) Orphans() []string {
	var out []string
	add := func(kind string, things []string) {
		for _, t := range things {
			out = append(out, kind+" "+t)
		}
	}
	for _, p := range h.AllProcesses() {
		if p.Name() != "tandemd" || len(p.Args) < 2 || !slices.Contains([]string{"serve", "monitor", "names"}, p.Args[1]) {
			out = append(out, fmt.Sprintf("process %d %s", p.Pid, strings.Join(p.Args, " ")))
		}
	}
	add("link", h.Links())
	add("control group", h.ControlGroups())
	for _, m := range h.Mounts() {
		if !strings.HasPrefix(m, h.RunDir()+"/metal/d/") {
			out = append(out, "mount "+m)
		}
	}
	for _, l := range h.LoopDevices() {
		if !strings.HasPrefix(l, h.State()+"/images/layers/") {
			out = append(out, "loop device of "+l)
		}
	}
	for _, p := range perThing {
		files, _ := filepath.Glob(filepath.Join(h.Dir, p))
		add("file", files)
	}
	leases, err := h.Leases()
	if err != nil {
		leases = append(leases, err.Error())
	}
	add("image lease", leases)
	return out
}

// CachedLayers lists loop devices and mounts of images' layers on metal: the agent
// keeps them for two minutes after their last use.
func (h *Host) CachedLayers() []string {
	var out []string
	for _, l := range h.LoopDevices() {
		if strings.HasPrefix(l, h.State()+"/images/layers/") {
			out = append(out, l)
		}
	}
	for _, m := range h.Mounts() {
		if strings.HasPrefix(m, h.RunDir()+"/metal/d/") {
			out = append(out, m)
		}
	}
	return out
}

// VolumeFiles lists the disks of volumes and the scratch disks of machines.
func (h *Host) VolumeFiles() []string {
	files, _ := filepath.Glob(filepath.Join(h.State(), "volumes/disks/*"))
	return files
}
