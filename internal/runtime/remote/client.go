package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
)

// Times that a guest may take. Emulated machines are slow; these only end what
// would hang.
const (
	quick = 30 * time.Second // what needs no process to be made
	slow  = 4 * time.Minute  // create, start, delete, mount
)

type client struct {
	c tandemv1connect.RuntimeServiceClient
}

var _ runtime.Runtime = (*client)(nil)

// NewClient speaks to a runtime that is served by NewHandler. Errors have their
// class; Unavailable means that the guest does not answer.
func NewClient(hc *http.Client, baseURL string) runtime.Runtime {
	return &client{tandemv1connect.NewRuntimeServiceClient(hc, baseURL, rpc.GuestClientOptions()...)}
}

// call bounds one unary call.
func call[Q, A any](ctx context.Context, limit time.Duration, what string, fn func(context.Context, *connect.Request[Q]) (*connect.Response[A], error), q *Q) (*A, error) {
	bound, cancel := ctx, context.CancelFunc(func() {})
	if limit > 0 {
		bound, cancel = context.WithTimeout(ctx, limit)
	}
	defer cancel()
	res, err := fn(bound, connect.NewRequest(q))
	if err != nil {
		return nil, wrap(ctx, bound, what, err)
	}
	return res.Msg, nil
}

func wrap(ctx, bound context.Context, what string, err error) error {
	if ctx.Err() == nil && bound.Err() != nil {
		return fmt.Errorf("%s: the guest does not answer: %w", what, errdefs.ErrUnavailable)
	}
	if msg := err.Error(); len(msg) > maxText {
		// The guest chooses its errors' text too.
		err = &bounded{clean(msg), err}
	}
	return err
}

type bounded struct {
	msg string
	err error
}

func (b *bounded) Error() string { return b.msg }
func (b *bounded) Unwrap() error { return b.err }

func (c *client) Mount(ctx context.Context, q *v1.MountDiskRequest) (string, error) {
	a, err := call(ctx, slow, "mount", c.c.Mount, q)
	if err != nil {
		return "", err
	}
	return a.Path, checkText("mount point", a.Path, maxText)
}

func (c *client) Unmount(ctx context.Context, id string) error {
	_, err := call(ctx, slow, "unmount", c.c.Unmount, &v1.UnmountDiskRequest{Id: id})
	return err
}

func (c *client) Create(ctx context.Context, spec *v1.RuntimeSpec) error {
	if n := proto.Size(spec); n > rpc.MaxGuestMessage-1024 {
		return fmt.Errorf("container %s: its spec of %d bytes is too large: %w", spec.GetId(), n, errdefs.ErrInvalidArgument)
	}
	_, err := call(ctx, slow, "create", c.c.Create, &v1.RuntimeCreateRequest{Spec: spec})
	return err
}

func (c *client) Start(ctx context.Context, id string) error {
	_, err := call(ctx, slow, "start", c.c.Start, &v1.RuntimeStartRequest{Id: id})
	return err
}

func (c *client) Stop(ctx context.Context, id, signal string, grace time.Duration) (*v1.RuntimeStatus, error) {
	a, err := call(ctx, max(grace, 0)+graceSlack, "stop", c.c.Stop, &v1.RuntimeStopRequest{Id: id, Signal: signal, Grace: durationpb.New(grace)})
	if err != nil || a.Status == nil {
		return nil, err
	}
	return a.Status, checkStatus(a.Status, id)
}

func (c *client) Kill(ctx context.Context, id, signal string, all bool) error {
	_, err := call(ctx, quick, "kill", c.c.Kill, &v1.RuntimeKillRequest{Id: id, Signal: signal, All: all})
	return err
}

func (c *client) Delete(ctx context.Context, id string, force bool) error {
	_, err := call(ctx, slow, "delete", c.c.Delete, &v1.RuntimeDeleteRequest{Id: id, Force: force})
	return err
}

func (c *client) Pause(ctx context.Context, id string) error {
	_, err := call(ctx, slow, "pause", c.c.Pause, &v1.RuntimePauseRequest{Id: id})
	return err
}

func (c *client) Resume(ctx context.Context, id string) error {
	_, err := call(ctx, slow, "resume", c.c.Resume, &v1.RuntimeResumeRequest{Id: id})
	return err
}

func (c *client) Update(ctx context.Context, id string, r *v1.Resources) error {
	_, err := call(ctx, slow, "update", c.c.Update, &v1.RuntimeUpdateRequest{Id: id, Resources: r})
	return err
}

// Wait is bounded by ctx alone: a container may run for years. The connection's
// own pings end it when the guest hangs.
func (c *client) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	a, err := call(ctx, 0, "wait", c.c.Wait, &v1.RuntimeWaitRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return a.Status, checkStatus(a.Status, id)
}

func (c *client) List(ctx context.Context) ([]*v1.RuntimeStatus, error) {
	a, err := call(ctx, quick, "list", c.c.List, &v1.RuntimeListRequest{})
	if err != nil {
		return nil, err
	}
	return a.Containers, checkList(a.Containers)
}

