package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/semaphore"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/runtime"
)

// maxStatuses bounds how many containers a guest may claim to have.
const maxStatuses = 4096

// kernel is a place where containers run: a machine's guest, or this host. It
// knows the session by which it can be talked to now (if any), what its runtime
// reported last of each container, and which disks it holds.
//
// Actors of containers look at it with observe and are woken when anything of
// theirs changes.
type kernel struct {
	machine string // id; empty: this host
	clock   Clock
	log     *slog.Logger
	disks   *diskSet
	// known says whether a container belongs here; what does not is deleted.
	known func(id string) bool

	mu       sync.Mutex
	sess     *session
	seen     map[string]*v1.RuntimeStatus
	watchers map[string]func()
	why      string        // why there is no session
	gone     bool          // the machine does not exist any more
	down     bool          // the machine shall not run: nothing will start here
	looked   bool          // somebody has looked whether it runs
	news     chan struct{} // closed, and replaced, when sess, gone or down may have changed
}

// session is one connection to a kernel's runtime.
type session struct {
	rt    runtime.Runtime
	guest tandemv1connect.GuestServiceClient // nil on metal
	// boot names this run of the kernel: containers of another one are dead.
	boot string
	ctx  context.Context // ends with the connection
	end  context.CancelFunc
	// turns bounds how many containers are made and started at once. A guest that
	// is given hundreds to start has no time left to answer keep-alives.
	turns *semaphore.Weighted
	// linked is closed when the kernel has its network: containers may be made
	// before, but not started. Nil: it has.
	linked chan struct{}
}

// startsAtOnce is how many containers a kernel with so many CPUs starts at once.
func startsAtOnce(cpus int) *semaphore.Weighted {
	return semaphore.NewWeighted(int64(max(4, 2*cpus)))
}

// turn waits until a container may be made and started; done lets the next one.
func (s *session) turn(ctx context.Context) (done func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	if err := s.turns.Acquire(ctx, 1); err != nil {
		return nil, waiting("its turn to start")
	}
	return func() { s.turns.Release(1) }, nil
}

// awaitNetwork returns when containers may start.
func (s *session) awaitNetwork(ctx context.Context) error {
	if s.linked == nil {
		return nil
	}
	select {
	case <-s.linked:
		return nil
	case <-s.ctx.Done():
		return waiting("its machine's network")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func newKernel(machine string, clock Clock, log *slog.Logger, disks *diskSet, known func(string) bool) *kernel {
	return &kernel{machine: machine, clock: clock, log: log, disks: disks, known: known,
		seen: map[string]*v1.RuntimeStatus{}, watchers: map[string]func(){}, why: "not started yet", news: make(chan struct{})}
}

func (k *kernel) String() string {
	if k.machine == "" {
		return "this host"
	}
	return "machine " + k.machine
}

// join makes a container's actor hear of changes; leave ends that.
func (k *kernel) join(id string, wake func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.watchers[id] = wake
}

func (k *kernel) leave(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.watchers, id)
}

// residents is how many containers' actors still need this kernel.
func (k *kernel) residents() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.watchers)
}

func (k *kernel) wakeAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.news)
	k.news = make(chan struct{})
	for _, w := range k.watchers {
		w()
	}
}

// observation is one consistent look at a kernel and a container in it.
type observation struct {
	sess *session
	st   *v1.RuntimeStatus // nil: the runtime does not know the container
	why  string
	gone bool
	down bool
}

func (k *kernel) observe(id string) observation {
	k.mu.Lock()
	defer k.mu.Unlock()
	return observation{sess: k.sess, st: k.seen[id], why: k.why, gone: k.gone, down: k.down}
}

// await is observe, once there is a session; without one after patience, or when none
// is to be expected, it is what was seen last.
func (k *kernel) await(ctx context.Context, id string, patience time.Duration) (observation, error) {
	var end <-chan time.Time
	for {
		k.mu.Lock()
		news := k.news
		k.mu.Unlock()
		o := k.observe(id)
		if o.sess != nil || o.gone || o.down || patience <= 0 {
			return o, nil
		}
		if end == nil {
			end = k.clock.After(patience)
		}
		select {
		case <-news:
		case <-end:
			return k.observe(id), nil
		case <-ctx.Done():
			return o, ctx.Err()
		}
	}
}

// created notes a container that was just made, before its event arrives.
func (k *kernel) created(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.seen[id] == nil {
		k.seen[id] = &v1.RuntimeStatus{Id: id, State: v1.ContainerState_CONTAINER_STATE_CREATED}
	}
}

// forget drops what was seen of a container that was deleted.
func (k *kernel) forget(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.seen, id)
}

// setDown says why no session is to be expected soon.
func (k *kernel) setDown(why string, down bool) {
	k.mu.Lock()
	k.why, k.down = why, down
	k.mu.Unlock()
	k.wakeAll()
}

// found says that disks tells from now on whether the kernel runs.
func (k *kernel) found() {
	k.mu.Lock()
	news := !k.looked
	k.looked = true
	k.mu.Unlock()
	if news {
		k.wakeAll()
	}
}

// mayRun says that containers may run here: until somebody has looked, nobody
// knows that they don't.
func (k *kernel) mayRun() bool {
	k.mu.Lock()
	looked := k.looked
	k.mu.Unlock()
	return !looked || k.disks.running()
}

// setGone says that the machine was deleted.
func (k *kernel) setGone() {
	k.close(nil, "its machine is gone")
	k.mu.Lock()
	k.gone = true
	k.seen = map[string]*v1.RuntimeStatus{}
	k.mu.Unlock()
	k.disks.reset("")
	k.wakeAll()
}

