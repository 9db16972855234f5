package monitor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// exitOf is the shell's exit code of a wait status.
func exitOf(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// process is one process that is waited for by a pidfd in the net poller: no
// thread is blocked, and its number can't be mistaken.
type process struct {
	pid int
	f   *os.File
}

// openProcess takes hold of a running process or of a zombie child.
func openProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return &process{pid: pid, f: os.NewFile(uintptr(fd), "pidfd")}, nil
}

func (p *process) signal(sig unix.Signal) error {
	rc, err := p.f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return err
	}
	return serr
}

// processEnded tells whether a pidfd's process has ended (it may be a zombie yet).
func processEnded(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return n > 0 || err != nil && err != unix.EINTR
}

// endsWithin tells whether the process has ended, as soon as it has and after d at
// the latest. It blocks a thread: d is short.
func (p *process) endsWithin(d time.Duration) (is bool) {
	rc, err := p.f.SyscallConn()
	if err == nil {
		err = rc.Control(func(fd uintptr) {
			limit := unix.NsecToTimespec(int64(d))
			n, err := unix.Ppoll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, &limit, nil)
			if is = n > 0; err == unix.EINTR {
				time.Sleep(d)
			}
		})
	}
	return is || err != nil
}

// wait blocks until the process has ended; known is false if it was not our
// child, its exit code is lost then.
func (p *process) wait() (code int, known bool) {
	defer p.f.Close()
	rc, err := p.f.SyscallConn()
	if err == nil {
		err = rc.Read(processEnded)
	}
	for err != nil { // no poller: ask
		if processEnded(p.f.Fd()) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	for {
		var ws unix.WaitStatus
		got, err := unix.Wait4(p.pid, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil || got != p.pid:
			return ExitUnknown, false
		case ws.Exited() || ws.Signaled():
			return exitOf(ws), true
		}
	}
}

// reapOrphans waits for zombies that were left to this process (a subreaper or
// PID 1) by others and that nobody in it has asked for within a few seconds.
func reapOrphans(ctx context.Context, log *slog.Logger) {
	const every, patience = 2 * time.Second, 6 * time.Second
	seen := map[string]time.Time{} // pid and start time -> first seen
	for t := time.NewTicker(every); ; {
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		var si unix.Siginfo
		// Look without taking: mostly there is nothing, and /proc need not be read.
		err := unix.Waitid(unix.P_ALL, 0, &si, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if err != nil || si.Signo == 0 {
			clear(seen)
			continue
		}
		now := time.Now()
		found := map[string]time.Time{}
		for _, z := range zombies() {
			first, ok := seen[z.key]
			if !ok {
				first = now
			}
			if now.Sub(first) < patience {
				found[z.key] = first
				continue
			}
			if _, err := unix.Wait4(z.pid, nil, unix.WNOHANG, nil); err == nil {
				log.Debug("collected an orphan", "pid", z.pid)
			}
		}
		seen = found
	}
}

type zombie struct {
	pid int
	key string
}

func zombies() []zombie {
	me := strconv.Itoa(os.Getpid())
	es, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var zs []zombie
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// The command in parentheses may contain anything.
		_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), " ")
		f := strings.Fields(rest)
		if len(f) > 19 && f[0] == "Z" && f[1] == me {
			zs = append(zs, zombie{pid, e.Name() + "@" + f[19]})
		}
	}
	return zs
}

// alive is true if the process exists and is no zombie.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH)
	}
	k := strings.LastIndexByte(string(b), ')')
	return k >= 0 && len(b) > k+2 && b[k+2] != 'Z' && b[k+2] != 'X'
}
