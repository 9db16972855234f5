package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// runcTimeout bounds one call; emulated and loaded machines are slow.
const runcTimeout = 3 * time.Minute

// runRunc runs the OCI runtime with argv and the given standard streams (nil:
// /dev/null). It dies with the monitor, so that a new one finds no half-done
// start going on behind its back.
func runRunc(path, root, logFile string, args []string, files []*os.File) error {
	done := make(chan error, 1)
	go func() {
		// The kernel ties the parent-death signal to the thread that forked.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- runLocked(path, root, logFile, args, files)
	}()
	return <-done
}

func runLocked(path, root, logFile string, args []string, files []*os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), runcTimeout)
	defer cancel()
	defer os.Remove(logFile)
	cmd := exec.CommandContext(ctx, path, append([]string{"--root", root, "--log", logFile, "--log-format", "json"}, args...)...)
	// Short-lived: collecting garbage would cost more than the memory.
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "GOGC=off", "GOMEMLIMIT=256MiB"}
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL, Setsid: true}
	for i, f := range files {
		if f == nil {
			continue
		}
		switch i {
		case 0:
			cmd.Stdin = f
		case 1:
			cmd.Stdout = f
		case 2:
			cmd.Stderr = f
		}
	}
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return fmt.Errorf("runc %s took longer than %v: %w", args[0], runcTimeout, errdefs.ErrUnavailable)
	}
	msg := lastError(logFile)
	if msg == "" {
		return fmt.Errorf("runc %s: %w: %w", args[0], err, errdefs.ErrInternal)
	}
	return &remoteError{msg, classify(msg)}
}

// classify tells a user's mistake from trouble of ours.
func classify(msg string) error {
	for _, s := range []string{"executable file not found", "no such file or directory", "permission denied",
		"exec format error", "is a directory", "not a directory", "unknown capability", "invalid argument", "read-only file system"} {
		if strings.Contains(msg, s) {
			return errdefs.ErrInvalidArgument
		}
	}
	if strings.Contains(msg, "paused container") {
		return errdefs.ErrFailedPrecondition
	}
	return errdefs.ErrInternal
}

// lastError is the last error that runc logged.
func lastError(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > 64<<10 {
		_, _ = f.Seek(-64<<10, io.SeekEnd)
	}
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	msg := ""
	for _, line := range bytes.Split(b, []byte{'\n'}) {
		var l struct{ Level, Msg string }
		if json.Unmarshal(line, &l) == nil && (l.Level == "error" || l.Level == "fatal") {
			msg = l.Msg
		}
	}
	return msg
}
