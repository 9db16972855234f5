// Package remote carries package runtime's contract over the wire: a guest
// serves NewHandler, its host's agent calls NewClient.
//
//	mux.Handle(remote.NewHandler(rt))                    // in the guest
//	rt := remote.NewClient(conn.Client, rpc.BaseURL)     // on the host
//
// The client believes nothing: answers are bounded in size, number and time, ids,
// texts and enums are checked, and what is wrong becomes an error of class
// DataLoss, never a value.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
)

type handler struct{ rt runtime.Runtime }

var _ tandemv1connect.RuntimeServiceHandler = (*handler)(nil)

// NewHandler serves a runtime; give the result to http.ServeMux.Handle.
func NewHandler(rt runtime.Runtime) (path string, h http.Handler) {
	return tandemv1connect.NewRuntimeServiceHandler(&handler{rt},
		rpc.GuestHandlerOptions()...)
}

func reply[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}

func (h *handler) Mount(ctx context.Context, q *connect.Request[v1.MountDiskRequest]) (*connect.Response[v1.MountDiskResponse], error) {
	p, err := h.rt.Mount(ctx, q.Msg)
	return reply(&v1.MountDiskResponse{Path: p}, err)
}

func (h *handler) Unmount(ctx context.Context, q *connect.Request[v1.UnmountDiskRequest]) (*connect.Response[v1.UnmountDiskResponse], error) {
	return reply(&v1.UnmountDiskResponse{}, h.rt.Unmount(ctx, q.Msg.Id))
}

func (h *handler) Create(ctx context.Context, q *connect.Request[v1.RuntimeCreateRequest]) (*connect.Response[v1.RuntimeCreateResponse], error) {
	if q.Msg.Spec == nil {
		return nil, fmt.Errorf("create without a spec: %w", errdefs.ErrInvalidArgument)
	}
	return reply(&v1.RuntimeCreateResponse{}, h.rt.Create(ctx, q.Msg.Spec))
}

func (h *handler) Start(ctx context.Context, q *connect.Request[v1.RuntimeStartRequest]) (*connect.Response[v1.RuntimeStartResponse], error) {
	return reply(&v1.RuntimeStartResponse{}, h.rt.Start(ctx, q.Msg.Id))
}

func (h *handler) Stop(ctx context.Context, q *connect.Request[v1.RuntimeStopRequest]) (*connect.Response[v1.RuntimeStopResponse], error) {
	st, err := h.rt.Stop(ctx, q.Msg.Id, q.Msg.Signal, q.Msg.Grace.AsDuration())
	return reply(&v1.RuntimeStopResponse{Status: st}, err)
}

func (h *handler) Kill(ctx context.Context, q *connect.Request[v1.RuntimeKillRequest]) (*connect.Response[v1.RuntimeKillResponse], error) {
	return reply(&v1.RuntimeKillResponse{}, h.rt.Kill(ctx, q.Msg.Id, q.Msg.Signal, q.Msg.All))
}

func (h *handler) Delete(ctx context.Context, q *connect.Request[v1.RuntimeDeleteRequest]) (*connect.Response[v1.RuntimeDeleteResponse], error) {
	return reply(&v1.RuntimeDeleteResponse{}, h.rt.Delete(ctx, q.Msg.Id, q.Msg.Force))
}

func (h *handler) Pause(ctx context.Context, q *connect.Request[v1.RuntimePauseRequest]) (*connect.Response[v1.RuntimePauseResponse], error) {
	return reply(&v1.RuntimePauseResponse{}, h.rt.Pause(ctx, q.Msg.Id))
}

func (h *handler) Resume(ctx context.Context, q *connect.Request[v1.RuntimeResumeRequest]) (*connect.Response[v1.RuntimeResumeResponse], error) {
	return reply(&v1.RuntimeResumeResponse{}, h.rt.Resume(ctx, q.Msg.Id))
}

func (h *handler) Update(ctx context.Context, q *connect.Request[v1.RuntimeUpdateRequest]) (*connect.Response[v1.RuntimeUpdateResponse], error) {
	res := q.Msg.Resources
	if res == nil {
		res = &v1.Resources{}
	}
	return reply(&v1.RuntimeUpdateResponse{}, h.rt.Update(ctx, q.Msg.Id, res))
}

func (h *handler) Wait(ctx context.Context, q *connect.Request[v1.RuntimeWaitRequest]) (*connect.Response[v1.RuntimeWaitResponse], error) {
	st, err := h.rt.Wait(ctx, q.Msg.Id)
	return reply(&v1.RuntimeWaitResponse{Status: st}, err)
}

func (h *handler) List(ctx context.Context, _ *connect.Request[v1.RuntimeListRequest]) (*connect.Response[v1.RuntimeListResponse], error) {
	l, err := h.rt.List(ctx)
	return reply(&v1.RuntimeListResponse{Containers: l}, err)
}

