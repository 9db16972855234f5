package rpc

import (
	"context"
	"errors"
	"io"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
)

// ToConnect gives an error of an errdefs class its wire code; the text stays.
func ToConnect(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	var ce *connect.Error
	if errors.As(err, &ce) {
		return err
	}
	return connect.NewError(codeOf(err), err)
}

func codeOf(err error) connect.Code {
	switch {
	case errors.Is(err, context.Canceled), errdefs.IsCanceled(err):
		return connect.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded), errdefs.IsDeadlineExceeded(err):
		return connect.CodeDeadlineExceeded
	case errdefs.IsNotFound(err):
		return connect.CodeNotFound
	case errdefs.IsInvalidArgument(err):
		return connect.CodeInvalidArgument
	case errdefs.IsAlreadyExists(err):
		return connect.CodeAlreadyExists
	case errdefs.IsConflict(err), errdefs.IsAborted(err):
		return connect.CodeAborted
	case errdefs.IsFailedPrecondition(err):
		return connect.CodeFailedPrecondition
	case errdefs.IsPermissionDenied(err):
		return connect.CodePermissionDenied
	case errdefs.IsUnauthorized(err):
		return connect.CodeUnauthenticated
	case errdefs.IsResourceExhausted(err):
		return connect.CodeResourceExhausted
	case errdefs.IsNotImplemented(err):
		return connect.CodeUnimplemented
	case errdefs.IsUnavailable(err):
		return connect.CodeUnavailable
	case errdefs.IsOutOfRange(err):
		return connect.CodeOutOfRange
	case errdefs.IsDataLoss(err):
		return connect.CodeDataLoss
	}
	return connect.CodeInternal
}

// remote is an error that came over the wire: text as sent, class by code.
type remote struct {
	msg   string
	class error
}

func (e *remote) Error() string { return e.msg }
func (e *remote) Unwrap() error { return e.class }

// FromConnect is ToConnect's inverse: the answer satisfies errdefs.IsNotFound
// and its like, and prints without codes.
func FromConnect(err error) error {
	var ce *connect.Error
	if errors.Is(err, io.EOF) {
		return io.EOF // Connect tells the end of a stream by io.EOF inside its error
	}
	if err == nil || !errors.As(err, &ce) {
		return err
	}
	class := map[connect.Code]error{
		connect.CodeCanceled:           context.Canceled,
		connect.CodeDeadlineExceeded:   context.DeadlineExceeded,
		connect.CodeNotFound:           errdefs.ErrNotFound,
		connect.CodeInvalidArgument:    errdefs.ErrInvalidArgument,
		connect.CodeAlreadyExists:      errdefs.ErrAlreadyExists,
		connect.CodeAborted:            errdefs.ErrConflict,
		connect.CodeFailedPrecondition: errdefs.ErrFailedPrecondition,
		connect.CodePermissionDenied:   errdefs.ErrPermissionDenied,
		connect.CodeUnauthenticated:    errdefs.ErrUnauthenticated,
		connect.CodeResourceExhausted:  errdefs.ErrResourceExhausted,
		connect.CodeUnimplemented:      errdefs.ErrNotImplemented,
		connect.CodeUnavailable:        errdefs.ErrUnavailable,
		connect.CodeOutOfRange:         errdefs.ErrOutOfRange,
		connect.CodeDataLoss:           errdefs.ErrDataLoss,
	}[ce.Code()]
	if class == nil {
		class = errdefs.ErrUnknown
	}
	return &remote{msg: ce.Message(), class: class}
}

// Errors is the interceptor that applies ToConnect on a server's handlers and
// FromConnect on a client's calls, unary and streaming.
func Errors() connect.Interceptor { return interceptor{} }

type interceptor struct{}

func (interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		if req.Spec().IsClient {
			return res, FromConnect(err)
		}
		return res, ToConnect(err)
	}
}

func (interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		return clientConn{next(ctx, spec)}
	}
}

func (interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, c connect.StreamingHandlerConn) error {
		return ToConnect(next(ctx, handlerConn{c}))
	}
}

// handlerConn gives a handler the plain io.EOF that readers compare with.
type handlerConn struct{ connect.StreamingHandlerConn }

func (c handlerConn) Receive(m any) error {
	err := c.StreamingHandlerConn.Receive(m)
	if errors.Is(err, io.EOF) {
		return io.EOF
	}
	return err
}

type clientConn struct{ connect.StreamingClientConn }

func (c clientConn) Receive(m any) error { return FromConnect(c.StreamingClientConn.Receive(m)) }
func (c clientConn) Send(m any) error    { return FromConnect(c.StreamingClientConn.Send(m)) }
