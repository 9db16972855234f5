package qemu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// identity is whom a VMM runs as.
type identity struct {
	uid, gid uint32
	groups   []uint32
	keep     bool // run as ourselves: we are not root
}

type spawnRequest struct {
	path    string
	args    []string   // without argv[0]
	files   []*os.File // become descriptors 3, 4, ...
	log     *os.File   // stdout and stderr
	who     identity
	groups  *cgroups
	machine string
}

// spawn starts a process that has no way back: another user, no capabilities
// (also none to gain: no_new_privs, empty bounding set), a session of its own
// (it outlives us), and born within its control group, so that whenever we die,
// what we started can be found there.
func spawn(r spawnRequest) (pid int, err error) {
	type result struct {
		pid int
		err error
	}
	done := make(chan result, 1)
	var work func()
	work = func() {
		// These attributes belong to the thread, and what it forks inherits them.
		// The thread is never unlocked: it dies with the goroutine. All but the
		// first, which can't; while that is held here, another must take over.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			other := make(chan struct{})
			go func() { defer close(other); work() }()
			<-other
			runtime.UnlockOSThread()
			return
		}
		pid, err := r.fromThisThread()
		done <- result{pid, err}
	}
	go work()
	res := <-done
	return res.pid, res.err
}

func (r spawnRequest) fromThisThread() (int, error) {
	attr := &syscall.SysProcAttr{Setsid: true}
	if r.groups != nil {
		leave, err := r.groups.enterThread(r.machine)
		defer leave()
		if err != nil {
			return 0, err
		}
		dir, err := r.groups.openV2(r.machine)
		if err != nil {
			return 0, err
		}
		if dir != nil {
			defer dir.Close()
			attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return 0, fmt.Errorf("no_new_privs: %w", err)
	}
	if !r.who.keep {
		for c := uintptr(0); ; c++ {
			err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
			if errors.Is(err, unix.EINVAL) {
				break // past the last capability
			}
			if err != nil && !errors.Is(err, unix.EPERM) {
				return 0, fmt.Errorf("drop capability %d: %w", c, err)
			}
		}
		attr.Credential = &syscall.Credential{Uid: r.who.uid, Gid: r.who.gid, Groups: r.who.groups}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(r.path, append([]string{r.path}, r.args...), &os.ProcAttr{
		Dir:   "/",
		Env:   []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Files: append([]*os.File{null, r.log, r.log}, r.files...),
		Sys:   attr,
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", r.path, err)
	}
	go func() { _, _ = p.Wait() }() // reap it whenever it ends, also after the driver was closed
	for what, lim := range map[int]unix.Rlimit{
		unix.RLIMIT_CORE:   {},                             // a core holds the guest's memory
		unix.RLIMIT_NOFILE: {Cur: maxFiles, Max: maxFiles}, // one for each disk
	} {
		_ = unix.Prlimit(p.Pid, what, &lim, nil)
	}
	return p.Pid, nil
}

const maxFiles = 4096
