package guest

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/session"
)

// RunAgent is the agent process: it serves the host over the agent channel until
// it is told to end.
func RunAgent() error {
	collectLate()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	log := newLogger("agent")
	go arrived.follow(ctx, log)
	id, err := loadIdentity()
	if err != nil {
		log.Error("identity", "error", err)
	}
	s := newService(ctx, log, id, newContainers(log, openRuntime(log)))
	if id.configured() {
		s.containers.start(ctx)
	}
	go func() {
		for ctx.Err() == nil {
			err := s.watchPowerButton(ctx)
			if err == nil {
				return
			}
			log.Warn("the power button is not watched; trying again", "error", err)
			time.Sleep(5 * time.Second)
		}
	}()
	l := session.NewListener(newPortOpener().open, session.WithErrors(func(err error) { log.Info("agent channel", "error", err) }))
	context.AfterFunc(ctx, func() { l.Close() })
	return s.serve(ctx, l)
}

// serve answers one host at a time: a new session ends the one before.
func (s *service) serve(ctx context.Context, l net.Listener) error {
	h := s.handler()
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) && ctx.Err() != nil {
				return nil
			}
			return err
		}
		s.log.Info("the host is connected", "session", c.RemoteAddr().String())
		if d, ok := c.(interface{ Done() <-chan struct{} }); ok {
			s.session.Store(d.Done())
		}
		go rpc.ServeConn(ctx, c, h)
	}
}

// hungUp is closed when the newest session has ended.
func (s *service) hungUp() <-chan struct{} {
	ended, _ := s.session.Load().(<-chan struct{})
	return ended // nil: there was none
}

// handler serves what the agent has.
func (s *service) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(tandemv1connect.NewGuestServiceHandler(s, rpc.GuestHandlerOptions()...))
	mux.Handle(s.containers.path(), s.containers)
	return mux
}
