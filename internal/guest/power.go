package guest

import (
	"context"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

const (
	defaultShutdown = 10 * time.Second
	maxShutdown     = 10 * time.Minute
	// answerTime is how long an answer may take to a host that does not hang up.
	answerTime = time.Second
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
	sig := unix.SIGTERM
	if r.Msg.Reboot {
		sig = unix.SIGINT
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
