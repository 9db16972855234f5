// Package rpc is how Tandem's processes reach each other: Connect services
// (gRPC for programs, JSON for curl) over HTTP/2 without TLS: on a unix socket, on
// one byte stream to a guest, and backwards through the connection that an agent
// opened to its server.
//
// Serve a handler on a listener with NewServer, on a single stream with
// ServeConn. Make clients with NewClient (a dial function) or ConnClient (one
// stream). Put Errors() on handlers and clients, so that errors keep their class.
package rpc

//lint:file-ignore SA1019 net/http serves no single connection and pings none on request;
// golang.org/x/net/http2 does both, and one implementation at both ends is worth keeping.

import (
	"context"
	"crypto/tls"
	"errors"
	"math"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/net/http2"
)

// Limits of every message: what a peer may make us hold at once.
const (
	MaxMessage      = 16 << 20 // between server, agents and users
	MaxGuestMessage = 4 << 20  // from and to a guest
)

// Nothing is compressed: on a socket of this machine, or to a guest, that costs more
// than it saves.
var uncompressed = connect.WithCompressMinBytes(math.MaxInt32)

// HandlerOptions are the options of every handler that a peer of trust calls.
func HandlerOptions() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithInterceptors(Errors()), connect.WithReadMaxBytes(MaxMessage), uncompressed}
}

// ClientOptions are the options of every client of a peer of trust.
func ClientOptions() []connect.ClientOption {
	return []connect.ClientOption{connect.WithInterceptors(Errors()), connect.WithReadMaxBytes(MaxMessage), connect.WithGRPC()}
}

// GuestHandlerOptions are the options of every handler in a guest.
func GuestHandlerOptions() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithInterceptors(Errors()), connect.WithReadMaxBytes(MaxGuestMessage), uncompressed}
}

// GuestClientOptions are for clients that talk to a guest.
func GuestClientOptions() []connect.ClientOption {
	return []connect.ClientOption{connect.WithInterceptors(Errors()), connect.WithReadMaxBytes(MaxGuestMessage), connect.WithGRPC()}
}

// NewServer serves HTTP/1.1 and HTTP/2 without TLS (unix sockets, tunnels).
func NewServer(h http.Handler) *http.Server {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return &http.Server{Handler: h, Protocols: p, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
}

// NewClient is an HTTP/2 client that reaches one server by dial. Give
// "http://tandem" as base URL.
func NewClient(dial func(ctx context.Context) (net.Conn, error)) *http.Client {
	return &http.Client{Transport: &http2.Transport{
		AllowHTTP:       true,
		ReadIdleTimeout: 15 * time.Second,
		PingTimeout:     15 * time.Second,
		DialTLSContext: func(ctx context.Context, _, _ string, _ *tls.Config) (net.Conn, error) {
			return dial(ctx)
		},
	}}
}

// BaseURL is the base URL to give a service's client with NewClient and ConnClient.
const BaseURL = "http://tandem"

// ServeConn serves one HTTP/2 connection until it ends or ctx does.
func ServeConn(ctx context.Context, c net.Conn, h http.Handler) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	(&http2.Server{MaxReadFrameSize: 1 << 20}).ServeConn(c, &http2.ServeConnOpts{Context: ctx, Handler: h, BaseConfig: &http.Server{}})
}

// Conn is a client on one byte stream. When the stream breaks it stays broken.
type Conn struct {
	*http.Client
	c  net.Conn
	cc *http2.ClientConn
}

// ConnClient starts HTTP/2 on c as a client. idle is how long the peer may be
// silent before it is pinged; ping is how long it may take to answer.
func ConnClient(c net.Conn, idle, ping time.Duration) (*Conn, error) {
	t := &http2.Transport{AllowHTTP: true, ReadIdleTimeout: idle, PingTimeout: ping}
	cc, err := t.NewClientConn(c)
	if err != nil {
		return nil, err
	}
	return &Conn{Client: &http.Client{Transport: cc}, c: c, cc: cc}, nil
}

// Alive is false once the connection cannot take a further call.
func (c *Conn) Alive() bool { return c.cc.CanTakeNewRequest() }

// Ping measures a round trip on the connection itself.
func (c *Conn) Ping(ctx context.Context) error { return c.cc.Ping(ctx) }

// Close ends the connection and every call on it.
func (c *Conn) Close() error {
	return errors.Join(c.cc.Close(), ignoreClosed(c.c.Close()))
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
