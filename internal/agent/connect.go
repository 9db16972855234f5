package agent

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

// reach opens a machine's channel and says hello.
func (a *Agent) reach(ctx context.Context, id string) (*GuestLink, *v1.GuestHelloResponse, error) {
	ch, err := a.o.Driver.Channel(ctx, id)
	if err != nil {
		return nil, nil, fmt.Errorf("agent channel: %w", err)
	}
	link, err := a.o.Connect(ctx, id, ch)
	if err != nil {
		ch.Close()
		return nil, nil, fmt.Errorf("agent channel: %w", err)
	}
	call, cancel := context.WithTimeout(ctx, a.o.Tuning.CallTimeout)
	defer cancel()
	hello, err := link.Guest.Hello(call, connect.NewRequest(&v1.GuestHelloRequest{Protocol: guestProtocol, Version: a.o.Version}))
	if err != nil {
		link.Close()
		return nil, nil, fmt.Errorf("hello to the guest: %w", err)
	}
	if p := hello.Msg.Protocol; p == 0 || p > guestProtocol {
		link.Close()
		return nil, nil, fmt.Errorf("the guest speaks protocol %d, this agent up to %d: %w", p, guestProtocol, errdefs.ErrFailedPrecondition)
	}
	return link, hello.Msg, nil
}

// reachSoon tries reach until ctx ends or the machine does.
func (a *Agent) reachSoon(ctx context.Context, id string) (*GuestLink, *v1.GuestHelloResponse, error) {
	delay := 20 * time.Millisecond
	for {
		link, hello, err := a.reach(ctx, id)
		if err == nil {
			return link, hello, nil
		}
		if st, ierr := a.o.Driver.Inspect(ctx, id); ierr != nil || st.State != hypervisor.Running {
			return nil, nil, fmt.Errorf("the VMM ended (%s): %w", cut(st.Message, 512), err)
		}
		select {
		case <-ctx.Done():
			return nil, nil, err
		case <-a.o.Clock.After(delay):
		}
		delay = min(2*delay, time.Second)
	}
}

// deleteHalfTemplate removes a machine that was to become a template.
func (a *Agent) deleteHalfTemplate(ctx context.Context, id string) {
	if err := a.o.Driver.Delete(ctx, id); err != nil && !errdefs.IsNotFound(err) {
		a.log.Warn("a half-made template stays until the next start", "machine", id, "error", err)
	}
}