func (c *client) Stats(ctx context.Context, id string) (*v1.Usage, error) {
	a, err := call(ctx, quick, "stats", c.c.Stats, &v1.RuntimeStatsRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return a.Usage, checkUsage(a.Usage)
}

func (c *client) Top(ctx context.Context, id string) ([]*v1.Process, error) {
	a, err := call(ctx, quick, "top", c.c.Top, &v1.RuntimeTopRequest{Id: id})
	if err != nil {
		return nil, err
	}
	return a.Processes, checkTop(a.Processes)
}

func (c *client) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := c.c.Logs(ctx, connect.NewRequest(o))
	if err != nil {
		return wrap(ctx, ctx, "logs", err)
	}
	defer func() { cancel(); _ = s.Close() }()
	for s.Receive() {
		e := s.Msg()
		if err := checkEntry(e, o.ContainerId); err != nil {
			return err
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	return wrapNil(ctx, "logs", s.Err())
}

func wrapNil(ctx context.Context, what string, err error) error {
	if err == nil {
		return nil
	}
	return wrap(ctx, ctx, what, err)
}

func (c *client) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := c.c.Events(ctx, connect.NewRequest(&v1.RuntimeEventsRequest{}))
	if err != nil {
		cancel()
		return nil, wrap(ctx, ctx, "events", err)
	}
	// "ready" must come soon, or the guest is stuck.
	t := time.AfterFunc(quick, cancel)
	ok := s.Receive()
	if !t.Stop() || !ok || s.Msg().Action != "ready" {
		err := s.Err()
		cancel()
		_ = s.Close()
		return nil, fmt.Errorf("events: the guest's stream did not open: %w", errors.Join(err, errdefs.ErrUnavailable))
	}
	ch := make(chan *v1.RuntimeEvent, 64)
	ch <- s.Msg()
	go func() {
		defer close(ch)
		defer func() { cancel(); _ = s.Close() }()
		for s.Receive() {
			ev := s.Msg()
			if checkEvent(ev) != nil {
				return // as if lost: the caller lists again
			}
			select {
			case ch <- ev:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ch, nil
}

// Close implements runtime.Runtime; the connection is the caller's.
func (c *client) Close() error { return nil }

func (c *client) Exec(ctx context.Context, e *v1.ExecSpec, s runtime.Streams) (int, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	code, err := pump(ctx, cancel, c.c.Exec(ctx), &v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: e}}, s, e.Stdin, slow)
	if err == nil && (code < 0 || code > 255) {
		err = bad("exit code %d", code)
	}
	return int(code), err
}

func (c *client) Attach(ctx context.Context, a *v1.AttachSpec, s runtime.Streams) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, err := pump(ctx, cancel, c.c.Attach(ctx), &v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: a}}, s, a.Stdin, slow)
	return err
}

type bidi = connect.BidiStreamForClient[v1.StreamInput, v1.StreamOutput]

// pump joins a guest's stream and s until the exit code comes.
func pump(ctx context.Context, giveUp func(), b *bidi, first *v1.StreamInput, s runtime.Streams, stdin bool, opening time.Duration) (int32, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stuck := time.AfterFunc(opening, giveUp) // a send may hang as well as a receive
	defer stuck.Stop()
	defer b.CloseResponse()
	if err := b.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return 0, wrap(ctx, ctx, "stream", err)
	}
	send := make(chan *v1.StreamInput)
	put := func(m *v1.StreamInput) bool {
		select {
		case send <- m:
			return true
		case <-ctx.Done():
			return false
		}
	}
	go func() { // the one sender
		for {
			select {
			case m := <-send:
				if b.Send(m) != nil {
					cancelled(ctx, send)
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	if stdin && s.Stdin != nil {
		go func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := s.Stdin.Read(buf)
				if n > 0 && !put(&v1.StreamInput{Kind: &v1.StreamInput_Stdin{Stdin: append([]byte(nil), buf[:n]...)}}) {
					return
				}
				if err != nil {
					put(&v1.StreamInput{Kind: &v1.StreamInput_CloseStdin{CloseStdin: true}})
					return
				}
			}
		}()
	} else if stdin {
		go put(&v1.StreamInput{Kind: &v1.StreamInput_CloseStdin{CloseStdin: true}})
	}
	go func() {
		resize, signals := s.Resize, s.Signals
		for {
			select {
			case <-ctx.Done():
				return
			case w, ok := <-resize:
				if !ok {
					resize = nil
				} else {
					put(&v1.StreamInput{Kind: &v1.StreamInput_Resize{Resize: w}})
				}
			case sig, ok := <-signals:
				if !ok {
					signals = nil
				} else {
					put(&v1.StreamInput{Kind: &v1.StreamInput_Signal{Signal: sig}})
				}
			}
		}
	}()
	for {
		m, err := b.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the guest ended the stream early: %w", errdefs.ErrUnavailable)
			}
			return 0, wrap(ctx, ctx, "stream", err)
		}
		stuck.Stop()
		var w io.Writer
		var p []byte
		switch k := m.Kind.(type) {
		case *v1.StreamOutput_Started:
			if s.Started != nil {
				s.Started()
				s.Started = nil // once, whatever the guest says
			}
		case *v1.StreamOutput_Ended: // the last word of an attach; exit_code is for older hosts
			if k.Ended < 0 || k.Ended > 255 {
				return 0, bad("exit code %d", k.Ended)
			}
			if s.Ended != nil {
				s.Ended(int(k.Ended))
			}
			return k.Ended, nil
		case *v1.StreamOutput_ExitCode:
			return k.ExitCode, nil
		case *v1.StreamOutput_Stdout:
			w, p = s.Stdout, k.Stdout
		case *v1.StreamOutput_Stderr:
			w, p = s.Stderr, k.Stderr
		}
		if w != nil && len(p) > 0 {
			if _, err := w.Write(p); err != nil {
				return 0, fmt.Errorf("output to the client: %w", err)
			}
		}
	}
}

// cancelled swallows what is still sent on a broken stream.
func cancelled(ctx context.Context, send <-chan *v1.StreamInput) {
	for {
		select {
		case <-send:
		case <-ctx.Done():
			return
		}
	}
}
