package agent

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/runtime/remote"
	wire "tandem/internal/session"
)

// connectGuest is the Connector of real machines: a session on the agent port,
// HTTP/2 on the session, the guest's services on that.
func connectGuest(ctx context.Context, machine string, channel net.Conn) (*GuestLink, error) {
	sc, err := wire.Connect(ctx, channel)
	if err != nil {
		channel.Close()
		return nil, err
	}
	// Ping, the agent's own keep-alive, watches the guest; HTTP/2's watches nothing more.
	cc, err := rpc.ConnClient(sc, time.Minute, time.Minute)
	if err != nil {
		sc.Close()
		channel.Close()
		return nil, err
	}
	done := make(chan struct{})
	link := &GuestLink{
		Guest:   tandemv1connect.NewGuestServiceClient(cc, rpc.BaseURL, rpc.GuestClientOptions()...),
		Runtime: remote.NewClient(cc.Client, rpc.BaseURL),
		Done:    done,
		Close: func() {
			cc.Close()
			sc.Close()
			channel.Close()
		},
	}
	ended, ok := sc.(interface{ Done() <-chan struct{} })
	if !ok {
		link.Close()
		return nil, fmt.Errorf("session with %s can't tell its end: %w", machine, errdefs.ErrInternal)
	}
	go func() {
		<-ended.Done()
		close(done)
	}()
	return link, nil
}
