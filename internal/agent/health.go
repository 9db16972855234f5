package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

// maxHealthOutput is what is kept of a probe's output, as in Docker.
const maxHealthOutput = 4096

// healthState is what is known of a container's health; it is kept in the
// container's record, so that a new agent does not start from nothing.
type healthState struct {
	Health v1.Health `json:"health,omitempty"`
	Streak int32     `json:"streak,omitempty"`
	Output string    `json:"output,omitempty"`
	Run    int64     `json:"run,omitempty"` // the run that it is about
}

// probeResult is the outcome of one probe.
type probeResult struct {
	ok     bool
	output string
	at     time.Time // when it began
}

// healthTimes are a check's times with Docker's defaults filled in.
type healthTimes struct {
	interval, timeout, startPeriod, startInterval time.Duration
	retries                                       int32
}

func timesOf(h *v1.HealthCheck) healthTimes {
	def := func(d *durationpb.Duration, v time.Duration) time.Duration {
		if d.AsDuration() <= 0 {
			return v
		}
		return d.AsDuration()
	}
	t := healthTimes{interval: def(h.Interval, 30*time.Second), timeout: def(h.Timeout, 30*time.Second),
		startPeriod: def(h.StartPeriod, 0), startInterval: def(h.StartInterval, 5*time.Second), retries: h.Retries}
	if t.retries <= 0 {
		t.retries = 3
	}
	t.startInterval = min(t.startInterval, t.interval)
	return t
}

// next is when to probe again, d after the last probe ended.
func (t healthTimes) next(st v1.Health, sinceStart time.Duration) time.Duration {
	if st == v1.Health_HEALTH_STARTING && sinceStart < t.startPeriod {
		return t.startInterval
	}
	return t.interval
}

// judge is Docker's rule: failures while it starts, within the start period,
// don't count; so many in a row make it unhealthy; one success makes it healthy.
func (h healthState) judge(t healthTimes, r probeResult, sinceStart time.Duration) healthState {
	h.Output = r.output
	switch {
	case r.ok:
		h.Health, h.Streak = v1.Health_HEALTH_HEALTHY, 0
	case h.Health == v1.Health_HEALTH_STARTING && sinceStart < t.startPeriod:
	default:
		h.Streak++
		if h.Streak >= t.retries {
			h.Health = v1.Health_HEALTH_UNHEALTHY
		}
	}
	return h
}

// probeArgs is what a check runs in the container.
func probeArgs(test []string) []string {
	if test[0] == "CMD-SHELL" {
		return []string{"/bin/sh", "-c", strings.Join(test[1:], " ")}
	}
	if test[0] == "CMD" {
		return test[1:]
	}
	return test
}

// probe runs a check once. lost says that the runtime could not be asked, which
// says nothing about the container.
func probe(ctx context.Context, clock Clock, rt runtime.Runtime, id string, h *v1.HealthCheck, t healthTimes) (r probeResult, lost bool) {
	r.at = clock.Now()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out := &boundedBuffer{max: maxHealthOutput}
	type end struct {
		code int
		err  error
	}
	done := make(chan end, 1)
	go func() {
		code, err := rt.Exec(ctx, &v1.ExecSpec{ContainerId: id, Args: probeArgs(h.Test), Timeout: durationpb.New(t.timeout)},
			runtime.Streams{Stdout: out, Stderr: out})
		done <- end{code, err}
	}()
	select {
	case e := <-done:
		if e.err != nil && ctx.Err() != nil {
			return r, true
		}
		r.ok = e.err == nil && e.code == 0
		r.output = out.String()
		if e.err != nil && !errors.Is(e.err, context.Canceled) {
			r.output = cut(e.err.Error(), maxHealthOutput)
		}
	case <-clock.After(t.timeout + 2*time.Second): // the runtime's own time-out comes first
		r.output = cut(fmt.Sprintf("the check did not end within %s", t.timeout)+"\n"+out.String(), maxHealthOutput)
	case <-ctx.Done():
		return r, true
	}
	return r, false
}

// boundedBuffer keeps the first max bytes written to it.
type boundedBuffer struct {
	mu  sync.Mutex
	max int
	buf bytes.Buffer
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := b.max - b.buf.Len(); room > 0 {
		b.buf.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func (b *boundedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.ToValidUTF8(b.buf.String(), "?")
}

// cut bounds a string that somebody else wrote, and makes it valid UTF-8.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "?")
}
