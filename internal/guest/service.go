package guest

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
)

// Protocol is the highest version of GuestService spoken here.
const Protocol = 1

// service is GuestService.
type service struct {
	ctx        context.Context // of the process
	log        *slog.Logger
	containers *containers
	started    time.Duration // uptime when the agent began

	session atomic.Value // <-chan struct{}: closed at the newest session's end

	mu sync.Mutex // serialises what changes the guest
	id identity
}

var _ tandemv1connect.GuestServiceHandler = (*service)(nil)

func newService(ctx context.Context, log *slog.Logger, id identity, c *containers) *service {
	return &service{ctx: ctx, log: log, containers: c, id: id, started: uptime()}
}

// uptime counts also while the machine sleeps.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// Hello is the first call of a session.
func (s *service) Hello(_ context.Context, r *connect.Request[v1.GuestHelloRequest]) (*connect.Response[v1.GuestHelloResponse], error) {
	if r.Msg.Protocol < 1 {
		return nil, fmt.Errorf("protocol %d: %w", r.Msg.Protocol, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	id := s.id
	s.mu.Unlock()
	var u unix.Utsname
	unix.Uname(&u)
	return connect.NewResponse(&v1.GuestHelloResponse{
		Protocol:    min(r.Msg.Protocol, Protocol),
		Version:     Version,
		GuestId:     id.GuestID,
		Configured:  id.configured(),
		MachineId:   id.MachineID,
		Kernel:      unix.ByteSliceToString(u.Release[:]),
		Uptime:      durationpb.New(uptime()),
		BootToAgent: durationpb.New(s.started),
	}), nil
}

// Ping answers at once: it takes no lock.
func (s *service) Ping(_ context.Context, r *connect.Request[v1.PingRequest]) (*connect.Response[v1.PingResponse], error) {
	return connect.NewResponse(&v1.PingResponse{Nonce: r.Msg.Nonce}), nil
}

// Quiesce readies the guest to be saved as a template. Whoever wakes up from it
// has no identity until Configure.
func (s *service) Quiesce(ctx context.Context, _ *connect.Request[v1.QuiesceRequest]) (*connect.Response[v1.QuiesceResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id.configured() {
		return nil, fmt.Errorf("this guest is machine %s already; only a fresh one can be a template: %w", s.id.MachineID, errdefs.ErrFailedPrecondition)
	}
	if err := waitModules(ctx); err != nil {
		return nil, err
	}
	s.id = identity{Sealed: true}
	if err := s.id.save(); err != nil {
		return nil, err
	}
	slim()
	return connect.NewResponse(&v1.QuiesceResponse{}), nil
}
