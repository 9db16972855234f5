package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/control"
	"tandem/internal/store"
)

type (
	bidiIn  = connect.BidiStream[v1.StreamInput, v1.StreamOutput]
	bidiOut = connect.BidiStreamForClient[v1.StreamInput, v1.StreamOutput]
)

// maxFollowed bounds how many logs one call merges.
const maxFollowed = 1000

// hostPatience is how long an agent that is away is waited for: it connects again
// within seconds of a restart of the server.
const hostPatience = 5 * time.Second

// reach waits for a container's agent when that is away, and for what it then says
// of the container: so a call just after a restart of the server finds it as it is.
func (s *Server) reach(ctx context.Context, c *v1.Container) (*v1.Container, error) {
	host := c.GetAssignment().GetHostId()
	if host == "" {
		return c, nil
	}
	limit := time.NewTimer(hostPatience)
	defer limit.Stop()
	if _, err := s.ctl.Hosts.Await(ctx, host, hostPatience); err != nil {
		return c, err
	}
	for c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_UNKNOWN {
		_, changed := s.store.Changed()
		n, err := store.ByID[*v1.Container](s.store, store.Containers, c.Meta.Id)
		if err != nil {
			return nil, fmt.Errorf("container %s was removed: %w", c.Meta.Name, errdefs.ErrNotFound)
		}
		if c = n; c.GetStatus().GetState() != v1.ContainerState_CONTAINER_STATE_UNKNOWN {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.store.Failed():
			return nil, s.store.Err()
		case <-limit.C:
			return c, nil
		case <-changed:
		}
	}
	return c, nil
}

// agentOf reaches the agent of a container that is placed.
func (s *Server) agentOf(ctx context.Context, c *v1.Container) (tandemv1connect.AgentServiceClient, error) {
	host := c.GetAssignment().GetHostId()
	if host == "" {
		why := c.GetStatus().GetMessage()
		if why == "" {
			why = "it was not started yet"
		}
		return nil, fmt.Errorf("container %s runs nowhere: %s: %w", c.Meta.Name, why, errdefs.ErrFailedPrecondition)
	}
	return s.ctl.Hosts.Await(ctx, host, hostPatience)
}

// proxy joins a client's stream with an agent's, until the agent's ends. first is
// sent on as the first message; exit, if not nil, is called before an exit code is.
func proxy(ctx context.Context, in *bidiIn, open func(context.Context) *bidiOut, first *v1.StreamInput, exit func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := open(ctx)
	if err := out.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	go func() {
		for {
			m, err := in.Receive()
			if err != nil {
				// The client has no more to say: that is no end of the process. One
				// that is gone ends ctx.
				out.CloseRequest()
				return
			}
			if out.Send(m) != nil {
				return
			}
		}
	}()
	defer out.CloseResponse()
	return relay(out, exitLast{in, exit})
}

// exitLast calls first before it sends an exit code.
type exitLast struct {
	*bidiIn
	first func()
}

func (e exitLast) Send(m *v1.StreamOutput) error {
	if _, ok := m.GetKind().(*v1.StreamOutput_ExitCode); ok && e.first != nil {
		e.first()
	}
	return e.bidiIn.Send(m)
}

// relay hands messages on until there are no more.
func relay[M any](from interface{ Receive() (*M, error) }, to interface{ Send(*M) error }) error {
	for {
		m, err := from.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := to.Send(m); err != nil {
			return err
		}
	}
}

// Exec implements ContainerService.
func (k *containers) Exec(ctx context.Context, in *bidiIn) error {
	first, err := in.Receive()
	if err != nil {
		return fmt.Errorf("exec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	spec := first.GetExec()
	if spec == nil || len(spec.Args) == 0 {
		return fmt.Errorf("exec begins with a command: %w", errdefs.ErrInvalidArgument)
	}
	c, err := k.s.container(spec.ContainerId, "")
	if err != nil {
		return err
	}
	if c, err = k.s.reach(ctx, c); err != nil {
		return err
	}
	switch c.GetStatus().GetState() {
	case v1.ContainerState_CONTAINER_STATE_RUNNING:
	case v1.ContainerState_CONTAINER_STATE_PAUSED:
		return fmt.Errorf("container %s is paused: `tandem unpause %s` first: %w", c.Meta.Name, c.Meta.Name, errdefs.ErrFailedPrecondition)
	default:
		return fmt.Errorf("container %s is %s, not running: %w", c.Meta.Name, stateWord(c), errdefs.ErrFailedPrecondition)
	}
	agent, err := k.s.agentOf(ctx, c)
	if err != nil {
		return err
	}
	spec = proto.Clone(spec).(*v1.ExecSpec)
	spec.ContainerId = c.Meta.Id
	return proxy(ctx, in, func(ctx context.Context) *bidiOut { return agent.Exec(ctx) }, &v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: spec}}, nil)
}

