package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

const (
	defaultShutdown = 10 * time.Second
	maxShutdown     = 10 * time.Minute
	// answerTime is how long an answer may take to a host that does not hang up.
	answerTime = time.Second
)

// What PID 1 understands.
const (
	powerOff = unix.SIGTERM
	restart  = unix.SIGINT
)

// Shutdown stops the containers, answers, and has PID 1 end the machine.
func (s *service) Shutdown(ctx context.Context, r *connect.Request[v1.ShutdownRequest]) (*connect.Response[v1.ShutdownResponse], error) {
	timeout := defaultShutdown
	if d := r.Msg.Timeout; d != nil {
		if timeout = d.AsDuration(); !d.IsValid() || timeout < 0 || timeout > maxShutdown {
			return nil, fmt.Errorf("shutdown time-out %v is not between 0 and %v: %w", d, maxShutdown, errdefs.ErrInvalidArgument)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// Whoever asked may go meanwhile: what was begun is ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	s.containers.stopAll(ctx, timeout)
	sig := powerOff
	if r.Msg.Reboot {
		sig = restart
	}
	go func() {
		// The answer goes first: the host hangs up when it has it.
		select {
		case <-s.hungUp():
		case <-time.After(answerTime):
		}
		if err := unix.Kill(1, sig); err != nil {
			s.log.Error("tell PID 1 to go down", "error", os.NewSyscallError("kill", err))
		}
	}()
	return connect.NewResponse(&v1.ShutdownResponse{}), nil
}

// watchPowerButton makes the ACPI power button, which a host presses when the
// agent channel does not answer it, an orderly end.
func (s *service) watchPowerButton(ctx context.Context) error {
	if err := waitModules(ctx); err != nil { // the button's driver among them
		return err
	}
	family, err := netlink.GenlFamilyGet("acpi_event")
	if err != nil || len(family.Groups) == 0 {
		return fmt.Errorf("ACPI events: %w", err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_GENERIC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, int(family.Groups[0].ID)); err != nil {
		return fmt.Errorf("ACPI events: %w", err)
	}
	buf := make([]byte, 8<<10)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR || err == unix.ENOBUFS {
			continue
		}
		if err != nil {
			return err
		}
		// struct acpi_genl_event begins with the class of the device.
		if nl, ok := from.(*unix.SockaddrNetlink); ok && nl.Pid == 0 && bytes.Contains(buf[:n], []byte("button/power")) {
			s.log.Info("power button")
			s.containers.stopAll(ctx, defaultShutdown)
			return os.NewSyscallError("kill", unix.Kill(1, powerOff))
		}
	}
}
