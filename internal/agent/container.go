package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
)

// errWait says that a step can't go on until something else happens, which
// will wake the actor. It is no failure.
var errWait = errors.New("waiting")

// waiting is errWait with the reason for people.
func waiting(why string) error { return fmt.Errorf("%w for %s", errWait, why) }

// container supervises one container: see step.
type container struct {
	a    *Agent
	id   string
	log  *slog.Logger
	wake chan struct{}

	begun bool // run was called; guarded by a.mu

	mu        sync.Mutex
	want      *v1.ContainerAssignment // nil: it shall be gone
	leave     *durationpb.Duration    // how long it may take for that, where somebody said so
	ending    *ending                 // the call of Stop that is under way
	changed   bool                    // want is new since the last step
	interrupt context.CancelFunc      // ends what may be given up when want changes
	results   []probeOf               // of health checks, not yet judged
	place     string                  // machine that it is in, for calls from outside

	leaving atomic.Bool // it goes without its kernel being asked: see dismantle

	// The rest belongs to the actor's goroutine.
	rec       *containerRecord
	k         *kernel  // joined
	startedIn *session // where Start was called by this process
	unsure    bool     // Start was called, and nothing has told since whether it runs
	prep      *prepared
	leasing   func() error // answers when its lease of the image is on the disk; nil: none is under way
	retry     backoff
	retryAt   time.Time
	retryIn   *session // a new session makes trying again worth while
	message   string
	phase     v1.ContainerState // while it works on something
	check     *healthRun

	attachable bool // it is CREATING, and the runtime has it

	imageConfig *v1.ImageConfig // of imageOf
	imageOf     string
	prepCheck   *v1.HealthCheck // image's and user's, merged
}

type probeOf struct {
	run int64
	res probeResult
}

func newContainer(a *Agent, id string, rec *containerRecord) *container {
	c := &container{a: a, id: id, rec: rec, log: a.log.With("container", id), wake: make(chan struct{}, 1)}
	if rec != nil {
		c.place = rec.Machine
	}
	return c
}

// ending is a call of Stop under way.
type ending struct {
	grace time.Duration
	cut   context.CancelFunc
}

// set gives the actor its intent; leave says how long the container may take to
// end when it is to be gone, nil: as before. A stop under way that would take
// longer than is allowed now is given up, and begins again.
func (c *container) set(want *v1.ContainerAssignment, leave *durationpb.Duration) {
	c.mu.Lock()
	same := proto.Equal(c.want, want) && (c.want == nil) == (want == nil) && proto.Equal(c.leave, leave)
	if !same {
		c.want, c.leave, c.changed = want, leave, true
		if c.interrupt != nil {
			c.interrupt()
		}
		c.hasten()
	}
	c.mu.Unlock()
	if !same {
		c.poke()
	}
}

// hasten gives up a stop under way that is to be a quicker one; with c.mu.
func (c *container) hasten() {
	if c.ending == nil || c.want != nil && !c.want.Stopped {
		return
	}
	if g, told := toldGrace(c.want, c.leave); told && g < c.ending.grace {
		c.ending.cut()
	}
}

// poke makes the actor look again.
func (c *container) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// hurry is poke, and cuts a wait after a failure short.
func (c *container) hurry() {
	c.mu.Lock()
	c.changed = true
	c.mu.Unlock()
	c.poke()
}

// run is the actor. It ends when the container is gone or ctx ends.
func (c *container) run(ctx context.Context) {
	defer func() {
		c.stopCheck()
		if c.k != nil {
			c.k.leave(c.id)
			if c.k.machine != "" {
				c.a.pokeMachine(c.k.machine)
			}
		}
	}()
	for ctx.Err() == nil {
		wait, done := c.step(ctx)
		if done {
			return
		}
		var timer <-chan time.Time
		if wait > 0 {
			timer = c.a.o.Clock.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-c.wake:
		case <-timer:
		}
	}
}

// step compares intent, record and what is seen, and does what is missing. It
// returns after how long to look again though nothing woke it (0: never).
func (c *container) step(ctx context.Context) (time.Duration, bool) {
	soft, cancel := context.WithCancel(ctx) // ends when want changes
	defer cancel()
	c.mu.Lock()
	want := c.want
	if c.changed {
		c.changed, c.retryAt = false, time.Time{}
		c.retry.reset()
	}
	c.interrupt = cancel
	results := c.results
	c.results = nil
	c.mu.Unlock()

	now := c.a.o.Clock.Now()
	if left := c.retryAt.Sub(now); left > 0 && (c.rec == nil || !c.rec.Running || want == nil) && c.session() == c.retryIn {
		return left, false
	}
	var wait time.Duration
	var err error
	if want == nil {
		if err = c.remove(ctx); err == nil {
			return 0, true
		}
	} else {
		wait, err = c.reconcile(ctx, soft, want, results)
	}
	switch {
	case ctx.Err() != nil:
		return 0, false
	case err == nil:
		c.retry.reset()
		c.retryAt, c.message = time.Time{}, ""
	case errors.Is(err, errWait):
		c.message = err.Error()
	case soft.Err() != nil: // given up for a newer intent, which has woken us
		return 0, false
	default:
		wait = c.retry.next(c.a.o.Tuning.RetryDelay, c.a.o.Tuning.RetryDelayMax)
		c.retryAt, c.retryIn = c.a.o.Clock.Now().Add(wait), c.session()
		c.message = cut(err.Error(), 2048)
		c.phase = v1.ContainerState_CONTAINER_STATE_FAILED
		c.log.Warn("container", "error", err, "retry", wait)
	}
	c.publish(want)
	return wait, false
}

