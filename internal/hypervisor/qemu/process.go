package qemu

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// process names a process for good: a pid alone is reused, a pid with its start
// time and the boot it was seen in is not.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot
	Boot  string `json:"boot"`  // boot id of the kernel
}

// bootID of the running kernel.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id (is /proc mounted?): %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// identify returns the lasting name of a live process.
func identify(pid int, boot string) (process, error) {
	_, start, err := procStat(pid)
	if err != nil {
		return process{}, err
	}
	return process{pid, start, boot}, nil
}

// procStat returns state and start time of a process.
func procStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The name in parentheses may hold anything, also parentheses.
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat is too short", pid)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	return f[0][0], start, err
}

// alive says whether the process still runs (a zombie does not).
func (p process) alive(boot string) bool {
	if p.PID <= 0 || p.Boot != boot {
		return false
	}
	state, start, err := procStat(p.PID)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// handle is an open process: signals through it can't hit another one.
type handle struct {
	f    *os.File
	exit chan struct{} // closed when the process has ended
}

// open gets hold of the process, or fails with ESRCH if it has ended.
func (p process) open(boot string) (*handle, error) {
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	h := &handle{f: os.NewFile(uintptr(fd), fmt.Sprintf("pid %d", p.PID)), exit: make(chan struct{})}
	if !p.alive(boot) { // checked after the open: now the pid can't change hands
		_ = h.f.Close()
		return nil, fmt.Errorf("open process %d: %w", p.PID, unix.ESRCH)
	}
	rc, err := h.f.SyscallConn()
	if err != nil {
		_ = h.f.Close()
		return nil, fmt.Errorf("open process %d: %w", p.PID, err)
	}
	go func() {
		// The runtime's poller wakes this when the pidfd is readable: the process has ended.
		err := rc.Read(func(fd uintptr) bool {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		if err == nil {
			close(h.exit)
		}
	}()
	return h, nil
}

func (h *handle) kill() error {
	rc, err := h.f.SyscallConn()
	if err != nil {
		return err
	}
	var kerr error
	if err := rc.Control(func(fd uintptr) { kerr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(kerr, unix.ESRCH) {
		return nil
	}
	return kerr
}

// close lets go of the process; exit is then not closed any more.
func (h *handle) close() { _ = h.f.Close() }

// pss is the proportional set size of a process in bytes.
func pss(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		p := strings.Fields(s.Text())
		if len(p) == 3 && p[0] == "Pss:" {
			kib, err := strconv.ParseInt(p[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no Pss", f.Name())
}

// strays are processes whose command line has -name with this driver's tag:
// the net under the control groups, for hosts that have none.
func strays(tag string) map[int]string {
	found := map[int]string{}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil || !bytes.Contains(b, []byte(tag)) {
			continue
		}
		argv := strings.Split(string(b), "\x00")
		for i := 0; i+1 < len(argv); i++ {
			if argv[i] != "-name" {
				continue
			}
			if rest, ok := strings.CutPrefix(argv[i+1], "guest="+tag+"."); ok {
				id, _, _ := strings.Cut(rest, ",")
				found[pid] = id
			}
		}
	}
	return found
}
