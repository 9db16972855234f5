// Package session turns the raw byte stream of a machine's agent port
// (virtio-serial) into connections.
//
// The port is one stream without beginning or end: it has no notion of a
// connection, keeps bytes of a peer that is long dead, and does not tell one
// side that the other one was restarted. This package puts numbered sessions on
// it. The host begins one with Connect; the guest takes them from a Listener:
//
//	conn, err := session.Connect(ctx, raw)        // host: raw from hypervisor.Driver.Channel
//	cc, err := rpc.ConnClient(conn, idle, ping)   // HTTP/2 directly on it
//
//	l := session.NewListener(openPort)            // guest
//	for { c, err := l.Accept(); go rpc.ServeConn(ctx, c, handler) }
//
// What it promises:
//   - A connection carries the bytes of its own session only, in order, complete,
//     checked by CRC32C; anything else ends it with an error, never with wrong bytes.
//   - A restart of either side ends the other's connection at once (see Connect
//     and Listener), so that it can connect again.
//   - Nothing unbounded is buffered: every connection has a receive window, and a
//     peer that overruns it, or floods the stream with rubbish, loses the session.
//   - Connections have real deadlines.
//
// A dead connection's errors are errdefs.ErrUnavailable (peer gone, restarted),
// errdefs.ErrDataLoss (broken or hostile stream) or net.ErrClosed (own Close).
package session

import (
	"errors"
	"fmt"
	"net"

	"github.com/containerd/errdefs"
)

// PortName is the name of the virtio-serial port that carries the agent channel:
// the host gives it to the device (name=...), the guest looks for it.
const PortName = "tandem.agent.0"

// Version of the session protocol: the lowest and the highest spoken here.
const (
	MinVersion = 1
	MaxVersion = 1
)

// Bounds of what a peer can make this side hold or look at.
const (
	// MaxPayload is the longest payload of one frame, bytes.
	MaxPayload = 16 << 10
	// Window is how many bytes a peer may send ahead of what was read.
	Window = 256 << 10
	// maxRubbish is how many bytes of no session a peer may send before it has to
	// be taken for broken. Stale bytes of an earlier session are at most what
	// window, virtqueue and socket held.
	maxRubbish = 8 << 20
)

var (
	errPeerGone      = fmt.Errorf("session: the other side of the agent channel went away: %w", errdefs.ErrUnavailable)
	errPeerRestarted = fmt.Errorf("session: the other side of the agent channel was restarted; connect again: %w", errdefs.ErrUnavailable)
	errReplaced      = fmt.Errorf("session: the host began a newer session: %w", errdefs.ErrUnavailable)
	errRefused       = fmt.Errorf("session: the guest does not know this session; connect again: %w", errdefs.ErrUnavailable)
)

func dataLoss(format string, args ...any) error {
	return fmt.Errorf("session: "+format+": %w", append(args, errdefs.ErrDataLoss)...)
}

// gone wraps the end of the raw stream.
func gone(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return net.ErrClosed
	}
	return fmt.Errorf("%w (%w)", errPeerGone, err)
}

type addr string

func (addr) Network() string  { return "tandem-session" }
func (a addr) String() string { return string(a) }
