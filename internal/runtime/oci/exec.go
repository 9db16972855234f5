package oci

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/signal"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
	"tandem/internal/runtime/monitor"
)

// Exec implements runtime.Runtime. The process is killed when ctx ends, unless
// it is detached, or when its time-out passes (DeadlineExceeded).
func (r *Runtime) Exec(ctx context.Context, e *v1.ExecSpec, s runtime.Streams) (int, error) {
	id := e.GetContainerId()
	r.mu.Lock()
	c, err := r.getLocked(id)
	if err != nil {
		r.mu.Unlock()
		return 0, err
	}
	spec, running, paused := c.spec, c.running(), c.paused
	r.mu.Unlock()
	switch {
	case !running:
		return 0, fmt.Errorf("container %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	case paused:
		return 0, fmt.Errorf("container %s is paused; resume it first: %w", id, errdefs.ErrFailedPrecondition)
	case len(e.Args) == 0 || e.Args[0] == "":
		return 0, fmt.Errorf("exec in container %s: no command: %w", id, errdefs.ErrInvalidArgument)
	case e.WorkingDir != "" && !path.IsAbs(e.WorkingDir):
		return 0, fmt.Errorf("exec in container %s: working directory %q is not absolute: %w", id, e.WorkingDir, errdefs.ErrInvalidArgument)
	}
	r.cg.Prepare()
	p, err := r.execProcess(spec, e)
	if err != nil {
		return 0, err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return 0, fmt.Errorf("exec in container %s: %w", id, err)
	}
	if len(b) > 512<<10 {
		return 0, fmt.Errorf("exec in container %s: command and environment are larger than 512 KiB: %w", id, errdefs.ErrInvalidArgument)
	}
	io, stop := streams(s)
	defer stop()
	if !e.Stdin || e.Detach {
		io.Stdin = nil
	}
	return r.o.Monitor.Exec(ctx, monitor.ExecRequest{
		ID: id, Process: b, TTY: e.Tty, Stdin: e.Stdin && !e.Detach, Detach: e.Detach, Timeout: e.Timeout.AsDuration(),
	}, io)
}

func (r *Runtime) execProcess(s *v1.RuntimeSpec, e *v1.ExecSpec) (*specs.Process, error) {
	who, groups := e.User, []string(nil)
	if who == "" {
		who, groups = s.User, s.GroupAdd
	}
	user, err := resolveUser(r.rootfs(s.Id), who, groups)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", s.Id, err)
	}
	sec, err := parseSecurity(s)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", s.Id, err)
	}
	caps := r.caps
	if !e.Privileged {
		if caps, err = r.capabilities(s); err != nil {
			return nil, fmt.Errorf("exec in container %s: %w", s.Id, err)
		}
	}
	cwd := e.WorkingDir
	if cwd == "" {
		cwd = s.Cwd
	}
	for _, kv := range e.Env {
		if k, _, ok := strings.Cut(kv, "="); !ok || k == "" || strings.ContainsRune(kv, 0) {
			return nil, fmt.Errorf("exec in container %s: environment %q is not KEY=VALUE: %w", s.Id, k, errdefs.ErrInvalidArgument)
		}
	}
	p := &specs.Process{
		Terminal: e.Tty, Args: e.Args, Cwd: path.Clean("/" + cwd), User: user.User, NoNewPrivileges: sec.noNewPrivs,
		Env: environment(s, e.Env, user.home, e.Tty), Capabilities: capSets(caps, user.UID),
		OOMScoreAdj: r.oomScoreAdj(s), Rlimits: r.rlimits(s),
	}
	if w := e.Window; w != nil && e.Tty {
		p.ConsoleSize = &specs.Box{Height: uint(min(w.Rows, 65535)), Width: uint(min(w.Columns, 65535))}
	}
	return p, nil
}

// Attach implements runtime.Runtime. Of a container that never ran it waits for
// the start, so that no output is missed.
func (r *Runtime) Attach(ctx context.Context, a *v1.AttachSpec, s runtime.Streams) error {
	if _, err := r.get(a.GetContainerId()); err != nil {
		return err
	}
	io, stop := streams(s)
	defer stop()
	if !a.Stdin {
		io.Stdin = nil
	}
	code, err := r.o.Monitor.Attach(ctx, monitor.AttachRequest{ID: a.ContainerId, Stdin: a.Stdin, Logs: a.Logs}, io)
	if err == nil && s.Ended != nil {
		s.Ended(code)
	}
	return err
}

