// Package spawn starts the processes that outlive the one that starts them: what
// workloads lean on while the server and agent are away.
//
//	start := spawn.Session([]string{exe, "monitor", "--run-dir", dir}, dir+"/monitor.log")
//	err := start() // each call starts one; the program itself sees to it that there is one
package spawn

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Session returns a function that starts argv in a session of its own, in the
// directory / so that it holds no other; what it prints is appended to logPath
// ("" = nowhere). The function returns when the process runs, and reaps it when
// it ends while the starter is still there.
//
// The process is born in the control group (of cgroup v2) that group opens, so that
// what kills the starter's group does not reach it. Without group, and where that
// opens none (nil, nil), it stays in the starter's.
func Session(argv []string, logPath string, group ...func() (*os.File, error)) func() error {
	return func() error {
		if len(argv) == 0 {
			return fmt.Errorf("start a process: no command: %w", errdefs.ErrInvalidArgument)
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = "/"
		attr := &unix.SysProcAttr{Setsid: true}
		cmd.SysProcAttr = attr
		what := filepath.Base(argv[0])
		if len(argv) > 1 {
			what += " " + argv[1]
		}
		for _, open := range group {
			dir, err := open()
			if err != nil {
				return fmt.Errorf("start %s: %w", what, err)
			}
			if dir != nil {
				defer dir.Close()
				attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
			}
		}
		if logPath != "" {
			f, err := os.OpenFile(logPath, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
			if err != nil {
				return fmt.Errorf("start %s: its log: %w", what, err)
			}
			defer f.Close()
			cmd.Stdout, cmd.Stderr = f, f
		}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", what, err)
		}
		go func() { _ = cmd.Wait() }()
		return nil
	}
}
