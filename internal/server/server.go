// Package server is Tandem's API and what runs it: it opens the state
// (internal/store), runs the controllers (internal/control), takes in agents'
// tunnels, and serves the Connect services of api/tandem/v1/api.proto on a unix
// socket.
//
//	s, err := server.New(server.Options{StateDir: "/var/lib/tandem", RunDir: "/run/tandem", Logger: log})
//	err = s.Run(ctx) // until ctx ends or the state fails
//
// Who may open the socket (mode 0660) may do everything; an agent shows the token
// of StateDir/agent-token. Nothing that runs depends on the server's life: it may
// be killed at any moment and started again.
package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/clock"
	"tandem/internal/control"
	"tandem/internal/rpc"
	"tandem/internal/store"
)

// Options of New.
type Options struct {
	StateDir string // required: state, keys, the agents' token
	RunDir   string // required: the socket
	// ClusterCIDR is the range that projects' networks are cut from (default
	// 10.64.0.0/10).
	ClusterCIDR netip.Prefix
	// Endpoints of an etcd cluster that runs already; empty: an embedded member.
	Endpoints []string
	Logger    *slog.Logger
	Clock     control.Clock
	Version   string
	Elasticity
	// Ready, when set, is called once the socket answers.
	Ready func()
}

// Elasticity is how machines follow their containers.
type Elasticity = control.Elasticity

// Server is one Tandem server.
type Server struct {
	opts  Options
	log   *slog.Logger
	store *store.Store
	ctl   *control.Controller
	token string
	ctx   context.Context // of Run
	clock control.Clock

	tunnels sync.WaitGroup
	locks   keyLocks
	endings endings
}

// SocketPath is where a server with this run directory listens.
func SocketPath(runDir string) string { return filepath.Join(runDir, "tandem.sock") }

// TokenPath is where a server with this state directory keeps the agents' token.
func TokenPath(stateDir string) string { return filepath.Join(stateDir, "agent-token") }

