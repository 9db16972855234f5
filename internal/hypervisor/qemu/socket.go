package qemu

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// withPath calls f with a path of a socket that is short enough for the kernel
// (107 bytes), by way of an open directory when it is not.
func withPath(path string, f func(short string) error) error {
	if len(path) < 100 {
		return f(path)
	}
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(fd)
	return f(fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(path)))
}

// listen makes a listening socket to hand to a VMM. It can be connected to
// before the VMM even runs.
func listen(path string) (*os.File, error) {
	var file *os.File
	err := withPath(path, func(short string) error {
		_ = os.Remove(short)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		if err := os.Chmod(short, 0o600); err != nil {
			return err
		}
		file, err = l.File()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return file, nil
}

// dial connects to a machine's socket.
func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	var conn net.Conn
	err := withPath(path, func(short string) error {
		var d net.Dialer
		var err error
		for {
			// EAGAIN: its queue is full of connections that the VMM has not taken yet
			if conn, err = d.DialContext(ctx, "unix", short); err == nil || !isAgain(err) {
				return err
			}
			select {
			case <-ctx.Done():
				return err
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return conn.(*net.UnixConn), nil
}
