package rpc

import (
	"bufio"
	"context"
	"crypto/subtle"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

// TunnelPath is where an agent asks its server to turn the connection round.
const TunnelPath = "/tandem/agent"

const tunnelProtocol = "tandem-agent/1"

func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.LogOutput = io.Discard
	c.EnableKeepAlive = true
	c.KeepAliveInterval = 5 * time.Second
	c.ConnectionWriteTimeout = 15 * time.Second
	c.MaxStreamWindowSize = 4 << 20
	return c
}

// OpenTunnel is an agent's side: it sends the upgrade on conn with its token and
// returns a listener on which the server's calls arrive.
func OpenTunnel(ctx context.Context, conn net.Conn, hostID, token string) (net.Listener, error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	req := "GET " + TunnelPath + " HTTP/1.1\r\nHost: tandem\r\nConnection: Upgrade\r\nUpgrade: " + tunnelProtocol +
		"\r\nAuthorization: Bearer " + token + "\r\nTandem-Host: " + hostID + "\r\n\r\n"
	if strings.ContainsAny(hostID+token, "\r\n ") {
		stop()
		conn.Close()
		return nil, fmt.Errorf("host id or token with white space: %w", errdefs.ErrInvalidArgument)
	}
	if _, err := io.WriteString(conn, req); err != nil {
		stop()
		conn.Close()
		return nil, fmt.Errorf("tunnel to the server: %w: %w", err, errdefs.ErrUnavailable)
	}
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, nil)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("tunnel to the server: %w: %w", err, errdefs.ErrUnavailable)
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		msg, _ := io.ReadAll(io.LimitReader(res.Body, 512))
		conn.Close()
		var class error = errdefs.ErrUnavailable
		if res.StatusCode == http.StatusUnauthorized {
			class = errdefs.ErrPermissionDenied
		}
		return nil, fmt.Errorf("the server refused this host: %s: %w", strings.TrimSpace(string(msg)), class)
	}
	conn.SetDeadline(time.Time{})
	s, err := yamux.Server(&buffered{conn, br}, muxConfig())
	if err != nil {
		conn.Close()
		return nil, err
	}
	return s, nil
}

// Tunnel is the server's side: Dial reaches the agent's services.
type Tunnel struct {
	HostID string
	mux    *yamux.Session
}

// AcceptTunnel is the server's handler of TunnelPath: it checks the token and
// takes the connection over.
func AcceptTunnel(w http.ResponseWriter, r *http.Request, token string) (*Tunnel, error) {
	got := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	if token == "" || subtle.ConstantTimeCompare([]byte(got), []byte(token)) != 1 {
		http.Error(w, "the token is not this cluster's", http.StatusUnauthorized)
		return nil, fmt.Errorf("agent with a wrong token: %w", errdefs.ErrPermissionDenied)
	}
	host := r.Header.Get("Tandem-Host")
	if host == "" || len(host) > 64 || r.Header.Get("Upgrade") != tunnelProtocol {
		http.Error(w, "not an agent's upgrade of protocol "+tunnelProtocol, http.StatusBadRequest)
		return nil, fmt.Errorf("agent's upgrade: %w", errdefs.ErrInvalidArgument)
	}
	conn, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "the tunnel needs HTTP/1.1", http.StatusBadRequest)
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, err = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+tunnelProtocol+"\r\n\r\n")
	if err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	mux, err := yamux.Client(&buffered{conn, brw.Reader}, muxConfig())
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Tunnel{HostID: host, mux: mux}, nil
}

// Dial opens a connection to the agent, for NewClient.
func (t *Tunnel) Dial(context.Context) (net.Conn, error) { return t.mux.Open() }

// Done is closed when the tunnel has ended.
func (t *Tunnel) Done() <-chan struct{} { return t.mux.CloseChan() }

// Close ends the tunnel.
func (t *Tunnel) Close() error { return t.mux.Close() }

// buffered reads first what the HTTP reader had taken in already.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }
