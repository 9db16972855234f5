package fake

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// Exec implements runtime.Runtime.
func (r *Runtime) Exec(ctx context.Context, e *v1.ExecSpec, s runtime.Streams) (int, error) {
	if err := r.enter(ctx, "exec", e.GetContainerId()); err != nil {
		return 0, err
	}
	r.mu.Lock()
	c, err := r.get(e.GetContainerId())
	if err != nil {
		r.mu.Unlock()
		return 0, err
	}
	run, fn, running := c.ended, r.execFn, c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING
	r.mu.Unlock()
	if !running {
		return 0, notRunning(e.ContainerId)
	}
	if len(e.Args) == 0 || strings.HasPrefix(e.Args[0], "no-such") {
		return 0, fmt.Errorf("exec in container %s: executable file not found: %w", e.ContainerId, errdefs.ErrInvalidArgument)
	}
	if s.Started != nil {
		s.Started()
	}
	if fn != nil {
		return fn(e, s)
	}
	var late <-chan time.Time
	if e.Timeout != nil {
		late = time.After(e.Timeout.AsDuration())
	}
	switch a := e.Args; a[0] {
	case "false":
		return 1, nil
	case "echo":
		if s.Stdout != nil {
			_, err = io.WriteString(s.Stdout, strings.Join(a[1:], " ")+"\n")
		}
		return 0, err
	case "cat":
		if e.Stdin && s.Stdin != nil && s.Stdout != nil {
			_, err = io.Copy(s.Stdout, s.Stdin)
		}
		return 0, err
	case "sleep":
		d, _ := time.ParseDuration(a[1] + "s")
		select {
		case <-time.After(d):
			return 0, nil
		case <-late:
			return 137, fmt.Errorf("exec took longer than %v: %w", e.Timeout.AsDuration(), context.DeadlineExceeded)
		case <-run:
			return 137, nil
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	case "sh":
		var n int
		_, _ = fmt.Sscanf(a[len(a)-1], "exit %d", &n)
		return n, nil
	}
	return 0, nil
}

// Attach implements runtime.Runtime.
func (r *Runtime) Attach(ctx context.Context, a *v1.AttachSpec, s runtime.Streams) error {
	if err := r.enter(ctx, "attach", a.GetContainerId()); err != nil {
		return err
	}
	r.mu.Lock()
	c, err := r.get(a.GetContainerId())
	if err != nil {
		r.mu.Unlock()
		return err
	}
	ch := make(chan []byte, 1024)
	var replay [][]byte
	if a.Logs {
		for _, e := range c.log {
			replay = append(replay, e.Line)
		}
	}
	c.clients[ch] = true
	run := c.ended
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(c.clients, ch)
		r.mu.Unlock()
	}()
	if s.Started != nil {
		s.Started()
	}
	if a.Stdin && s.Stdin != nil {
		go r.feed(c, s.Stdin)
	}
	write := func(p []byte) error {
		if s.Stdout == nil {
			return nil
		}
		_, err := s.Stdout.Write(p)
		return err
	}
	for _, p := range replay {
		if err := write(p); err != nil {
			return err
		}
	}
	for {
		select {
		case p := <-ch:
			if err := write(p); err != nil {
				return err
			}
			continue
		case <-run:
		case <-c.gone:
		case <-ctx.Done():
			return ctx.Err()
		}
		for { // what was printed before the end
			select {
			case p := <-ch:
				if err := write(p); err != nil {
					return err
				}
				continue
			default:
			}
			return nil
		}
	}
}

func (r *Runtime) feed(c *container, in io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		r.mu.Lock()
		if n > 0 && c.stdin != nil {
			c.stdin(buf[:n])
		}
		if err != nil {
			if c.eof != nil && c.spec.StdinOnce {
				c.eof()
			}
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
	}
}

// Logs implements runtime.Runtime.
func (r *Runtime) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	if err := r.enter(ctx, "logs", o.GetContainerId()); err != nil {
		return err
	}
	wants := func(e *v1.LogEntry) bool {
		return (o.Stdout == o.Stderr || (e.Stream == "stdout") == o.Stdout) &&
			(o.Since == nil || !e.Time.AsTime().Before(o.Since.AsTime())) && (o.Until == nil || !e.Time.AsTime().After(o.Until.AsTime()))
	}
	at := -1
	for {
		r.mu.Lock()
		c, err := r.get(o.ContainerId)
		if err != nil {
			r.mu.Unlock()
			if at >= 0 {
				return nil // deleted
			}
			return err
		}
		if at < 0 {
			at = 0
			for i, n := len(c.log), o.Tail; o.Tail >= 0; {
				if n == 0 || i == 0 {
					at = i
					break
				}
				if i--; wants(c.log[i]) {
					n--
				}
			}
		}
		list, more, gone := slices.Clone(c.log[at:]), c.logMore, c.gone
		at = len(c.log)
		r.mu.Unlock()
		for _, e := range list {
			if wants(e) {
				if err := fn(proto.CloneOf(e)); err != nil {
					return err
				}
			}
		}
		if !o.Follow {
			return nil
		}
		select {
		case <-more:
		case <-gone:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Wait implements runtime.Runtime.
func (r *Runtime) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	if err := r.enter(ctx, "wait", id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	c, err := r.get(id)
	if err != nil {
		r.mu.Unlock()
		return nil, err
	}
	run := c.ended
	r.mu.Unlock()
	select {
	case <-run:
	case <-c.gone:
		select {
		case <-run: // it had ended when it was deleted
		default:
			return nil, fmt.Errorf("container %s was deleted: %w", id, errdefs.ErrNotFound)
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return proto.CloneOf(c.st), nil
}

// Events implements runtime.Runtime.
func (r *Runtime) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	if err := r.enter(ctx, "events", ""); err != nil {
		return nil, err
	}
	ch := make(chan *v1.RuntimeEvent, 1024)
	ch <- &v1.RuntimeEvent{Action: "ready", At: timestamppb.Now()}
	r.mu.Lock()
	r.subs[ch] = true
	r.mu.Unlock()
	context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.subs[ch] {
			delete(r.subs, ch)
			close(ch)
		}
	})
	return ch, nil
}

func (r *Runtime) dropSubs() {
	for ch := range r.subs {
		delete(r.subs, ch)
		close(ch)
	}
}
