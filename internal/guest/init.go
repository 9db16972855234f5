package guest

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/guest/layout"
)

// Init is PID 1. It returns never: without it the kernel panics, which the host
// sees at once.
func Init() {
	began := uptime()
	mountEarly()
	log := newLogger("init")
	loadList(layout.BootList, log)
	loaded := uptime()
	if err := moveRoot(); err != nil {
		// Containers will not start, but the host can still be told so.
		log.Error("make the root fit for containers", "error", err)
	}
	mountAll(log)
	settings(log)
	log.Info("up", "began", began, "boot_modules", loaded-began, "mounts_and_settings", uptime()-loaded)
	stop := make(chan os.Signal, 4)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP)
	go superviseAgent(log)
	go serveMonitor(log)
	go watchUevents(log)
	go func() {
		// The agent goes first where there is but one CPU. The thread ends with us.
		runtime.LockOSThread()
		unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
		from := uptime()
		loadList(layout.LateList, log)
		log.Info("late modules are loaded", "took", uptime()-from)
		if err := os.WriteFile(layout.LateDone, nil, 0o600); err != nil {
			log.Error("mark modules as loaded", "error", err)
		}
	}()
	for s := range stop {
		powerDown(log, s == unix.SIGINT)
	}
}

// superviseAgent keeps one agent running. It restarts at once, and slower when
// the agent does not live long.
func superviseAgent(log *slog.Logger) {
	wait := time.Duration(0)
	for {
		began := time.Now()
		err := runAgentChild()
		if time.Since(began) > 10*time.Second {
			wait = 0
		}
		log.Warn("the agent ended; starting it again", "error", err, "wait", wait)
		time.Sleep(wait)
		wait = min(max(2*wait, 10*time.Millisecond), 2*time.Second)
	}
}

func runAgentChild() error {
	c := exec.Command(layout.Init, "agent")
	c.Env = environment
	console, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0)
	if err == nil {
		defer console.Close()
		c.Stdout, c.Stderr = console, console // a panic's trace is for the host's eyes
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	// The agent goes last when memory runs out: it is what can tell.
	os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", c.Process.Pid), []byte("-999"), 0)
	return c.Wait()
}

// environment of everything that runs here.
var environment = []string{"PATH=/bin:/sbin:/usr/bin", "HOME=/root"}

// powerDown ends everything and the machine. Containers were stopped before, if
// there was time; what is left gets SIGKILL.
func powerDown(log *slog.Logger, reboot bool) {
	log.Info("going down", "reboot", reboot)
	unix.Kill(-1, unix.SIGKILL)
	done := make(chan struct{})
	go func() {
		unix.Sync()
		unix.Unmount(layout.StateDir, unix.MNT_DETACH)
		remountReadOnly()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(20 * time.Second): // a disk that does not answer must not hold us
	}
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	if err := unix.Reboot(how); err != nil {
		log.Error("power off", "error", err)
	}
}
