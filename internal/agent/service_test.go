package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/rpc"
	"tandem/internal/runtime"
)

// served runs a test with an agent that has containers in a machine and on metal,
// and a client of it, as the server is one.
func served(t *testing.T, fn func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient)) {
	t.Helper()
	r := live(t)
	r.machine("m-1")
	r.container("inside", "m-1")
	r.container("iron", "")
	r.apply()
	r.until(time.Minute, "running", func() bool { return r.state("inside", running)() && r.state("iron", running)() })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); rpc.ServeConn(ctx, far, r.a.Handler()) }()
	defer func() { near.Close(); cancel(); <-done }()
	conn, err := rpc.ConnClient(near, time.Hour, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	fn(ctx, r, tandemv1connect.NewAgentServiceClient(conn.Client, rpc.BaseURL, rpc.ClientOptions()...))
}

// said is what came out of a stream, and how it ended.
type said struct {
	out, errs string
	started   bool
	code      int32
	largest   int
	err       error
}

func hear(st *connect.BidiStreamForClient[v1.StreamInput, v1.StreamOutput]) (s said) {
	s.code = -1
	for {
		m, err := st.Receive()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				s.err = err
			}
			return s
		}
		s.largest = max(s.largest, len(m.GetStdout()), len(m.GetStderr()))
		switch k := m.Kind.(type) {
		case *v1.StreamOutput_Stdout:
			s.out += string(k.Stdout)
		case *v1.StreamOutput_Stderr:
			s.errs += string(k.Stderr)
		case *v1.StreamOutput_Started:
			s.started = true
		case *v1.StreamOutput_ExitCode:
			s.code = k.ExitCode
		}
	}
}

func attachTo(id string, stdin bool) *v1.StreamInput {
	return &v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: &v1.AttachSpec{ContainerId: id, Stdin: stdin}}}
}

func stdin(s string) *v1.StreamInput {
	return &v1.StreamInput{Kind: &v1.StreamInput_Stdin{Stdin: []byte(s)}}
}

var closeStdin = &v1.StreamInput{Kind: &v1.StreamInput_CloseStdin{CloseStdin: true}}

// inMachine is the runtime of the machine's guest.
func (r *rig) inMachine() *fakeRuntime { return r.w.drv.ms["m-1"].rt }

func TestAttach(t *testing.T) {
	served(t, func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient) {
		// A program that repeats its input and tells of windows and signals.
		var spec *v1.AttachSpec
		r.inMachine().attach = func(_ context.Context, s *v1.AttachSpec, io_ runtime.Streams) error {
			spec = s
			io_.Started()
			fmt.Fprintf(io_.Stderr, "window %d;", (<-io_.Resize).Rows)
			fmt.Fprintf(io_.Stderr, "signal %s;", <-io_.Signals)
			if _, err := io.Copy(io_.Stdout, io_.Stdin); err != nil {
				return err
			}
			io_.Ended(7)
			return nil
		}
		st := c.Attach(ctx)
		big := strings.Repeat("x", 200<<10)
		go func() {
			for _, m := range []*v1.StreamInput{attachTo("inside", true), {Kind: &v1.StreamInput_Resize{Resize: &v1.WindowSize{Rows: 25, Columns: 80}}},
				{Kind: &v1.StreamInput_Signal{Signal: "HUP"}}, stdin("hello "), stdin(big), closeStdin, stdin("too late")} {
				st.Send(m)
			}
		}()
		s := hear(st)
		if s.err != nil || !s.started || s.out != "hello "+big || s.errs != "window 25;signal HUP;" || s.code != 7 {
			t.Errorf("started %v, %d bytes, %q, code %d, %v", s.started, len(s.out), s.errs, s.code, s.err)
		}
		if s.largest > maxChunk {
			t.Errorf("a message of %d bytes", s.largest)
		}
		if spec.GetContainerId() != "inside" || !spec.Stdin {
			t.Errorf("the runtime was asked for %v", spec)
		}

		// Without input, of a runtime that does not tell the exit code: Wait knows.
		r.w.rt.attach = func(_ context.Context, _ *v1.AttachSpec, io_ runtime.Streams) error {
			if io_.Stdin != nil {
				t.Error("input though none was asked for")
			}
			fmt.Fprint(io_.Stdout, "bye")
			return nil
		}
		r.w.rt.wait = func(context.Context, string) (*v1.RuntimeStatus, error) { return &v1.RuntimeStatus{ExitCode: 9}, nil }
		st = c.Attach(ctx)
		st.Send(attachTo("iron", false))
		st.Send(stdin("nobody reads this"))
		if s := hear(st); s.err != nil || s.out != "bye" || s.code != 9 {
			t.Errorf("%+v", s)
		}
	})
}

