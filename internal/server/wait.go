package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

var errTimeout = errors.New("the time given is over")

// How long a bad state may last before waiting is given up.
const (
	patienceFailed    = 5 * time.Second  // the agent tries again meanwhile
	patienceUnhealthy = 30 * time.Second // a slow start may still come good
	patienceNoPlace   = 10 * time.Second
	patienceNoHost    = 30 * time.Second
	restartsTooMany   = 5
)

// waiter streams the progress of services until all of their containers do their
// work, or one of them can't.
type waiter struct {
	s        *Server
	project  string
	services map[string]bool
	from     uint64 // progress of agents from here on
	send     func(*v1.Progress) error

	last map[string]string    // id -> what was last said
	bad  map[string]time.Time // container and trouble -> since when
}

func (w *waiter) run(ctx context.Context) error {
	w.last, w.bad = map[string]string{}, map[string]time.Time{}
	s := w.s
	began := s.clock.Now()
	steps, next, moved := s.ctl.Hosts.Progress(w.from)
	for {
		_, changed := s.store.Changed()
		for _, p := range steps {
			if err := w.send(p); err != nil {
				return err
			}
		}
		done, err := w.look(ctx, began)
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), errTimeout) {
				return fmt.Errorf("project %s is not ready in time: %s: %w", w.project, w.pending(), context.DeadlineExceeded)
			}
			return ctx.Err()
		case <-s.store.Failed():
			return s.store.Err()
		case <-changed:
		case <-moved:
		case <-s.clock.After(time.Second):
		}
		steps, next, moved = s.ctl.Hosts.Progress(next)
	}
}

// say sends a step when it differs from what was said of the same thing.
func (w *waiter) say(id, action, msg string, done, failed bool) error {
	key := fmt.Sprint(action, "\x00", msg, done, failed)
	if w.last[id] == key {
		return nil
	}
	w.last[id] = key
	return w.send(&v1.Progress{Id: id, Action: action, Message: msg, Done: done, Failed: failed, At: timestamppb.New(w.s.clock.Now())})
}

// since says how long a trouble has lasted.
func (w *waiter) since(id, trouble string) time.Duration {
	k := id + "\x00" + trouble
	now := w.s.clock.Now()
	if w.bad[k].IsZero() {
		w.bad[k] = now
	}
	return now.Sub(w.bad[k])
}

func (w *waiter) well(id string) {
	for k := range w.bad {
		if strings.HasPrefix(k, id+"\x00") {
			delete(w.bad, k)
		}
	}
}

// look takes one look at everything.
func (w *waiter) look(ctx context.Context, began time.Time) (bool, error) {
	snap := w.s.store.Snapshot()
	machines := map[string]*v1.Machine{}
	for _, m := range snap.Machines {
		machines[m.Meta.Id] = m
	}
	all := true
	wanted := map[string]int{}
	hash := map[string]string{}
	for _, x := range snap.Services {
		if x.Meta.Project == w.project && w.services[x.Meta.Name] {
			wanted[x.Meta.Name], hash[x.Meta.Name] = int(x.Replicas), x.Hash
		}
	}
	shown := map[string]bool{}
	for _, c := range snap.Containers {
		if c.Meta.Project != w.project || !w.services[c.Service] || c.OneOff {
			continue
		}
		if c.Meta.Deleting || c.ServiceHash != hash[c.Service] {
			all = false
			if err := w.say(c.Meta.Name+" (old)", "stopping", "", false, false); err != nil {
				return false, err
			}
			continue
		}
		wanted[c.Service]--
		if m := machines[c.GetAssignment().GetMachineId()]; m != nil && !shown[m.Meta.Id] {
			shown[m.Meta.Id] = true
			if err := w.machine(m); err != nil {
				return false, err
			}
		}
		ok, err := w.container(ctx, c, snap, began)
		if err != nil {
			return false, err
		}
		all = all && ok
	}
	for id := range w.last {
		if name, ok := strings.CutSuffix(id, " (old)"); ok && !strings.Contains(w.last[id], "gone") {
			if !stillThere(snap.Containers, w.project, name, hash) {
				if err := w.say(id, "gone", "", true, false); err != nil {
					return false, err
				}
			}
		}
	}
	for _, n := range wanted {
		all = all && n == 0
	}
	return all, nil
}

