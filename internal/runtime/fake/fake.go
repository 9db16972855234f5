// Package fake is package runtime's contract in memory, for tests of whoever
// uses a runtime.
//
//	rt := fake.New()
//	rt.Fail("start", "web-1", errdefs.ErrUnavailable) // the next Start of web-1 fails
//	rt.Delay("create", "", time.Second)               // every Create takes a second
//	rt.Exit("web-1", 137, true)                       // it ends, killed for memory
//
// Containers run nothing, but behave as these programs would: true, false,
// echo, cat, sleep N, `sh -c "exit N"`; anything else runs until it is stopped,
// with exit code 143 or 137. State outlives Close: Reopen gives a new Runtime on
// it, as a new process would find it.
package fake

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/signal"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// Runtime is the fake. The zero value is not usable; see New.
type Runtime struct{ *state }

var _ runtime.Runtime = (*Runtime)(nil)

type state struct {
	mu     sync.Mutex
	ctrs   map[string]*container
	disks  map[string]*v1.MountDiskRequest
	subs   map[chan *v1.RuntimeEvent]bool
	fails  map[string][]error
	delays map[string]time.Duration
	pid    int64
	calls  []string
	execFn func(*v1.ExecSpec, runtime.Streams) (int, error)
	down   error
}

type container struct {
	spec    *v1.RuntimeSpec
	st      *v1.RuntimeStatus
	ended   chan struct{} // of the present run
	log     []*v1.LogEntry
	logMore chan struct{} // closed and replaced with each entry
	gone    chan struct{}
	stdin   func([]byte) // of cat
	eof     func()
	clients map[chan []byte]bool
	usage   *v1.Usage
}

var idPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// New makes an empty runtime.
func New() *Runtime {
	return &Runtime{&state{
		ctrs: map[string]*container{}, disks: map[string]*v1.MountDiskRequest{}, subs: map[chan *v1.RuntimeEvent]bool{},
		fails: map[string][]error{}, delays: map[string]time.Duration{}, pid: 1000,
	}}
}

// Reopen ends all event streams and gives what a new process would see.
func (r *Runtime) Reopen() *Runtime {
	_ = r.Close()
	return &Runtime{r.state}
}

// Fail makes the next call of op ("mount", "create", "start", "exec", ...) for id
// ("" = any) fail with err. Several are used up in turn.
func (r *Runtime) Fail(op, id string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fails[op+"/"+id] = append(r.fails[op+"/"+id], err)
}

// Delay makes every call of op for id ("" = any) take at least d; 0 ends it.
func (r *Runtime) Delay(op, id string, d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.delays[op+"/"+id] = d
}

// Down makes every call fail with err until Down(nil): a machine that does not answer.
func (r *Runtime) Down(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = err
	if err != nil {
		r.dropSubs()
	}
}

// OnExec decides what Exec does instead of the built-in programs.
func (r *Runtime) OnExec(fn func(*v1.ExecSpec, runtime.Streams) (int, error)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.execFn = fn
}

// Calls lists what was called so far: "create web-1", "start web-1", ...
func (r *Runtime) Calls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.calls)
}

// Spec is what a container was created with; nil if there is none.
func (r *Runtime) Spec(id string) *v1.RuntimeSpec {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.ctrs[id]; c != nil {
		return proto.CloneOf(c.spec)
	}
	return nil
}