// Attach implements ContainerService. A container that is still starting is
// waited for, and its output is then given from its beginning: none is lost.
func (k *containers) Attach(ctx context.Context, in *bidiIn) error {
	s := k.s
	first, err := in.Receive()
	if err != nil {
		return fmt.Errorf("attach: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	spec := first.GetAttach()
	if spec == nil {
		return fmt.Errorf("attach begins with its container: %w", errdefs.ErrInvalidArgument)
	}
	c, err := s.container(spec.ContainerId, "")
	if err != nil {
		return err
	}
	release := s.ctl.Hold(c.Meta.Id)
	defer release()
	if c, err = s.reach(ctx, c); err != nil {
		return err
	}
	c, waited, err := s.waitCreated(ctx, c)
	if err != nil {
		return err
	}
	agent, err := s.agentOf(ctx, c)
	if err != nil {
		return err
	}
	spec = proto.Clone(spec).(*v1.AttachSpec)
	spec.ContainerId = c.Meta.Id
	spec.Logs = spec.Logs || waited
	return proxy(ctx, in, func(ctx context.Context) *bidiOut { return agent.Attach(ctx) }, &v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: spec}},
		func() { s.ended(c) })
}

// waitCreated returns when the container's runtime has it; waited says that it was
// not so at once.
func (s *Server) waitCreated(ctx context.Context, c *v1.Container) (_ *v1.Container, waited bool, err error) {
	for {
		_, changed := s.store.Changed()
		n, err := store.ByID[*v1.Container](s.store, store.Containers, c.Meta.Id)
		if err != nil {
			return nil, waited, fmt.Errorf("container %s was removed: %w", c.Meta.Name, errdefs.ErrNotFound)
		}
		c = n
		st := c.GetStatus()
		// What the agent says reaches the store a little later: for this it is enough
		// that it says so.
		told, news := s.ctl.Hosts.Told(c.GetAssignment().GetHostId(), c.Meta.Id)
		if told == nil {
			told = st
		}
		if told.GetAttachable() {
			return c, true, nil
		}
		switch st.GetState() {
		case v1.ContainerState_CONTAINER_STATE_RUNNING, v1.ContainerState_CONTAINER_STATE_PAUSED, v1.ContainerState_CONTAINER_STATE_EXITED,
			v1.ContainerState_CONTAINER_STATE_RESTARTING:
			return c, waited, nil
		case v1.ContainerState_CONTAINER_STATE_CREATED:
			if c.GetAssignment().GetHostId() != "" && st.ImageId != "" {
				return c, waited, nil
			}
		case v1.ContainerState_CONTAINER_STATE_FAILED:
			return nil, waited, fmt.Errorf("container %s could not start: %s: %w", c.Meta.Name, st.Message, errdefs.ErrFailedPrecondition)
		case v1.ContainerState_CONTAINER_STATE_UNKNOWN:
			return nil, waited, fmt.Errorf("container %s: %s: %w", c.Meta.Name, st.Message, errdefs.ErrUnavailable)
		}
		waited = true
		select {
		case <-ctx.Done():
			return nil, waited, ctx.Err()
		case <-s.store.Failed():
			return nil, waited, s.store.Err()
		case <-changed:
		case <-news:
		}
	}
}

