package names

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

const (
	startTimeout = 20 * time.Second // of a process, on a loaded host
	helloTimeout = 3 * time.Second  // then another process is started, which finds out why
	respawn      = 5 * time.Second  // between two starts of processes that don't come up
)

// ApartOptions say where the process of an Apart is.
type ApartOptions struct {
	Socket string // Serve's
	// Spawn starts a process that calls Serve with this socket and identity, and
	// does not wait for it.
	Spawn func() error
	// Identity of the program: a process of another one is replaced. See Identity.
	Identity string
	Logger   *slog.Logger // slog.Default() if nil
}

// Apart is the client of a name server that is a process of its own (Serve). It
// starts the process when none answers, sees to it that it goes on and knows the
// names, and leaves it alone when the client's own process ends. Its methods may
// be called from any goroutine.
type Apart struct {
	o ApartOptions

	turn sync.Mutex // of who talks to the process
	last time.Time  // of the latest spawn that did not come up yet; by turn

	mu     sync.Mutex
	want   []byte
	told   []byte // what the process behind link knows
	link   *link
	port   uint16
	on     bool // keep runs, and the process shall
	closed bool
	stop   context.CancelFunc // ends keep
}

// NewApart makes a client; nothing is started yet.
func NewApart(o ApartOptions) *Apart {
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	return &Apart{o: o}
}

// Identity tells this program from older and newer ones at the same place, by its
// executable's path, size and time.
func Identity() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	st, err := os.Stat("/proc/self/exe") // this very file, even if another took its place
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d %d", exe, st.Size(), st.ModTime().UnixNano()), nil
}

// Set replaces what the server shall know (see NewView); Start brings it there.
func (a *Apart) Set(networks []*v1.NetworkSpec, records []*v1.NameRecord, clients [][]string) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(specOf(networks, records, clients))
	if err != nil { // a string that is not UTF-8: NewView refuses none, and no wire lets one in
		a.o.Logger.Error("names can't be sent to the name server; it keeps the last ones", "error", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.want = b
}

// Start starts the process if none answers, tells it what Set said, and returns
// when it serves that. From then on the process is started again whenever it ends,
// and told again. It is cheap when nothing changed.
func (a *Apart) Start() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return fmt.Errorf("the name server's client is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if !a.on {
		a.on = true
		var ctx context.Context
		ctx, a.stop = context.WithCancel(context.Background())
		go a.keep(ctx)
	}
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	return a.sync(ctx)
}

// Port is where the server listens; 0 while that is not known.
func (a *Apart) Port() uint16 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.port
}

// Close lets go of the process, which goes on.
func (a *Apart) Close() error {
	a.letGo(true)
	return nil
}

// Stop ends the process, if there is one, and returns when it has ended. Start
// may be called again.
func (a *Apart) Stop() error {
	a.letGo(false)
	a.turn.Lock()
	defer a.turn.Unlock()
	if _, err := os.Stat(lockOf(a.o.Socket)); errors.Is(err, os.ErrNotExist) {
		return nil // there never was one
	}
	lock, err := openLock(a.o.Socket)
	if err != nil {
		return fmt.Errorf("end the name server: %w", err)
	}
	defer lock.Close()
	if tryLock(lock) {
		return nil
	}
	ans, err := ask(a.o.Socket, askQuit, 2*time.Second)
	if err == nil && waitLock(lock, 5*time.Second) {
		waitExit(ans.PID, 5*time.Second)
		return nil
	}
	a.o.Logger.Warn("the name server does not end when asked; killing it", "error", err)
	if err := killHolder(lock); err != nil {
		return fmt.Errorf("end the name server: %w", err)
	}
	if !waitLock(lock, 5*time.Second) {
		return fmt.Errorf("the name server does not end: %w", errdefs.ErrUnavailable)
	}
	return nil
}

func (a *Apart) letGo(closed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = a.closed || closed
	if a.on {
		a.on = false
		a.stop()
	}
	if a.link != nil {
		a.link.close(net.ErrClosed)
		a.link = nil
	}
	a.port, a.told = 0, nil
}