// streams translates the contract's streams into the monitor's.
func streams(s runtime.Streams) (monitor.IO, func()) {
	done := make(chan struct{})
	io := monitor.IO{Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Started: s.Started}
	if s.Resize != nil {
		ch := make(chan [2]uint16)
		io.Resize = ch
		go func() {
			for {
				select {
				case <-done:
					return
				case w, ok := <-s.Resize:
					if !ok {
						return
					}
					select {
					case ch <- [2]uint16{uint16(min(w.GetRows(), 65535)), uint16(min(w.GetColumns(), 65535))}:
					case <-done:
						return
					}
				}
			}
		}()
	}
	if s.Signals != nil {
		ch := make(chan unix.Signal)
		io.Signals = ch
		go func() {
			for {
				select {
				case <-done:
					return
				case name, ok := <-s.Signals:
					if !ok {
						return
					}
					n, err := signal.ParseSignal(name)
					if err != nil {
						continue
					}
					select {
					case ch <- n:
					case <-done:
						return
					}
				}
			}
		}()
	}
	return io, func() { close(done) }
}

// Stats implements runtime.Runtime.
func (r *Runtime) Stats(_ context.Context, id string) (*v1.Usage, error) {
	r.mu.Lock()
	c, err := r.getLocked(id)
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	pid, running, host := c.pid, c.running(), c.spec.GetNetwork().GetMode() == "host"
	r.mu.Unlock()
	u := &v1.Usage{}
	if running {
		u = r.cg.Group(r.cgroupPath(id)).Usage()
		if !host {
			netCounters(pid, u)
		}
	}
	u.At = now(r.clock)
	return u, nil
}

// netCounters adds up the interfaces that a process sees, lo excepted.
func netCounters(pid int, u *v1.Usage) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/net/dev")
	if err != nil {
		return
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		v := strings.Fields(rest)
		if !ok || len(v) < 10 || strings.TrimSpace(name) == "lo" {
			continue
		}
		n := func(i int) uint64 { x, _ := strconv.ParseUint(v[i], 10, 64); return x }
		u.NetRxBytes += n(0)
		u.NetRxPackets += n(1)
		u.NetTxBytes += n(8)
		u.NetTxPackets += n(9)
	}
}

// maxTop bounds what Top answers.
const maxTop = 4096

// Top implements runtime.Runtime; process ids are this kernel's.
func (r *Runtime) Top(_ context.Context, id string) ([]*v1.Process, error) {
	r.mu.Lock()
	c, err := r.getLocked(id)
	running := err == nil && c.running()
	r.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if !running {
		return nil, fmt.Errorf("container %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	}
	pids, err := r.cg.Group(r.cgroupPath(id)).Procs()
	if err != nil {
		return nil, err
	}
	name := userNames(r.rootfs(id))
	boot := bootTime()
	var out []*v1.Process
	for _, pid := range pids[:min(len(pids), maxTop)] {
		if p := readProcess(pid, boot, name); p != nil {
			out = append(out, p)
		}
	}
	return out, nil
}

func bootTime() time.Time {
	b, _ := os.ReadFile("/proc/stat")
	for _, l := range strings.Split(string(b), "\n") {
		if s, ok := strings.CutPrefix(l, "btime "); ok {
			n, _ := strconv.ParseInt(s, 10, 64)
			return time.Unix(n, 0)
		}
	}
	return time.Time{}
}

func readProcess(pid int, boot time.Time, name func(uint32) string) *v1.Process {
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil
	}
	stat := string(b)
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 0 || end < open || len(stat) < end+2 {
		return nil
	}
	f := strings.Fields(stat[end+2:])
	if len(f) < 22 {
		return nil
	}
	num := func(i int) int64 { n, _ := strconv.ParseInt(f[i], 10, 64); return n }
	const tick = 10 // ms: USER_HZ is 100 everywhere
	p := &v1.Process{
		Pid: int64(pid), Ppid: num(1), State: f[0], CpuMs: uint64(num(11)+num(12)) * tick,
		RssBytes: num(21) * int64(os.Getpagesize()), StartedAt: stamp(boot.Add(time.Duration(num(19)) * tick * time.Millisecond)),
	}
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil {
		p.User = name(st.Uid)
	}
	cmd, _ := os.ReadFile(dir + "/cmdline")
	p.Command = strings.ToValidUTF8(strings.TrimRight(strings.ReplaceAll(string(cmd[:min(len(cmd), 4096)]), "\x00", " "), " "), "?")
	if p.Command == "" {
		p.Command = "[" + strings.ToValidUTF8(stat[open+1:end], "?") + "]"
	}
	return p
}