// Logs implements ContainerService: those of several containers are merged as
// they come; without follow they are told one container after the other, each in
// order.
func (k *containers) Logs(ctx context.Context, req *connect.Request[v1.LogsRequest], out *connect.ServerStream[v1.LogEntry]) error {
	s := k.s
	o := req.Msg.GetOptions()
	if o == nil {
		o = &v1.LogOptions{Tail: -1}
	}
	cs, err := s.selected(req.Msg.GetSelector())
	if err != nil {
		return err
	}
	if len(cs) == 0 && req.Msg.GetSelector().GetProject() == "" {
		return fmt.Errorf("no container named: %w", errdefs.ErrInvalidArgument)
	}
	if len(cs) > maxFollowed {
		return fmt.Errorf("logs of %d containers at once, at most %d: name some: %w", len(cs), maxFollowed, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	send := func(e *v1.LogEntry) error {
		mu.Lock()
		defer mu.Unlock()
		return out.Send(e)
	}
	if !o.Follow {
		for _, c := range cs {
			if err := s.logs(ctx, c, o, send); err != nil {
				return err
			}
		}
		return nil
	}
	errs := make(chan error, len(cs))
	for _, c := range cs {
		go func() { errs <- s.followLogs(ctx, c, o, send) }()
	}
	// The first error ends all of them; the stream is theirs until the last is gone.
	var first error
	for range cs {
		if err := <-errs; err != nil && first == nil {
			first = err
			cancel()
		}
	}
	return first
}

// followLogs follows one container's logs: it waits until there are some, and
// goes on after its agent was away.
func (s *Server) followLogs(ctx context.Context, c *v1.Container, o *v1.LogOptions, send func(*v1.LogEntry) error) error {
	release := s.ctl.Hold(c.Meta.Id)
	defer release()
	o = proto.Clone(o).(*v1.LogOptions)
	for {
		_, changed := s.store.Changed()
		n, err := store.ByID[*v1.Container](s.store, store.Containers, c.Meta.Id)
		if err != nil {
			return nil // removed: that is the end of its log
		}
		st := n.GetStatus()
		if n.GetAssignment().GetHostId() != "" && (st.GetStartedAt() != nil || control.Ended(n)) {
			last, err := s.stream(ctx, n, o, send)
			if err == nil || !errdefs.IsUnavailable(err) || ctx.Err() != nil {
				if errdefs.IsNotFound(err) {
					return nil
				}
				return err
			}
			if last != nil { // go on behind what was told
				o.Since, o.Tail = last.Time, -1
				if last.Time != nil {
					t := last.Time.AsTime().Add(time.Nanosecond)
					o.Since.Seconds, o.Since.Nanos = t.Unix(), int32(t.Nanosecond())
				}
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(500 * time.Millisecond):
			}
			continue
		}
		if st.GetState() == v1.ContainerState_CONTAINER_STATE_FAILED || n.Meta.Deleting {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// logs tells one container's log as it is now.
func (s *Server) logs(ctx context.Context, c *v1.Container, o *v1.LogOptions, send func(*v1.LogEntry) error) error {
	if c.GetAssignment().GetHostId() == "" {
		return nil // never started: no log
	}
	_, err := s.stream(ctx, c, o, send)
	if errdefs.IsNotFound(err) && c.GetStatus().GetStartedAt() == nil {
		return nil
	}
	return err
}

func (s *Server) stream(ctx context.Context, c *v1.Container, o *v1.LogOptions, send func(*v1.LogEntry) error) (last *v1.LogEntry, err error) {
	agent, err := s.agentOf(ctx, c)
	if err != nil {
		return nil, err
	}
	o = proto.Clone(o).(*v1.LogOptions)
	o.ContainerId = c.Meta.Id
	st, err := agent.Logs(ctx, connect.NewRequest(o))
	if err != nil {
		return nil, err
	}
	defer st.Close()
	for st.Receive() {
		e := proto.Clone(st.Msg()).(*v1.LogEntry)
		e.ContainerId, e.ContainerName = c.Meta.Id, c.Meta.Name
		if err := send(e); err != nil {
			return last, err
		}
		last = e
	}
	return last, st.Err()
}

// Top implements ContainerService.
func (k *containers) Top(ctx context.Context, req *connect.Request[v1.ContainerRequest]) (*connect.Response[v1.TopResponse], error) {
	c, err := k.s.container(req.Msg.GetContainer(), req.Msg.GetProject())
	if err != nil {
		return nil, err
	}
	agent, err := k.s.agentOf(ctx, c)
	if err != nil {
		return nil, err
	}
	res, err := agent.Top(ctx, connect.NewRequest(&v1.RuntimeTopRequest{Id: c.Meta.Id}))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.TopResponse{Processes: res.Msg.Processes}), nil
}

// Kill implements ContainerService.
func (k *containers) Kill(ctx context.Context, req *connect.Request[v1.KillContainersRequest]) (*connect.Response[v1.KillContainersResponse], error) {
	s, r := k.s, req.Msg
	if r.Signal != "" && !signalName.MatchString(r.Signal) {
		return nil, fmt.Errorf("signal %.20q is malformed: %w", r.Signal, errdefs.ErrInvalidArgument)
	}
	cs, err := s.selected(r.GetSelector())
	if err != nil {
		return nil, err
	}
	if len(cs) == 0 {
		return nil, fmt.Errorf("no container named: %w", errdefs.ErrInvalidArgument)
	}
	for _, c := range cs {
		if c, err = s.reach(ctx, c); err != nil {
			return nil, err
		}
		if st := c.GetStatus().GetState(); st != v1.ContainerState_CONTAINER_STATE_RUNNING && st != v1.ContainerState_CONTAINER_STATE_PAUSED {
			if len(r.GetSelector().GetContainers()) == 0 {
				continue
			}
			return nil, fmt.Errorf("container %s is %s, not running: %w", c.Meta.Name, stateWord(c), errdefs.ErrFailedPrecondition)
		}
		agent, err := s.agentOf(ctx, c)
		if err != nil {
			return nil, err
		}
		sig := r.Signal
		if sig == "" {
			sig = "KILL"
		}
		if _, err := agent.Kill(ctx, connect.NewRequest(&v1.RuntimeKillRequest{Id: c.Meta.Id, Signal: sig})); err != nil {
			return nil, fmt.Errorf("killing %s: %w", c.Meta.Name, err)
		}
	}
	return connect.NewResponse(&v1.KillContainersResponse{}), nil
}