// Disks lists the ids that are mounted.
func (r *Runtime) Disks() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for id := range r.disks {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// SetUsage decides what Stats answers.
func (r *Runtime) SetUsage(id string, u *v1.Usage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.ctrs[id]; c != nil {
		c.usage = proto.CloneOf(u)
	}
}

// Exit ends a running container.
func (r *Runtime) Exit(id string, code int, oom bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.ctrs[id]; c != nil {
		r.exit(c, code, oom)
	}
}

// Print adds output to a container's log and its clients.
func (r *Runtime) Print(id, stream, line string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.ctrs[id]; c != nil {
		c.print(stream, []byte(line))
	}
}

func (c *container) print(stream string, p []byte) {
	c.log = append(c.log, &v1.LogEntry{Time: timestamppb.Now(), Stream: stream, Line: slices.Clone(p), ContainerId: c.spec.Id, ContainerName: c.spec.Name})
	close(c.logMore)
	c.logMore = make(chan struct{})
	for ch := range c.clients {
		select {
		case ch <- slices.Clone(p):
		default:
		}
	}
}

func active(s v1.ContainerState) bool {
	return s == v1.ContainerState_CONTAINER_STATE_RUNNING || s == v1.ContainerState_CONTAINER_STATE_PAUSED
}

func (r *Runtime) exit(c *container, code int, oom bool) {
	if !active(c.st.State) {
		return
	}
	c.st.State, c.st.ExitCode, c.st.Pid, c.st.FinishedAt = v1.ContainerState_CONTAINER_STATE_EXITED, int32(code), 0, timestamppb.Now()
	if oom {
		c.st.OomKilled = true
		r.publish("oom", c)
	}
	close(c.ended)
	r.publish("exit", c)
}

func (r *Runtime) publish(action string, c *container) {
	ev := &v1.RuntimeEvent{Id: c.spec.Id, Action: action, Status: proto.CloneOf(c.st), At: timestamppb.Now()}
	for ch := range r.subs {
		select {
		case ch <- ev:
		default:
			delete(r.subs, ch)
			close(ch)
		}
	}
}

// enter does what was injected for a call and notes it.
func (r *Runtime) enter(ctx context.Context, op, id string) error {
	r.mu.Lock()
	r.calls = append(r.calls, strings.TrimSpace(op+" "+id))
	d := max(r.delays[op+"/"+id], r.delays[op+"/"])
	r.mu.Unlock()
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down != nil {
		return r.down
	}
	for _, k := range []string{op + "/" + id, op + "/"} {
		if errs := r.fails[k]; len(errs) > 0 {
			r.fails[k] = errs[1:]
			return fmt.Errorf("%s %s: %w", op, id, errs[0])
		}
	}
	return ctx.Err()
}

func (r *Runtime) get(id string) (*container, error) {
	if c := r.ctrs[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func notRunning(id string) error {
	return fmt.Errorf("container %s does not run: %w", id, errdefs.ErrFailedPrecondition)
}

// program behaves as args would; the caller holds mu.
func (r *Runtime) program(c *container) {
	a := c.spec.Args
	run := c.ended
	c.stdin, c.eof = nil, nil
	if len(a) > 2 && a[0] == "sh" && a[1] == "-c" {
		if line, ok := strings.CutPrefix(a[2], "exec "); ok {
			a = strings.Fields(line)
		} else if code, ok := strings.CutPrefix(a[2], "exit "); ok {
			n, _ := strconv.Atoi(code)
			r.exit(c, n, false)
			return
		}
	}
	switch a[0] {
	case "true":
		r.exit(c, 0, false)
	case "false":
		r.exit(c, 1, false)
	case "echo":
		c.print("stdout", []byte(strings.Join(a[1:], " ")+"\n"))
		r.exit(c, 0, false)
	case "cat":
		if !c.spec.StdinOpen {
			r.exit(c, 0, false)
			return
		}
		c.stdin = func(p []byte) { c.print("stdout", p) }
		c.eof = func() { r.exit(c, 0, false) }
	case "sleep":
		n, err := strconv.ParseFloat(a[len(a)-1], 64)
		if err != nil {
			return
		}
		go func() {
			select {
			case <-run:
			case <-c.gone:
			case <-time.After(time.Duration(n * float64(time.Second))):
				r.mu.Lock()
				defer r.mu.Unlock()
				if c.ended == run {
					r.exit(c, 0, false)
				}
			}
		}()
	}
}

func parseSignal(s string) (int, error) {
	n, err := signal.ParseSignal(s)
	if err != nil {
		return 0, fmt.Errorf("signal %q: %w", s, errdefs.ErrInvalidArgument)
	}
	return int(n), nil
}
