// Package initproc is a container's init (docker run --init): process 1 that
// starts the real program, passes signals on, collects orphans and ends with the
// program's exit code.
//
// A static binary that serves as it calls Main first of all:
//
//	func main() {
//		initproc.Main() // returns unless called as tandem-init
//		...
//	}
package initproc

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Name is what the binary is called as inside a container.
const Name = "tandem-init"

// Main acts as init and exits, if the program was called as Name; otherwise it
// returns at once. Arguments: ["--"] PROGRAM ARG...
func Main() {
	if len(os.Args) == 0 || filepath.Base(os.Args[0]) != Name {
		return
	}
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	os.Exit(run(args))
}

func run(args []string) int {
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, Name+": no program given")
		return 2
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Name, err)
		return 127
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	attr := &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
		// A group of its own in the foreground, so that the terminal's keys reach it.
		Sys: &syscall.SysProcAttr{Setpgid: true},
	}
	if _, err := unix.IoctlGetTermios(0, unix.TCGETS); err == nil {
		attr.Sys.Foreground, attr.Sys.Ctty = true, 0
	}
	pid, err := syscall.ForkExec(path, args, attr)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s: %v\n", Name, args[0], err)
		return 126
	}
	for s := range signals {
		n, ok := s.(syscall.Signal)
		switch {
		case !ok, n == syscall.SIGURG, n == syscall.SIGTTIN, n == syscall.SIGTTOU: // the Go runtime's own; the terminal's
		case n == syscall.SIGCHLD:
			for {
				var ws unix.WaitStatus
				got, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
				if err == unix.EINTR {
					continue
				}
				if got <= 0 {
					break
				}
				if got == pid {
					if ws.Signaled() {
						return 128 + int(ws.Signal())
					}
					return ws.ExitStatus()
				}
			}
		default:
			_ = unix.Kill(pid, n)
		}
	}
	return 1
}