// session is the one with the container's kernel, or nil.
func (c *container) session() *session {
	if c.k == nil {
		return nil
	}
	return c.k.observe(c.id).sess
}

// reconcile is one step towards want.
func (c *container) reconcile(ctx, soft context.Context, want *v1.ContainerAssignment, results []probeOf) (time.Duration, error) {
	c.phase = v1.ContainerState_CONTAINER_STATE_UNSPECIFIED
	c.leaving.Store(false)
	fixed, live := hashes(want)
	if c.rec == nil {
		c.rec = &containerRecord{RestartGen: want.RestartGeneration, CreatedAt: c.a.o.Clock.Now()}
	}
	r := c.rec
	r.Name, r.Project = want.Name, want.Project
	if r.Made && r.Fixed != fixed {
		if err := c.replace(ctx, want); err != nil {
			return 0, err
		}
		r = c.rec
	}
	if !r.Made && r.Fixed != fixed {
		c.prep = nil
		r.Fixed, r.Machine = fixed, want.MachineId
	}
	if g := c.grace(want); !r.GraceKnown || r.Grace != g {
		r.Grace, r.GraceKnown = g, true
		if r.Made {
			c.save()
		}
	}
	if err := c.joinKernel(r.Machine); err != nil {
		return 0, err
	}
	o := c.k.observe(c.id)
	c.look(want, o)
	c.judge(want, results)

	if want.RestartGeneration > r.RestartGen {
		if r.Running {
			if err := c.stop(ctx, want, o); err != nil {
				return 0, err
			}
		}
		r.RestartGen = want.RestartGeneration
		c.fresh()
	}
	if want.Stopped {
		r.Generation = want.Generation
		if r.Running {
			if err := c.stop(ctx, want, o); err != nil {
				return 0, err
			}
		}
		if !r.Stopped {
			r.Stopped = true
			c.save()
		}
		c.stopCheck()
		return 0, nil
	}
	if r.Stopped {
		r.Stopped = false
		c.fresh()
	}
	if r.Done {
		c.stopCheck()
		r.Generation = want.Generation
		return 0, nil
	}
	if r.Running {
		r.Generation = want.Generation
		return 0, c.tend(ctx, want, live)
	}
	c.stopCheck()
	if want.Hold && r.Run > 0 {
		want = proto.Clone(want).(*v1.ContainerAssignment)
		want.Hold = false // it ran before: dependencies delay the first start only
	}
	if left := r.NextStart.Sub(c.a.o.Clock.Now()); left > 0 {
		c.phase = v1.ContainerState_CONTAINER_STATE_RESTARTING
		return left, nil
	}
	if err := c.bring(ctx, soft, want, live); err != nil {
		return 0, err
	}
	r.Generation = want.Generation
	return 0, nil
}

// fresh forgets earlier ends: a user starts it anew.
func (c *container) fresh() {
	r := c.rec
	r.Done, r.Failure, r.Restarts, r.NextStart = false, "", 0, time.Time{}
	r.Delay.reset()
	c.save()
}

// joinKernel makes the actor hear of what happens where the container is.
func (c *container) joinKernel(machine string) error {
	k := c.a.kernel(machine)
	if k == nil {
		if machine == "" {
			return waiting("a runtime on this host (isolation: metal is not offered here)")
		}
		return waiting("machine " + machine)
	}
	if c.k == k {
		return nil
	}
	c.mu.Lock()
	c.place = machine
	c.mu.Unlock()
	if c.k != nil {
		c.k.leave(c.id)
	}
	c.k = k
	k.join(c.id, c.poke)
	k.disks.hold(c.id, c.rec.Disks)
	return nil
}

// save writes the record. When the disk is full the agent goes on by memory:
// containers run, and the next agent finds them by looking.
func (c *container) save() {
	if err := saveRecord(c.a.state, "containers", c.id, c.rec); err != nil {
		c.log.Error("a container's record can't be written", "error", err)
	}
}

// event tells what happened.
func (c *container) event(action string, attrs ...string) {
	e := c.a.newEvent("container", action, c.id, c.rec.Name, c.rec.Project)
	e.Attributes["image"] = c.rec.Image
	if c.rec.Machine != "" {
		e.Attributes["machine"] = c.rec.Machine
	}
	for i := 0; i+1 < len(attrs); i += 2 {
		e.Attributes[attrs[i]] = attrs[i+1]
	}
	c.a.hub.event(e)
}
