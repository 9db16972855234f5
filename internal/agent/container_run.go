package agent

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
)

// look takes in what the runtime says of a container that we believe to run.
func (c *container) look(want *v1.ContainerAssignment, o observation) {
	r := c.rec
	if !r.Running {
		return
	}
	if o.gone {
		c.lost("its machine is gone")
		r.Made = false
		c.save()
		return
	}
	if o.sess == nil {
		return
	}
	st := o.st
	state := st.GetState()
	switch {
	case state == v1.ContainerState_CONTAINER_STATE_RUNNING || state == v1.ContainerState_CONTAINER_STATE_PAUSED:
		r.Boot = o.sess.boot
		c.startedIn, c.unsure = o.sess, false
		if at := st.GetStartedAt(); at.IsValid() && !at.AsTime().Equal(r.StartedAt) {
			r.StartedAt = at.AsTime() // the runtime's word, for times when it can't be asked
			c.save()
		}
	case r.Boot != o.sess.boot:
		c.lost("its machine was started again")
	case st == nil:
		c.lost("the runtime does not know it any more")
	case state == v1.ContainerState_CONTAINER_STATE_EXITED && exitToken(st) != r.LastExit:
		c.exited(want, st)
	case c.startedIn != o.sess:
		// A start was announced, and cut off before it happened.
		r.Running = false
	}
}

// exited handles an end that the container came to by itself or by Stop.
func (c *container) exited(want *v1.ContainerAssignment, st *v1.RuntimeStatus) {
	r := c.rec
	r.Running, r.LastExit = false, exitToken(st)
	r.ExitCode, r.OOM = st.ExitCode, st.OomKilled
	r.FinishedAt = c.a.o.Clock.Now()
	if st.FinishedAt != nil {
		r.FinishedAt = st.FinishedAt.AsTime()
	}
	started := r.StartedAt
	if st.StartedAt != nil {
		started = st.StartedAt.AsTime()
		r.StartedAt = started
	}
	ran := r.FinishedAt.Sub(started)
	if r.OOM {
		c.event("oom")
	}
	c.event("die", "exitCode", strconv.Itoa(int(r.ExitCode)), "execDuration", strconv.Itoa(int(ran.Seconds())))
	switch {
	case want == nil || want.Stopped || want.RestartGeneration > r.RestartGen: // it was told to end
	case shouldRestart(want.Spec.Restart, exitInfo{Code: st.ExitCode, Ran: ran}, r.Restarts):
		r.Restarts++
		if ran >= c.a.o.Tuning.RestartReset {
			r.Delay.reset()
		}
		r.NextStart = c.a.o.Clock.Now().Add(r.Delay.next(c.a.o.Tuning.RestartDelay, c.a.o.Tuning.RestartDelayMax))
	default:
		r.Done = true
	}
	c.stopCheck()
	c.save()
}

// lost handles an end that came from below: the machine crashed or was started
// again. It did not end by itself, so it starts again whatever its policy is.
func (c *container) lost(why string) {
	r := c.rec
	c.log.Info("container was lost and starts again", "why", why)
	r.Running = false
	r.Restarts++
	r.FinishedAt = c.a.o.Clock.Now()
	r.ExitCode = 255
	c.stopCheck()
	c.event("die", "exitCode", "255", "reason", why)
	c.save()
}

// grace is how long a container may take to end. One that is to go has no
// assignment any more, and keeps what its last one said unless it was told anew.
func (c *container) grace(want *v1.ContainerAssignment) time.Duration {
	c.mu.Lock()
	leave := c.leave
	c.mu.Unlock()
	if g, told := toldGrace(want, leave); told {
		return g
	}
	if want == nil && c.rec.GraceKnown {
		return c.rec.Grace
	}
	return c.a.o.Tuning.StopGrace
}

// toldGrace is the time that an intent gives a container to end, if it says so.
func toldGrace(want *v1.ContainerAssignment, leave *durationpb.Duration) (time.Duration, bool) {
	d := leave
	if want != nil {
		if d = want.GetStopTimeout(); d == nil {
			d = want.GetSpec().GetStopGracePeriod()
		}
	}
	return max(0, d.AsDuration()), d != nil
}

// stop ends a running container: signal, grace, kill. Without a session there
// is nothing to do but wait, unless its kernel is down: then it has ended.
func (c *container) stop(ctx context.Context, want *v1.ContainerAssignment, o observation) error {
	c.stopCheck()
	if o.sess == nil {
		if c.k.mayRun() {
			return waiting(c.k.String() + ", to stop it there: " + o.why)
		}
		c.rec.Running = false
		c.save()
		return nil
	}
	grace := c.grace(want)
	ctx, cancel := context.WithTimeout(ctx, grace+c.a.o.Tuning.CallTimeout)
	defer cancel()
	c.mu.Lock()
	c.ending = &ending{grace, cancel}
	c.hasten()
	c.mu.Unlock()
	st, err := o.sess.rt.Stop(ctx, c.id, "", grace)
	c.mu.Lock()
	c.ending = nil
	c.mu.Unlock()
	switch {
	case errdefs.IsNotFound(err):
		c.k.forget(c.id)
		c.rec.Running = false
		c.save()
		return nil
	case err != nil:
		return fmt.Errorf("stop: %w", err)
	}
	if st != nil && exitToken(st) != c.rec.LastExit {
		c.exited(want, tidy(st))
	}
	c.rec.Running = false
	c.event("stop")
	c.save()
	return nil
}