// New checks options and the directories. It opens nothing that lasts.
func New(o Options) (*Server, error) {
	if o.StateDir == "" || o.RunDir == "" {
		return nil, fmt.Errorf("a server needs a state and a run directory: %w", errdefs.ErrInvalidArgument)
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	if err := o.Elasticity.Validate(); err != nil {
		return nil, err
	}
	if n := len(SocketPath(o.RunDir)); n > 100 {
		return nil, fmt.Errorf("run directory %s is too long for a socket (%d characters, at most 100): %w", o.RunDir, n, errdefs.ErrInvalidArgument)
	}
	return &Server{opts: o, log: o.Logger, clock: o.Clock, ctx: context.Background()}, nil
}

// EnsureToken reads the agents' token, or makes it.
func EnsureToken(stateDir string) (string, error) {
	p := TokenPath(stateDir)
	b, err := os.ReadFile(p)
	if err == nil {
		if t := strings.TrimSpace(string(b)); len(t) >= 32 {
			return t, nil
		}
		return "", fmt.Errorf("%s is damaged: remove it to get a new token: %w", p, errdefs.ErrDataLoss)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(stateDir, 0o755); err != nil {
		return "", err
	}
	var raw [32]byte
	rand.Read(raw[:])
	t := hex.EncodeToString(raw[:])
	f, err := os.CreateTemp(stateDir, ".agent-token-") // 0600
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(t + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	// Link, not rename: of two that make it at once the first wins.
	if err := os.Link(f.Name(), p); errors.Is(err, fs.ErrExist) {
		return EnsureToken(stateDir)
	} else if err != nil {
		return "", err
	}
	return t, nil
}

// Run serves until ctx ends; then nil. An error says what could not be opened, or
// why the state failed.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.ctx = ctx
	st, err := store.Open(ctx, store.Options{Dir: filepath.Join(s.opts.StateDir, "server"), Endpoints: s.opts.Endpoints, Logger: s.log})
	if err != nil {
		return err
	}
	defer st.Close()
	s.store = st
	for k, err := range st.Corrupt() {
		s.log.Error("a record is corrupt and left out", "record", k.String(), "err", err)
	}
	if s.token, err = EnsureToken(s.opts.StateDir); err != nil {
		return fmt.Errorf("the agents' token: %w", err)
	}
	s.ctl, err = control.New(control.Options{Store: st, Logger: s.log, Clock: s.opts.Clock, ClusterCIDR: s.opts.ClusterCIDR,
		UsageFile: filepath.Join(s.opts.StateDir, "usage.json"), Elasticity: s.opts.Elasticity})
	if err != nil {
		return err
	}
	l, err := listen(s.opts.RunDir)
	if err != nil {
		return err
	}
	hs := rpc.NewServer(s.Handler())
	hs.BaseContext = func(net.Listener) context.Context { return ctx }
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	wg.Go(func() { errs <- s.ctl.Run(ctx) })
	wg.Go(func() { s.watchSpace(ctx) })
	wg.Go(func() {
		if err := hs.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			errs <- fmt.Errorf("serving %s: %w", l.Addr(), err)
		}
	})
	s.log.Info("serving", "socket", l.Addr().String(), "cluster", st.ClusterID())
	if s.opts.Ready != nil {
		s.opts.Ready()
	}
	select {
	case <-ctx.Done():
		err = nil
	case err = <-errs:
	}
	cancel() // streams end: their contexts come from ours
	sctx, stop := context.WithTimeout(context.Background(), 3*time.Second)
	defer stop()
	if hs.Shutdown(sctx) != nil {
		hs.Close()
	}
	s.tunnels.Wait()
	wg.Wait()
	return err
}

// listen makes the socket. The store's lock says that no other server lives, so
// an old socket is a dead one's.
func listen(runDir string) (net.Listener, error) {
	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	p := SocketPath(runDir)
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("old socket: %w", err)
	}
	l, err := net.Listen("unix", p)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	if err := os.Chmod(p, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// Handler serves all services and the agents' tunnels.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	opts := rpc.HandlerOptions()
	mux.Handle(tandemv1connect.NewProjectServiceHandler(&projects{s}, opts...))
	mux.Handle(tandemv1connect.NewContainerServiceHandler(&containers{s}, opts...))
	mux.Handle(tandemv1connect.NewMachineServiceHandler(&machines{s}, opts...))
	mux.Handle(tandemv1connect.NewImageServiceHandler(&images{s}, opts...))
	mux.Handle(tandemv1connect.NewVolumeServiceHandler(&volumes{s}, opts...))
	mux.Handle(tandemv1connect.NewSystemServiceHandler(&system{s}, opts...))
	mux.Handle(tandemv1connect.NewStateServiceHandler(&state{s}, opts...))
	mux.HandleFunc(rpc.TunnelPath, s.tunnel)
	return s.afterEndings(mux)
}

// tunnel takes in an agent.
func (s *Server) tunnel(w http.ResponseWriter, r *http.Request) {
	t, err := rpc.AcceptTunnel(w, r, s.token)
	if err != nil {
		s.log.Warn("agent refused", "from", r.RemoteAddr, "err", err)
		return
	}
	s.tunnels.Add(1)
	defer s.tunnels.Done()
	defer t.Close()
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	go func() {
		select {
		case <-t.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	client := tandemv1connect.NewAgentServiceClient(rpc.NewClient(t.Dial), rpc.BaseURL, rpc.ClientOptions()...)
	err = s.ctl.Serve(ctx, t.HostID, client)
	if err != nil && s.ctx.Err() == nil && ctx.Err() == nil {
		s.log.Warn("session of a host ended", "host", t.HostID, "err", err)
	} else {
		s.log.Info("host disconnected", "host", t.HostID)
	}
}

// keyLocks gives one lock a name: changes to a project come one after the other.
type keyLocks struct {
	mu sync.Mutex
	m  map[string]chan struct{}
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	k.mu.Lock()
	if k.m == nil {
		k.m = map[string]chan struct{}{}
	}
	ch := k.m[key]
	if ch == nil {
		ch = make(chan struct{}, 1)
		k.m[key] = ch
	}
	k.mu.Unlock()
	select {
	case ch <- struct{}{}:
		return func() { <-ch }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another change of %s: %w", cmp.Or(key, "it"), ctx.Err())
	}
}
