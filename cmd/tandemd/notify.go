package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"

	"connectrpc.com/connect"
)

// notifySocket is where systemd, if it started this process, wants to be told that
// it is ready (Type=notify). Processes that are started later don't see it.
func notifySocket() string {
	defer os.Unsetenv("NOTIFY_SOCKET")
	return os.Getenv("NOTIFY_SOCKET")
}

// agentTime is how long a start waits for the agent beside the server. One that needs
// longer has said why in the log, and the server is of use without it.
const agentTime = time.Minute

// usable returns a function that says whether the server answers on its socket and,
// with withAgent, a host is connected to it: containers can be run then.
func usable(socket string, withAgent bool) func(context.Context) bool {
	h := rpc.NewClient(func(ctx context.Context) (net.Conn, error) { return (&net.Dialer{}).DialContext(ctx, "unix", socket) })
	api := tandemv1connect.NewSystemServiceClient(h, rpc.BaseURL, rpc.ClientOptions()...)
	enough := time.Now().Add(agentTime)
	return func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		res, err := api.Hosts(ctx, connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			return false
		}
		connected := func(h *v1.Host) bool { return h.Connected }
		if !withAgent || slices.ContainsFunc(res.Msg.Hosts, connected) || time.Now().After(enough) {
			h.CloseIdleConnections()
			return true
		}
		return false
	}
}

// notifyReady waits until ready says so and tells whom it may concern.
func notifyReady(ctx context.Context, to string, ready func(context.Context) bool) error {
	if to == "" {
		return nil
	}
	for !ready(ctx) {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(50 * time.Millisecond):
		}
	}
	// A name that begins with @ is an abstract one for systemd and package net alike.
	c, err := net.Dial("unixgram", to)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("READY=1"))
	return err
}

// haltTime is how long machines and containers may take to end when the host goes
// down; less than TimeoutStopSec in build/tandem.service.
const haltTime = 110 * time.Second

// hostGoesDown asks systemd whether the end of this process is that of the host. It
// says no where there is no systemd: nobody else tells.
func hostGoesDown() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	out, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output() // fails when it says so
	return strings.TrimSpace(string(out)) == "stopping"
}