// tend looks after a running container: limits, pause, health.
func (c *container) tend(ctx context.Context, want *v1.ContainerAssignment, live string) error {
	r := c.rec
	o := c.k.observe(c.id)
	if o.sess == nil {
		return waiting(c.k.String() + ": " + o.why)
	}
	call, cancel := context.WithTimeout(ctx, c.a.o.Tuning.CallTimeout)
	defer cancel()
	if r.Live != live {
		res := want.Spec.Resources
		if res == nil {
			res = &v1.Resources{}
		}
		if err := o.sess.rt.Update(call, c.id, res); err != nil {
			return fmt.Errorf("change limits: %w", err)
		}
		r.Live = live
		c.save()
		c.event("update")
	}
	paused := o.st.GetState() == v1.ContainerState_CONTAINER_STATE_PAUSED
	if o.st != nil && want.Paused != paused {
		var err error
		if want.Paused {
			err = o.sess.rt.Pause(call, c.id)
		} else {
			err = o.sess.rt.Resume(call, c.id)
		}
		if err != nil {
			return fmt.Errorf("pause or resume: %w", err)
		}
		c.event(map[bool]string{true: "pause", false: "unpause"}[want.Paused])
	}
	if !paused {
		return c.startCheck(ctx, want, o.sess)
	}
	return nil
}

// startCheck makes sure that a health check runs for this run of the container.
func (c *container) startCheck(ctx context.Context, want *v1.ContainerAssignment, sess *session) error {
	h := c.healthcheck(ctx, want)
	if h == nil {
		c.stopCheck()
		c.rec.Health = healthState{}
		return nil
	}
	key := hashProto(h)
	if c.check != nil && c.check.sess == sess && c.check.run == c.rec.Run && c.check.key == key {
		return nil
	}
	c.stopCheck()
	if c.rec.Health.Run != c.rec.Run || c.rec.Health.Health == v1.Health_HEALTH_UNSPECIFIED {
		c.rec.Health = healthState{Run: c.rec.Run, Health: v1.Health_HEALTH_STARTING}
		c.save()
	}
	hctx, cancel := context.WithCancel(sess.ctx)
	c.check = &healthRun{sess: sess, run: c.rec.Run, key: key, cancel: cancel}
	go c.checkLoop(hctx, sess, c.rec.Run, h, c.rec.StartedAt)
	return nil
}

// healthRun is a running loop of probes.
type healthRun struct {
	sess   *session
	run    int64
	key    string
	cancel context.CancelFunc
}

func (c *container) stopCheck() {
	if c.check != nil {
		c.check.cancel()
		c.check = nil
	}
}

// checkLoop probes until ctx ends and hands the results to the actor.
func (c *container) checkLoop(ctx context.Context, sess *session, run int64, h *v1.HealthCheck, started time.Time) {
	t := timesOf(h)
	clock := c.a.o.Clock
	state := v1.Health_HEALTH_STARTING
	for {
		select {
		case <-ctx.Done():
			return
		case <-clock.After(t.next(state, clock.Now().Sub(started))):
		}
		res, lost := probe(ctx, clock, sess.rt, c.id, h, t)
		if lost {
			return
		}
		if res.ok {
			state = v1.Health_HEALTH_HEALTHY
		}
		c.mu.Lock()
		c.results = append(c.results, probeOf{run, res})
		c.mu.Unlock()
		c.poke()
	}
}

// judge takes in the results of probes.
func (c *container) judge(want *v1.ContainerAssignment, results []probeOf) {
	r := c.rec
	for _, p := range results {
		if p.run != r.Run || !r.Running || want.Spec.Healthcheck == nil && c.check == nil {
			continue
		}
		t := timesOf(&v1.HealthCheck{})
		if c.check != nil && c.prepCheck != nil {
			t = timesOf(c.prepCheck)
		}
		old := r.Health
		r.Health = old.judge(t, p.res, p.res.at.Sub(r.StartedAt))
		if r.Health.Health != old.Health {
			c.event("health_status: " + healthName(r.Health.Health))
		}
		c.save()
	}
}

func healthName(h v1.Health) string {
	switch h {
	case v1.Health_HEALTH_HEALTHY:
		return "healthy"
	case v1.Health_HEALTH_UNHEALTHY:
		return "unhealthy"
	case v1.Health_HEALTH_STARTING:
		return "starting"
	}
	return "none"
}