func (h *handler) Stats(ctx context.Context, q *connect.Request[v1.RuntimeStatsRequest]) (*connect.Response[v1.RuntimeStatsResponse], error) {
	u, err := h.rt.Stats(ctx, q.Msg.Id)
	return reply(&v1.RuntimeStatsResponse{Usage: u}, err)
}

func (h *handler) Top(ctx context.Context, q *connect.Request[v1.RuntimeTopRequest]) (*connect.Response[v1.RuntimeTopResponse], error) {
	ps, err := h.rt.Top(ctx, q.Msg.Id)
	return reply(&v1.RuntimeTopResponse{Processes: ps}, err)
}

func (h *handler) Logs(ctx context.Context, q *connect.Request[v1.LogOptions], s *connect.ServerStream[v1.LogEntry]) error {
	if err := s.Send(nil); err != nil { // headers now: a follower may wait long for its first line
		return err
	}
	return h.rt.Logs(ctx, q.Msg, s.Send)
}

func (h *handler) Events(ctx context.Context, _ *connect.Request[v1.RuntimeEventsRequest], s *connect.ServerStream[v1.RuntimeEvent]) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, err := h.rt.Events(ctx)
	if err != nil {
		return err
	}
	for ev := range ch {
		if err := s.Send(ev); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the event stream broke; list and watch again: %w", errdefs.ErrUnavailable)
}

type duplex = connect.BidiStream[v1.StreamInput, v1.StreamOutput]

func (h *handler) Exec(ctx context.Context, s *duplex) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	e := first.GetExec()
	if e == nil {
		return fmt.Errorf("exec: the first message must carry the spec: %w", errdefs.ErrInvalidArgument)
	}
	return h.stream(ctx, s, e.Stdin, func(ctx context.Context, st runtime.Streams) (int, error) { return h.rt.Exec(ctx, e, st) })
}

func (h *handler) Attach(ctx context.Context, s *duplex) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	a := first.GetAttach()
	if a == nil {
		return fmt.Errorf("attach: the first message must carry the spec: %w", errdefs.ErrInvalidArgument)
	}
	return h.stream(ctx, s, a.Stdin, func(ctx context.Context, st runtime.Streams) (int, error) { return 0, h.rt.Attach(ctx, a, st) })
}

// sender serialises what several writers send on one stream.
type sender struct {
	mu sync.Mutex
	s  *duplex
}

func (w *sender) send(m *v1.StreamOutput) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.s.Send(m)
}

type output struct {
	w    *sender
	wrap func(p []byte) *v1.StreamOutput
}

// maxChunk bounds the bytes of one stream message.
const maxChunk = 64 << 10

func (o output) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		k := min(len(p)-n, maxChunk)
		if err := o.w.send(o.wrap(p[n : n+k])); err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}

func stdout(p []byte) *v1.StreamOutput {
	return &v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: p}}
}

func stderr(p []byte) *v1.StreamOutput {
	return &v1.StreamOutput{Kind: &v1.StreamOutput_Stderr{Stderr: p}}
}

// stream joins a duplex stream and the runtime's Streams until run returns.
func (h *handler) stream(ctx context.Context, s *duplex, stdin bool, run func(context.Context, runtime.Streams) (int, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := &sender{s: s}
	resize, signals := make(chan *v1.WindowSize), make(chan string)
	st := runtime.Streams{
		Stdout: output{w, stdout}, Stderr: output{w, stderr}, Resize: resize, Signals: signals,
		Started: func() { _ = w.send(&v1.StreamOutput{Kind: &v1.StreamOutput_Started{Started: true}}) },
		Ended:   func(code int) { _ = w.send(&v1.StreamOutput{Kind: &v1.StreamOutput_Ended{Ended: int32(code)}}) },
	}
	pr, pw := io.Pipe()
	defer pr.Close()
	if stdin {
		st.Stdin = pr
	}
	go func() {
		for {
			m, err := s.Receive()
			if err != nil {
				pw.CloseWithError(io.EOF)
				if !errors.Is(err, io.EOF) {
					cancel() // the client went
				}
				return
			}
			switch k := m.Kind.(type) {
			case *v1.StreamInput_Stdin:
				if stdin {
					_, _ = pw.Write(k.Stdin)
				}
			case *v1.StreamInput_CloseStdin:
				pw.Close()
			case *v1.StreamInput_Resize:
				select {
				case resize <- k.Resize:
				case <-ctx.Done():
				}
			case *v1.StreamInput_Signal:
				select {
				case signals <- k.Signal:
				case <-ctx.Done():
				}
			}
		}
	}()
	code, err := run(ctx, st)
	if err != nil {
		return err
	}
	return w.send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: int32(code)}})
}

// graceSlack is added to a stop's grace when the client bounds the call.
const graceSlack = 2 * time.Minute