// close ends a session (nil: whichever there is).
func (k *kernel) close(s *session, why string) {
	k.mu.Lock()
	if k.sess == nil || s != nil && k.sess != s {
		k.mu.Unlock()
		return
	}
	old := k.sess
	k.sess, k.why = nil, why
	k.mu.Unlock()
	old.end()
	k.wakeAll()
}

// open makes a session the kernel's. It returns after the runtime was listed
// once, so that no actor acts on what it does not know, and then follows the
// runtime's events until the session ends.
func (k *kernel) open(s *session) error {
	ev, ids, err := k.list(s)
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.sess, k.why, k.gone, k.down = s, "", false, false
	k.mu.Unlock()
	k.wakeAll()
	go k.deleteStrangers(s, ids) // only now: who gave up for want of a session is known by now, see dismantle
	go k.follow(s, ev)
	return nil
}

// list subscribes to events and then lists, so that nothing falls between. It
// returns the ids of what is there.
func (k *kernel) list(s *session) (<-chan *v1.RuntimeEvent, []string, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	fail := func(what string, err error) (<-chan *v1.RuntimeEvent, []string, error) {
		cancel()
		return nil, nil, fmt.Errorf("%s: %s: %w", k, what, err)
	}
	ev, err := s.rt.Events(ctx)
	if err != nil {
		return fail("events", err)
	}
	select {
	case e, ok := <-ev:
		if !ok {
			return fail("events", fmt.Errorf("the stream ended at once: %w", errdefs.ErrUnavailable))
		}
		if e.GetAction() != "ready" {
			k.log.Warn("the runtime's first event is not ready", "kernel", k.String(), "action", e.GetAction())
		}
	case <-k.clock.After(time.Minute):
		return fail("events", fmt.Errorf("no answer for a minute: %w", context.DeadlineExceeded))
	case <-ctx.Done():
		return fail("events", ctx.Err())
	}
	list, err := s.rt.List(ctx)
	if err != nil {
		return fail("list", err)
	}
	if len(list) > maxStatuses {
		return fail("list", fmt.Errorf("%d containers reported, more than %d: %w", len(list), maxStatuses, errdefs.ErrOutOfRange))
	}
	seen := map[string]*v1.RuntimeStatus{}
	var ids []string
	for _, st := range list {
		if !validID.MatchString(st.GetId()) {
			continue
		}
		ids = append(ids, st.Id)
		if k.known(st.Id) {
			seen[st.Id] = tidy(st)
		}
	}
	k.mu.Lock()
	k.seen = seen
	k.mu.Unlock()
	return ev, ids, nil
}

// deleteStrangers removes those of the containers that nobody asked for (their
// removal was cut short by a crash).
func (k *kernel) deleteStrangers(s *session, ids []string) {
	for _, id := range ids {
		if k.known(id) {
			continue
		}
		k.log.Info("deleting a container that is not in the spec", "container", id, "kernel", k.String())
		if err := s.rt.Delete(s.ctx, id, true); err != nil && !errdefs.IsNotFound(err) {
			k.log.Warn("deleting a container that is not in the spec", "container", id, "error", err)
		}
	}
}

// follow keeps seen up to date; a broken event stream is opened again.
func (k *kernel) follow(s *session, ev <-chan *v1.RuntimeEvent) {
	delay := 100 * time.Millisecond
	for {
		for e := range ev {
			k.take(s, e)
			delay = 100 * time.Millisecond
		}
		for {
			select {
			case <-s.ctx.Done():
				return
			case <-k.clock.After(delay):
			}
			delay = min(2*delay, 10*time.Second)
			next, ids, err := k.list(s)
			if err == nil {
				ev = next
				k.wakeAll()
				go k.deleteStrangers(s, ids)
				break
			}
			k.log.Debug("runtime events", "kernel", k.String(), "error", err)
		}
	}
}

// take applies one event.
func (k *kernel) take(s *session, e *v1.RuntimeEvent) {
	id := e.GetId()
	if !validID.MatchString(id) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	wake := k.watchers[id]
	if wake == nil || k.sess != s && k.sess != nil {
		return
	}
	switch e.Action {
	case "delete":
		delete(k.seen, id)
	default:
		if e.Status == nil || e.Status.Id != "" && e.Status.Id != id {
			return
		}
		st := tidy(e.Status)
		st.Id = id
		if e.Action == "oom" {
			st.OomKilled = true
		}
		k.seen[id] = st
	}
	wake()
}

// tidy copies a status from a runtime that may lie: bounded, known states only.
func tidy(st *v1.RuntimeStatus) *v1.RuntimeStatus {
	st = proto.Clone(st).(*v1.RuntimeStatus)
	st.Labels = nil
	switch st.State {
	case v1.ContainerState_CONTAINER_STATE_CREATED, v1.ContainerState_CONTAINER_STATE_RUNNING,
		v1.ContainerState_CONTAINER_STATE_PAUSED, v1.ContainerState_CONTAINER_STATE_EXITED:
	default:
		st.State = v1.ContainerState_CONTAINER_STATE_CREATED
	}
	if st.StartedAt != nil && !st.StartedAt.IsValid() {
		st.StartedAt = nil
	}
	if st.FinishedAt != nil && !st.FinishedAt.IsValid() {
		st.FinishedAt = nil
	}
	if st.CreatedAt != nil && !st.CreatedAt.IsValid() {
		st.CreatedAt = nil
	}
	return st
}