func TestAttachIsRefused(t *testing.T) {
	served(t, func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient) {
		r.inMachine().attach = func(context.Context, *v1.AttachSpec, runtime.Streams) error {
			return fmt.Errorf("too many clients: %w", errdefs.ErrResourceExhausted)
		}
		for name, x := range map[string]struct {
			first *v1.StreamInput
			is    func(error) bool
		}{
			"input first":       {stdin("x"), errdefs.IsInvalidArgument},
			"nothing":           {&v1.StreamInput{}, errdefs.IsInvalidArgument},
			"exec":              {&v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: &v1.ExecSpec{ContainerId: "inside"}}}, errdefs.IsInvalidArgument},
			"unknown container": {attachTo("nobody", false), errdefs.IsNotFound},
			"by the runtime":    {attachTo("inside", false), errdefs.IsResourceExhausted},
		} {
			st := c.Attach(ctx)
			st.Send(x.first)
			if s := hear(st); !x.is(s.err) || s.code != -1 {
				t.Errorf("%s: %v, code %d", name, s.err, s.code)
			}
		}
		r.spec.Machines[0].Stopped = true
		r.apply()
		r.until(time.Minute, "it stops", func() bool { return r.machineStatus("m-1").GetState() == v1.MachineState_MACHINE_STATE_STOPPED })
		st := c.Attach(ctx)
		st.Send(attachTo("inside", false))
		if s := hear(st); !errdefs.IsUnavailable(s.err) {
			t.Errorf("of a machine that does not run: %v", s.err)
		}
	})
}

// TestAttachEndsWithItsClient: a client that goes, whatever it was doing, takes the
// call with it; one that only has no more input stays.
func TestAttachEndsWithItsClient(t *testing.T) {
	served(t, func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient) {
		began, ended := make(chan bool), make(chan error, 1)
		r.inMachine().attach = func(ctx context.Context, _ *v1.AttachSpec, io_ runtime.Streams) error { // reads no input
			<-io_.Resize
			began <- true
			<-ctx.Done()
			ended <- ctx.Err()
			return ctx.Err()
		}
		cctx, cancel := context.WithCancel(ctx)
		st := c.Attach(cctx)
		st.Send(attachTo("inside", true))
		st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Resize{Resize: &v1.WindowSize{Rows: 1, Columns: 1}}})
		st.Send(stdin("unread"))
		st.CloseRequest()
		<-began
		// Others are served; this one goes on though it has no more input.
		if _, err := c.Stats(ctx, connect.NewRequest(&v1.AgentStatsRequest{All: true})); err != nil || len(ended) > 0 {
			t.Fatal("it ended though its client listens:", err)
		}
		cancel()
		if s := hear(st); s.err == nil {
			t.Error("no error for who has gone")
		}
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// line is a machine's serial line: what is written comes back in capitals.
type line struct {
	r      *io.PipeReader
	w      *io.PipeWriter
	closed chan struct{}
}

func (l *line) Read(p []byte) (int, error)  { return l.r.Read(p) }
func (l *line) Write(p []byte) (int, error) { return l.w.Write(bytes.ToUpper(p)) }
func (l *line) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return l.w.Close()
}

func TestConsole(t *testing.T) {
	served(t, func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient) {
		pr, pw := io.Pipe()
		l := &line{pr, pw, make(chan struct{})}
		r.w.drv.consoleLog = bytes.Repeat([]byte("past\n"), 10000)
		r.w.drv.console = func(id string) (io.ReadWriteCloser, error) {
			if id != "m-1" {
				t.Error(id)
			}
			return l, nil
		}
		console := func(id string) *v1.StreamInput {
			return &v1.StreamInput{Kind: &v1.StreamInput_Console{Console: &v1.ConsoleSpec{MachineId: id}}}
		}
		cctx, cancel := context.WithCancel(ctx)
		st := c.Console(cctx)
		st.Send(console("m-1"))
		st.Send(stdin("root\n"))
		got := ""
		for !strings.HasSuffix(got, "ROOT\n") {
			m, err := st.Receive()
			if err != nil {
				t.Fatal(got, err)
			}
			got += string(m.GetStdout())
		}
		if past := len(got) - len("ROOT\n"); past < 1000 || past > 16<<10 || !strings.HasSuffix(got, "past\nROOT\n") {
			t.Errorf("%d bytes of the past before what is new", past)
		}
		cancel() // the client goes: nobody holds the line
		st.CloseRequest()
		st.CloseResponse()
		<-l.closed

		for name, x := range map[string]struct {
			first *v1.StreamInput
			is    func(error) bool
		}{"unknown": {console("m-2"), errdefs.IsNotFound}, "no machine": {stdin("x"), errdefs.IsInvalidArgument}} {
			st := c.Console(ctx)
			st.Send(x.first)
			if s := hear(st); !x.is(s.err) {
				t.Errorf("%s: %v", name, s.err)
			}
		}
		r.w.drv.console = nil // a back end without consoles
		st = c.Console(ctx)
		st.Send(console("m-1"))
		if s := hear(st); !errdefs.IsNotImplemented(s.err) {
			t.Error(s.err)
		}
	})
}