// keep brings the process back when its connection breaks.
func (a *Apart) keep(ctx context.Context) {
	pause, since := 10*time.Millisecond, time.Now()
	for {
		a.mu.Lock()
		l := a.link
		a.mu.Unlock()
		if l != nil {
			select {
			case <-ctx.Done():
				return
			case <-l.broken:
			}
			if ctx.Err() != nil {
				return
			}
			a.o.Logger.Warn("the name server went away; starting it again", "error", l.why)
			if time.Since(since) > 10*time.Second {
				pause = 10 * time.Millisecond
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, respawn)
		since = time.Now()
		try, cancel := context.WithTimeout(ctx, startTimeout)
		if err := a.sync(try); err != nil && ctx.Err() == nil {
			a.o.Logger.Warn("name server", "error", err)
		}
		cancel()
	}
}

// sync makes the process know what is wanted.
func (a *Apart) sync(ctx context.Context) error {
	a.turn.Lock()
	defer a.turn.Unlock()
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		done, err := a.tell(ctx)
		if done {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("its process does not answer: %w: %w", err, errdefs.ErrUnavailable)
		case <-time.After(pause):
		}
	}
}

// tell tries once; done is false when another try may help.
func (a *Apart) tell(ctx context.Context) (done bool, err error) {
	a.mu.Lock()
	want, l := a.want, a.link
	fresh := l != nil && !l.isBroken() && a.told != nil && bytes.Equal(a.told, want)
	on := a.on
	a.mu.Unlock()
	switch {
	case !on:
		return true, fmt.Errorf("the name server is let go of: %w", errdefs.ErrFailedPrecondition)
	case fresh:
		return true, nil
	case len(want) > maxState:
		return true, fmt.Errorf("%d bytes of names: at most %d are served: %w", len(want), maxState, errdefs.ErrOutOfRange)
	}
	if l == nil || l.isBroken() {
		if l, err = a.connect(ctx); err != nil {
			return false, err
		}
		a.mu.Lock()
		if !a.on {
			a.mu.Unlock()
			l.close(net.ErrClosed)
			return false, net.ErrClosed
		}
		a.link, a.told = l, nil
		a.mu.Unlock()
	}
	ans, err := l.call(ctx, askSet, want)
	if err != nil {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.link != l {
		return false, net.ErrClosed
	}
	a.port, a.told = ans.Port, nil
	if ans.Error == "" {
		a.told = append([]byte{}, want...) // not nil, even if there are no names
	}
	return true, ans.err()
}

// connect connects to a process of this program, and has one started if there is
// none. The new process itself ends one of another program, when it is ready to
// take its place.
func (a *Apart) connect(ctx context.Context) (*link, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", a.o.Socket)
	if err == nil {
		l := newLink(c)
		hctx, cancel := context.WithTimeout(ctx, helloTimeout)
		hello, herr := l.call(hctx, askHello, nil)
		cancel()
		if herr == nil && hello.Identity == a.o.Identity {
			a.last = time.Time{} // it came up: should it go, start the next at once
			return l, nil
		}
		l.close(net.ErrClosed)
		if err = herr; err == nil {
			err = fmt.Errorf("another version's name server has not ended: %w", errdefs.ErrUnavailable)
		}
	}
	if time.Since(a.last) > respawn && ctx.Err() == nil {
		a.last = time.Now()
		if serr := a.o.Spawn(); serr != nil {
			err = serr
		}
	}
	return nil, err
}

// link is one connection, which always reads so that it notices its end.
type link struct {
	c       net.Conn
	answers chan answer
	once    sync.Once
	why     error
	broken  chan struct{}
}

func newLink(c net.Conn) *link {
	l := &link{c: c, answers: make(chan answer), broken: make(chan struct{})}
	go func() {
		for {
			a, err := readAnswer(c)
			if err != nil {
				l.close(err)
				return
			}
			select {
			case l.answers <- a:
			case <-l.broken:
				return
			}
		}
	}()
	return l
}

func (l *link) close(why error) {
	l.once.Do(func() {
		l.why = why
		close(l.broken)
		l.c.Close()
	})
}

func (l *link) isBroken() bool {
	select {
	case <-l.broken:
		return true
	default:
		return false
	}
}

// call asks and waits for the answer; a link that does not answer is closed.
func (l *link) call(ctx context.Context, kind byte, p []byte) (answer, error) {
	t := time.NewTimer(callTimeout)
	defer t.Stop()
	_ = l.c.SetWriteDeadline(time.Now().Add(callTimeout))
	if err := writeRequest(l.c, kind, p); err != nil {
		l.close(err)
		return answer{}, err
	}
	select {
	case a := <-l.answers:
		return a, nil
	case <-l.broken:
		return answer{}, l.why
	case <-t.C:
		l.close(os.ErrDeadlineExceeded)
	case <-ctx.Done():
		l.close(ctx.Err())
	}
	return answer{}, l.why
}