func stillThere(cs []*v1.Container, project, name string, hash map[string]string) bool {
	for _, c := range cs {
		if c.Meta.Project == project && c.Meta.Name == name && (c.Meta.Deleting || c.ServiceHash != hash[c.Service]) {
			return true
		}
	}
	return false
}

func (w *waiter) machine(m *v1.Machine) error {
	st := m.GetStatus()
	id := "machine " + m.Meta.Name
	switch st.GetState() {
	case v1.MachineState_MACHINE_STATE_RUNNING:
		msg := sizeText(st.GetSize())
		if st.GetStartMethod() != "" {
			msg += fmt.Sprintf(", %s in %.1f s", map[string]string{"clone": "cloned", "boot": "booted"}[st.StartMethod], st.GetStartDuration().AsDuration().Seconds())
		}
		return w.say(id, "running", msg, true, false)
	case v1.MachineState_MACHINE_STATE_FAILED:
		return w.say(id, "failed", st.Message, false, true)
	case v1.MachineState_MACHINE_STATE_UNREACHABLE:
		return w.say(id, "not answering", st.Message, false, false)
	case v1.MachineState_MACHINE_STATE_STARTING:
		return w.say(id, "starting", st.Message, false, false)
	}
	return w.say(id, "waiting", st.GetMessage(), false, false)
}

// container says how one container is, whether that is what was asked for, and,
// as an error, that it never will be.
func (w *waiter) container(ctx context.Context, c *v1.Container, snap *store.Snapshot, began time.Time) (bool, error) {
	st := c.GetStatus()
	id := c.Meta.Name
	fail := func(format string, args ...any) error {
		msg := fmt.Sprintf(format, args...)
		w.say(id, "failed", msg, false, true)
		return fmt.Errorf("%s %s%s: %w", id, msg, w.s.lastLines(ctx, c), errdefs.ErrFailedPrecondition)
	}
	switch {
	case c.Stopped:
		return true, w.say(id, "created", "not started", true, false)
	case st.GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING && control.Ready(c):
		w.well(id)
		action := "running"
		if control.HasCheck(c) {
			action = "healthy"
		}
		return true, w.say(id, action, "", true, false)
	case control.Ended(c) && st.ExitCode == 0:
		return true, w.say(id, "completed", "", true, false)
	}
	switch st.GetState() {
	case v1.ContainerState_CONTAINER_STATE_RUNNING:
		if st.Health == v1.Health_HEALTH_UNHEALTHY {
			if w.since(id, "unhealthy") > patienceUnhealthy {
				return false, fail("is unhealthy: %s", oneLine(st.HealthOutput))
			}
			return false, w.say(id, "unhealthy", oneLine(st.HealthOutput), false, false)
		}
		return false, w.say(id, "starting", "waiting to be healthy", false, false)
	case v1.ContainerState_CONTAINER_STATE_EXITED:
		if !control.Ended(c) {
			break
		}
		why := ""
		if st.OomKilled {
			why = " (out of memory: raise its memory limit)"
		}
		return false, fail("ended with exit code %d%s", st.ExitCode, why)
	case v1.ContainerState_CONTAINER_STATE_RESTARTING:
		if st.RestartCount >= restartsTooMany {
			return false, fail("ends again and again, last with exit code %d", st.ExitCode)
		}
		return false, w.say(id, "restarting", fmt.Sprintf("ended with exit code %d", st.ExitCode), false, false)
	case v1.ContainerState_CONTAINER_STATE_FAILED:
		if w.since(id, "failed") > patienceFailed {
			return false, fail("could not start: %s", st.Message)
		}
		return false, w.say(id, "failing", st.Message, false, false)
	case v1.ContainerState_CONTAINER_STATE_UNKNOWN:
		return false, w.say(id, "unknown", st.Message, false, false)
	case v1.ContainerState_CONTAINER_STATE_CREATING:
		w.well(id)
		return false, w.say(id, "preparing", st.Message, false, false)
	}
	if c.GetAssignment().GetHostId() == "" {
		connected := len(w.s.ctl.Hosts.Connected()) > 0
		switch {
		case !connected && w.since(id, "no host") > patienceNoHost:
			return false, fmt.Errorf("no host is connected: start `tandem agent`: %w", errdefs.ErrUnavailable)
		case connected && st.GetMessage() != "" && w.since(id, "no place") > patienceNoPlace:
			w.say(id, "failed", st.Message, false, true)
			return false, fmt.Errorf("%s has %s: %w", id, st.Message, errdefs.ErrResourceExhausted)
		}
		return false, w.say(id, "waiting", st.GetMessage(), false, false)
	}
	w.well(id)
	msg := st.GetMessage()
	if on := w.s.ctl.WaitsFor(c, snap); on != "" {
		msg = "for " + on
	}
	return false, w.say(id, "waiting", msg, false, false)
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	return s[:min(len(s), 300)]
}

