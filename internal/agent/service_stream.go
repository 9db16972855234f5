package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

type stdioStream = connect.BidiStream[v1.StreamInput, v1.StreamOutput]

func (s service) Exec(ctx context.Context, st *stdioStream) error {
	in, err := st.Receive()
	if err != nil {
		return err
	}
	spec := in.GetExec()
	if spec == nil {
		return fmt.Errorf("exec: the first message must say what to run: %w", errdefs.ErrInvalidArgument)
	}
	rt, err := s.runtimeOf(ctx, spec.ContainerId, patience)
	if err != nil {
		return err
	}
	return bridge(ctx, st, spec.Stdin, func(ctx context.Context, io runtime.Streams) (int, error) {
		return rt.Exec(ctx, spec, io)
	})
}

func (s service) Attach(ctx context.Context, st *stdioStream) error {
	in, err := st.Receive()
	if err != nil {
		return err
	}
	spec := in.GetAttach()
	if spec == nil {
		return fmt.Errorf("attach: the first message must name the container: %w", errdefs.ErrInvalidArgument)
	}
	rt, err := s.runtimeOf(ctx, spec.ContainerId, patience)
	if err != nil {
		return err
	}
	return bridge(ctx, st, spec.Stdin, func(ctx context.Context, io runtime.Streams) (int, error) {
		ended, code := false, 0
		io.Ended = func(n int) { ended, code = true, n }
		if err := rt.Attach(ctx, spec, io); err != nil {
			return 0, err
		}
		// Attach ends with the container: its exit code is the last word. The
		// context bounds it, should the container go on (a detached client).
		if ended {
			return code, nil
		}
		status, err := rt.Wait(ctx, spec.ContainerId)
		if err != nil {
			return 0, err
		}
		return int(status.GetExitCode()), nil
	})
}

func (s service) Console(ctx context.Context, st *stdioStream) error {
	in, err := st.Receive()
	if err != nil {
		return err
	}
	spec := in.GetConsole()
	if spec == nil {
		return fmt.Errorf("console: the first message must name the machine: %w", errdefs.ErrInvalidArgument)
	}
	s.a.mu.Lock()
	m := s.a.machines[spec.MachineId]
	s.a.mu.Unlock()
	if m == nil {
		return fmt.Errorf("machine %q is not on this host: %w", spec.MachineId, errdefs.ErrNotFound)
	}
	return bridge(ctx, st, true, func(ctx context.Context, std runtime.Streams) (int, error) {
		if past, err := s.a.o.Driver.ConsoleLog(ctx, m.id, 16<<10); err == nil && len(past) > 0 {
			if _, err := std.Stdout.Write(past); err != nil {
				return 0, err
			}
		}
		con, err := s.a.o.Driver.Console(ctx, m.id)
		if err != nil {
			return 0, err
		}
		defer con.Close()
		stop := context.AfterFunc(ctx, func() { con.Close() })
		defer stop()
		std.Started()
		go func() {
			io.Copy(con, std.Stdin)
		}()
		_, err = io.Copy(std.Stdout, con)
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return 0, err
	})
}

// bridge connects a stream of messages with a process's standard streams, and
// sends its exit code as the last message. Input that the process does not read
// stays with the client: nothing is buffered here.
func bridge(ctx context.Context, st *stdioStream, stdin bool, run func(context.Context, runtime.Streams) (int, error)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := &sender{st: st}
	resize := make(chan *v1.WindowSize, 1)
	signals := make(chan string, 8)
	pr, pw := io.Pipe()
	defer pr.Close()
	io := runtime.Streams{
		Stdout: writerFunc(func(p []byte) error { return out.send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: p}}) }),
		Stderr: writerFunc(func(p []byte) error { return out.send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stderr{Stderr: p}}) }),
		Resize: resize, Signals: signals,
		Started: func() { out.send(&v1.StreamOutput{Kind: &v1.StreamOutput_Started{Started: true}}) },
	}
	if stdin {
		io.Stdin = pr
	}
	go receive(ctx, cancel, st, stdin, pw, resize, signals)
	code, err := run(ctx, io)
	if err != nil {
		return err
	}
	return out.send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: int32(code)}})
}

// receive hands on what the client sends until it ends. A client that is gone
// (not one that only closed its side) ends the whole stream.
func receive(ctx context.Context, cancel func(), st *stdioStream, stdin bool, pw *io.PipeWriter, resize chan *v1.WindowSize, signals chan string) {
	defer pw.Close()
	for {
		in, err := st.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				cancel()
			}
			return
		}
		switch k := in.Kind.(type) {
		case *v1.StreamInput_Stdin:
			if stdin {
				if _, err := pw.Write(k.Stdin); err != nil {
					stdin = false // the process reads no more; windows and signals still count
				}
			}
		case *v1.StreamInput_CloseStdin:
			pw.Close()
			stdin = false
		case *v1.StreamInput_Resize:
			select { // only the latest size matters
			case <-resize:
			default:
			}
			select {
			case resize <- k.Resize:
			case <-ctx.Done():
				return
			}
		case *v1.StreamInput_Signal:
			select {
			case signals <- k.Signal:
			case <-ctx.Done():
				return
			}
		}
	}
}

// sender serialises a stream's messages.
type sender struct {
	mu sync.Mutex
	st *stdioStream
}

func (s *sender) send(m *v1.StreamOutput) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.st.Send(m)
}

// writerFunc is an io.Writer whose writes are cut into messages of bounded size.
type writerFunc func([]byte) error

const maxChunk = 64 << 10

func (f writerFunc) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		end := min(n+maxChunk, len(p))
		if err := f(p[n:end]); err != nil {
			return n, err
		}
		n = end
	}
	return n, nil
}
