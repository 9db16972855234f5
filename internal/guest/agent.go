package guest

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os/signal"
	"runtime/debug"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/session"
)

// RunAgent is the agent process: it serves the host over the agent channel until
// it is told to end.
func RunAgent() error {
	debug.SetGCPercent(50)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	log := newLogger("agent")
	id, err := loadIdentity()
	if err != nil {
		log.Error("identity", "error", err)
	}
	s := newService(ctx, log, id, newContainers(log, openRuntime(log)))
	if id.configured() {
		s.containers.start(ctx)
	}
	l := session.NewListener(newPortOpener().open, session.WithErrors(func(err error) { log.Info("agent channel", "error", err) }))
	context.AfterFunc(ctx, func() { l.Close() })
	return serve(ctx, l, s.handler(), log)
}

// serve answers one host at a time: a new session ends the one before.
func serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) && ctx.Err() != nil {
				return nil
			}
			return err
		}
		log.Info("the host is connected", "session", c.RemoteAddr().String())
		go rpc.ServeConn(ctx, c, h)
	}
}

func handlerOptions() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithInterceptors(rpc.Errors()), connect.WithReadMaxBytes(rpc.MaxGuestMessage)}
}

// handler serves what the agent has.
func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(tandemv1connect.NewGuestServiceHandler(s, handlerOptions()...))
	mux.Handle(s.containers.path(), s.containers)
	return mux
}