// pending says in a few words what is not ready.
func (w *waiter) pending() string {
	var out []string
	for _, c := range store.List[*v1.Container](w.s.store, w.project) {
		if w.services[c.Service] && !c.Meta.Deleting && !control.Ready(c) && !c.Stopped && !(control.Ended(c) && c.Status.ExitCode == 0) {
			out = append(out, fmt.Sprintf("%s is %s", c.Meta.Name, stateWord(c)))
		}
	}
	if len(out) == 0 {
		return "old containers are still stopping"
	}
	if len(out) > 5 {
		out = append(out[:5], fmt.Sprintf("and %d more", len(out)-5))
	}
	return strings.Join(out, ", ")
}

func stateWord(c *v1.Container) string {
	st := c.GetStatus()
	if st.GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING && st.Health == v1.Health_HEALTH_UNHEALTHY {
		return "unhealthy"
	}
	if st.GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING && st.Health == v1.Health_HEALTH_STARTING {
		return "not healthy yet"
	}
	return strings.ToLower(strings.TrimPrefix(st.GetState().String(), "CONTAINER_STATE_"))
}

// lastLines are the last lines of a container's log, for an error.
func (s *Server) lastLines(ctx context.Context, c *v1.Container) string {
	client, err := s.ctl.Hosts.Client(c.GetAssignment().GetHostId())
	if err != nil {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := client.Logs(ctx, connect.NewRequest(&v1.LogOptions{ContainerId: c.Meta.Id, Tail: 10}))
	if err != nil {
		return ""
	}
	defer st.Close()
	var b strings.Builder
	for n := 0; n < 10 && st.Receive(); n++ {
		l := strings.TrimRight(string(st.Msg().Line), "\r\n")
		fmt.Fprintf(&b, "\n    %s", l[:min(len(l), 500)])
	}
	if b.Len() == 0 {
		return ""
	}
	return "; its last output:" + b.String() + "\n"
}

// waitRemoved streams what is left of a project until it is gone.
func (s *Server) waitRemoved(ctx context.Context, r *v1.RemoveProjectRequest, send func(*v1.Progress) error) error {
	w := &waiter{s: s, project: r.Project, send: send, last: map[string]string{}}
	said := map[string]bool{}
	for {
		_, changed := s.store.Changed()
		snap := s.store.Snapshot()
		here := map[string]bool{}
		for _, c := range snap.Containers {
			if c.Meta.Project != r.Project {
				continue
			}
			here[c.Meta.Name], said[c.Meta.Name] = true, true
			action, msg := "waiting", "for those that need it"
			if c.Meta.Deleting {
				action, msg = "stopping", ""
				if st := c.GetStatus(); st.GetState() == v1.ContainerState_CONTAINER_STATE_UNKNOWN {
					msg = st.Message
				}
			}
			if err := w.say(c.Meta.Name, action, msg, false, false); err != nil {
				return err
			}
		}
		for n := range said {
			if !here[n] {
				if err := w.say(n, "removed", "", true, false); err != nil {
					return err
				}
			}
		}
		going := func(v *v1.Volume) bool { return v.Meta.Project == r.Project && v.Meta.Deleting }
		if _, err := store.Get[*v1.Project](s.store, projectKey(r.Project)); errdefs.IsNotFound(err) && !slices.ContainsFunc(snap.Volumes, going) {
			return send(&v1.Progress{Id: "project " + r.Project, Action: "removed", Done: true, At: timestamppb.New(s.clock.Now())})
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.store.Failed():
			return s.store.Err()
		case <-changed:
		}
	}
}