func TestStatsAndTop(t *testing.T) {
	served(t, func(ctx context.Context, r *rig, c tandemv1connect.AgentServiceClient) {
		r.inMachine().stats = func(id string) (*v1.Usage, error) { return &v1.Usage{MemoryBytes: 42, Pids: 3}, nil }
		r.w.rt.stats = func(id string) (*v1.Usage, error) { return nil, fmt.Errorf("no group: %w", errdefs.ErrUnavailable) }
		ask := func(req *v1.AgentStatsRequest) (*v1.AgentStatsResponse, error) {
			res, err := c.Stats(ctx, connect.NewRequest(req))
			if err != nil {
				return nil, err
			}
			return res.Msg, nil
		}
		res, err := ask(&v1.AgentStatsRequest{All: true})
		if err != nil || len(res.Containers) != 1 || res.Containers["inside"].GetMemoryBytes() != 42 || res.Machines["m-1"].GetMemoryBytes() != 1 || len(res.Machines) != 1 {
			t.Errorf("who does not answer is left out, nothing else: %v, %v", res, err)
		}
		if res, err := ask(&v1.AgentStatsRequest{ContainerIds: []string{"inside"}}); err != nil || res.Containers["inside"].GetPids() != 3 {
			t.Error(res, err)
		}
		if _, err := ask(&v1.AgentStatsRequest{ContainerIds: []string{"inside", "nobody"}}); !errdefs.IsNotFound(err) {
			t.Error(err)
		}
		if _, err := ask(&v1.AgentStatsRequest{ContainerIds: make([]string, maxContainers+1)}); !errdefs.IsInvalidArgument(err) {
			t.Error(err)
		}

		r.inMachine().top = func(id string) ([]*v1.Process, error) {
			return []*v1.Process{{Pid: 1, Command: id}}, nil
		}
		top, err := c.Top(ctx, connect.NewRequest(&v1.RuntimeTopRequest{Id: "inside"}))
		if err != nil || len(top.Msg.Processes) != 1 || top.Msg.Processes[0].Command != "inside" {
			t.Error(top, err)
		}
		if _, err := c.Top(ctx, connect.NewRequest(&v1.RuntimeTopRequest{Id: "nobody"})); !errdefs.IsNotFound(err) {
			t.Error(err)
		}

		// A machine that hangs delays nobody for long, and is left out.
		g := r.w.drv.ms["m-1"].guest
		g.mu.Lock()
		g.hang = true
		g.mu.Unlock()
		began := time.Now()
		res, err = ask(&v1.AgentStatsRequest{All: true})
		if d := time.Since(began); err != nil || len(res.Machines) != 0 || d > 9*time.Second {
			t.Errorf("after %s: %v, %v", d, res, err)
		}
	})
}

// A call for a container whose guest answers again soon waits for it: the agent has
// just been started again. One that has nothing to wait for is refused at once.
func TestCallWaitsForItsGuest(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		r.container("inside", "m-1")
		r.apply()
		r.until(time.Minute, "it runs", r.state("inside", running))
		call := func(patience time.Duration) (time.Duration, error) {
			from := time.Now()
			_, err := service{a: r.a}.runtimeOf(context.Background(), "inside", patience)
			return time.Since(from), err
		}
		// answers restarts the agent; the guest answers it that much later.
		answers := func(after time.Duration) {
			r.stop()
			up := make(chan struct{})
			r.w.drv.ms["m-1"].guest.up = up
			time.AfterFunc(after, func() { close(up) })
			r.start()
		}
		answers(3 * time.Second)
		if took, err := call(0); !errdefs.IsUnavailable(err) || took != 0 {
			t.Errorf("without patience: after %v: %v", took, err)
		}
		if took, err := call(patience); err != nil || took != 3*time.Second {
			t.Errorf("of a guest that answers soon: after %v: %v", took, err)
		}
		answers(10 * time.Second)
		if took, err := call(patience); !errdefs.IsUnavailable(err) || took != patience {
			t.Errorf("of a guest that answers late: after %v: %v", took, err)
		}
		r.spec.Machines[0].Stopped = true
		r.apply()
		r.until(5*time.Minute, "it stops", func() bool { return r.machineStatus("m-1").GetState() == v1.MachineState_MACHINE_STATE_STOPPED })
		if took, err := call(patience); !errdefs.IsUnavailable(err) || took != 0 {
			t.Errorf("of a machine that shall not run: after %v: %v", took, err)
		}
	})
}
