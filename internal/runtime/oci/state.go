package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/monitor"
)

var idPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,63}$`)

// record is what is kept of a container beside its spec.
type record struct {
	Run        uint64    `json:"run"`     // of the latest start asked for
	Pending    bool      `json:"pending"` // what became of it is not known yet
	Boot       string    `json:"boot"`
	Started    bool      `json:"started"` // the latest start ran
	Ended      bool      `json:"ended"`   // ... and is over
	ExitCode   int       `json:"exit_code"`
	OOMKilled  bool      `json:"oom_killed"`
	CreatedAt  time.Time `json:"created_at"`
	StartedAt  time.Time `json:"started_at"`
	FinishedAt time.Time `json:"finished_at"`
}

type container struct {
	id string
	op sync.Mutex // one change at a time; see lock

	linking <-chan struct{} // closed when its network is prepared; guarded by op

	// Guarded by Runtime.mu.
	spec    *v1.RuntimeSpec // without secrets' content
	ready   *specs.Spec     // what Create found, for the first start
	rec     record
	pid     int
	paused  bool
	stopped chan struct{} // closed when the present run has ended
	deleted bool
	wiping  bool // Delete is at it: nothing is written any more
	unsaved bool // the record on disk is not the last; see saveSoon
}

// state as the contract names it; the caller holds Runtime.mu.
func (c *container) state() v1.ContainerState {
	switch {
	case c.rec.Started && !c.rec.Ended && c.paused:
		return v1.ContainerState_CONTAINER_STATE_PAUSED
	case c.rec.Started && !c.rec.Ended:
		return v1.ContainerState_CONTAINER_STATE_RUNNING
	case c.rec.Ended:
		return v1.ContainerState_CONTAINER_STATE_EXITED
	}
	return v1.ContainerState_CONTAINER_STATE_CREATED
}

func (c *container) running() bool { return c.rec.Started && !c.rec.Ended }

func (c *container) snapshot() *v1.RuntimeStatus {
	s := &v1.RuntimeStatus{
		Id: c.id, State: c.state(), ExitCode: int32(c.rec.ExitCode), OomKilled: c.rec.OOMKilled,
		CreatedAt: stamp(c.rec.CreatedAt), StartedAt: stamp(c.rec.StartedAt), FinishedAt: stamp(c.rec.FinishedAt),
		Labels: c.spec.GetLabels(),
	}
	if c.running() {
		s.Pid = int64(c.pid)
	}
	return s
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func now(c Clock) *timestamppb.Timestamp { return timestamppb.New(c.Now()) }

const (
	fileSpec   = "spec.pb" // its presence makes a directory a container
	fileRecord = "record.json"
)

// saveDelay is how long a record may wait to be written.
const saveDelay = 100 * time.Millisecond

// saveSoon writes the record a moment later, when nobody waits for the container. What
// it says the monitor says as well, for as long as the kernel lives; and what a kernel
// has not written when it dies is lost in any case. The caller holds Runtime.mu.
func (r *Runtime) saveSoon(c *container) {
	if c.unsaved {
		return
	}
	c.unsaved = true
	time.AfterFunc(saveDelay, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.flush(c)
	})
}

// flush writes what saveSoon has left; the caller holds Runtime.mu.
func (r *Runtime) flush(c *container) {
	if !c.unsaved || c.wiping || c.deleted {
		return
	}
	if err := r.save(c); err != nil {
		r.log.Error("keep a container's state", "container", c.id, "error", err)
	}
}

// save writes the record; the caller holds Runtime.mu.
func (r *Runtime) save(c *container) error {
	c.unsaved = false
	b, err := json.Marshal(&c.rec)
	if err == nil {
		err = replaceFile(filepath.Join(r.stateDir(c.id), fileRecord), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("state of container %s: %w", c.id, err)
	}
	return nil
}

func replaceFile(path string, b []byte, mode fs.FileMode) error {
	if err := os.WriteFile(path+".new", b, mode); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// get finds a container; the caller does not hold mu.
func (r *Runtime) get(id string) (*container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.getLocked(id)
}

func (r *Runtime) getLocked(id string) (*container, error) {
	c := r.ctrs[id]
	if c == nil || c.deleted {
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// lock takes the op lock, and waits for what Create has left to be done.
func (c *container) lock() {
	c.op.Lock()
	c.linked()
}

// linked returns when nobody prepares the container's network any more; the caller
// has the op lock.
func (c *container) linked() {
	if c.linking != nil {
		<-c.linking
		c.linking = nil
	}
}

// hold finds a container and takes its op lock.
func (r *Runtime) hold(id string) (*container, error) {
	c, err := r.get(id)
	if err != nil {
		return nil, err
	}
	c.lock()
	r.mu.Lock()
	gone := c.deleted
	r.mu.Unlock()
	if gone {
		c.op.Unlock()
		return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// loadContainers reads what earlier processes kept and removes half-made ones.
func (r *Runtime) loadContainers() error {
	es, err := os.ReadDir(r.stateDir(""))
	if err != nil {
		return fmt.Errorf("runtime: %w", err)
	}
	for _, e := range es {
		id := e.Name()
		if !idPattern.MatchString(id) {
			r.log.Warn("not a container: left alone", "path", r.stateDir(id))
			continue
		}
		c, err := r.loadContainer(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // half-made: sweep removes it
		}
		if err != nil {
			return fmt.Errorf("container %s: its record can't be read; move %s away to go on without it: %w: %w",
				id, r.stateDir(id), err, errdefs.ErrDataLoss)
		}
		r.ctrs[id] = c
	}
	return nil
}

func (r *Runtime) loadContainer(id string) (*container, error) {
	b, err := os.ReadFile(filepath.Join(r.stateDir(id), fileSpec))
	if err != nil {
		return nil, err
	}
	c := &container{id: id, spec: &v1.RuntimeSpec{}, stopped: make(chan struct{})}
	if err := proto.Unmarshal(b, c.spec); err != nil || c.spec.Id != id {
		return nil, fmt.Errorf("spec: %w", errors.Join(err, errdefs.ErrDataLoss))
	}
	b, err = os.ReadFile(filepath.Join(r.stateDir(id), fileRecord))
	if err == nil {
		err = json.Unmarshal(b, &c.rec)
	} else if errors.Is(err, fs.ErrNotExist) { // it has never run
		var st fs.FileInfo
		if st, err = os.Stat(filepath.Join(r.stateDir(id), fileSpec)); err == nil {
			c.rec.CreatedAt = st.ModTime()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("record: %w", errors.Join(err, errdefs.ErrDataLoss))
	}
	if c.rec.Ended {
		close(c.stopped)
	}
	if frozen, err := r.cg.Group(r.cgroupPath(id)).Frozen(); err == nil {
		c.paused = frozen
	}
	return c, nil
}

// apply takes one message of the monitor into account.
func (r *Runtime) apply(st monitor.Status) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.ctrs[st.ID]
	if c == nil || st.Run < c.rec.Run || st.State == monitor.Gone {
		return
	}
	c.rec.Run, c.rec.Pending = st.Run, st.State == monitor.Starting
	switch st.State {
	case monitor.Running:
		r.markStarted(c, st)
		if st.OOMKills > 0 && !c.rec.OOMKilled && c.running() {
			c.rec.OOMKilled = true
			r.publish("oom", c)
		}
	case monitor.Exited:
		if st.Failed {
			// A start that never ran leaves the state before it, unless a process
			// was promised already.
			if c.running() {
				r.markEnded(c, st)
			}
			return
		}
		if !c.running() && c.rec.Ended && c.rec.FinishedAt.Equal(st.FinishedAt) {
			return
		}
		r.markStarted(c, st)
		r.markEnded(c, st)
	}
}

// markStarted and markEnded change the state; the caller holds mu.
func (r *Runtime) markStarted(c *container, st monitor.Status) {
	if c.running() || c.rec.Ended && c.rec.Run == st.Run && c.rec.StartedAt.Equal(st.StartedAt) {
		if c.pid == 0 {
			c.pid = st.PID
		}
		return
	}
	if c.rec.Ended || c.stopped == nil {
		c.stopped = make(chan struct{})
	}
	c.rec.Started, c.rec.Ended, c.rec.ExitCode, c.rec.OOMKilled = true, false, 0, false
	c.rec.StartedAt, c.rec.FinishedAt, c.rec.Boot = st.StartedAt, time.Time{}, bootID()
	c.pid, c.paused = st.PID, false
	r.saveSoon(c)
	r.publish("start", c)
}

func (r *Runtime) markEnded(c *container, st monitor.Status) {
	c.rec.Ended, c.rec.ExitCode, c.rec.FinishedAt = true, st.ExitCode, st.FinishedAt
	if st.OOMKills > 0 && !c.rec.OOMKilled {
		c.rec.OOMKilled = true
		r.publish("oom", c)
	}
	c.pid, c.paused = 0, false
	r.saveSoon(c)
	close(c.stopped)
	r.publish("exit", c)
	if r.o.Endpoint != nil {
		time.AfterFunc(unlinkDelay, func() { r.unlink(c) })
	}
}

// unlinkDelay lets the word of a container's end go first, and a start or Delete that
// follows at once have the link.
const unlinkDelay = 200 * time.Millisecond

// unlink takes the network of a container that has ended; the next start makes
// it anew. Nobody waits for it: a failure is mended by Delete.
func (r *Runtime) unlink(c *container) {
	select {
	case <-r.done: // closed: whoever opens it next takes it over as it is
		return
	default:
	}
	c.lock()
	defer c.op.Unlock()
	r.mu.Lock()
	idle := !c.running() && !c.deleted
	r.mu.Unlock()
	if !idle {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := r.o.Endpoint.Teardown(ctx, c.id); err != nil {
		r.log.Warn("take down the network of an ended container", "container", c.id, "error", err)
	}
}

// lost ends what was running for us and is unknown to the monitor: the kernel
// was booted since, or the monitor's directory is gone.
func (r *Runtime) lost(before []string, seen map[string]bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, id := range before {
		if c := r.ctrs[id]; c != nil && c.running() && !seen[id] {
			r.markEnded(c, monitor.Status{ExitCode: monitor.ExitUnknown, FinishedAt: r.clock.Now()})
		}
	}
}

func (r *Runtime) runningIDs() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for id, c := range r.ctrs {
		if c.running() {
			ids = append(ids, id)
		}
	}
	return ids
}

// sweep removes what belongs to no container: a create or delete that was cut
// off, processes and groups without a record.
func (r *Runtime) sweep(ctx context.Context) {
	var ids []string
	for _, dir := range []string{r.stateDir(""), r.runDir(""), r.runcRoot()} {
		es, _ := os.ReadDir(dir)
		for _, e := range es {
			ids = append(ids, e.Name())
		}
	}
	ids = append(ids, r.cg.Children(r.o.CgroupParent)...)
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		r.mu.Lock()
		known := r.ctrs[id] != nil
		r.mu.Unlock()
		if known || !idPattern.MatchString(id) {
			continue
		}
		r.log.Info("removing what is left of a container", "container", id)
		if err := r.wipe(ctx, id); err != nil {
			r.log.Error("remove what is left of a container", "container", id, "error", err)
		}
	}
}

// wipe removes every trace of an id: processes, link, mounts, files. It goes on
// after errors and may be repeated.
func (r *Runtime) wipe(ctx context.Context, id string) error {
	var errs []error
	g := r.cg.Group(r.cgroupPath(id))
	errs = append(errs, g.Kill(ctx))
	for try := 0; ; try++ { // the monitor sees the end a moment later
		err := r.o.Monitor.Forget(ctx, id)
		if errdefs.IsFailedPrecondition(err) && try < 100 && ctx.Err() == nil {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		errs = append(errs, err)
		break
	}
	errs = append(errs, g.Remove(ctx), os.RemoveAll(filepath.Join(r.runcRoot(), id)))
	if r.o.Endpoint != nil {
		errs = append(errs, r.o.Endpoint.Teardown(ctx, id))
	}
	if err := unmountBelow(r.runDir(id)); err != nil {
		return errors.Join(append(errs, err)...) // never delete through a mount
	}
	errs = append(errs, os.RemoveAll(r.runDir(id)))
	// The spec goes first: from then on it is no container any more.
	if err := os.Remove(filepath.Join(r.stateDir(id), fileSpec)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	errs = append(errs, os.RemoveAll(r.stateDir(id)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	return nil
}

// unmountBelow unmounts all mount points in dir, last first.
func unmountBelow(dir string) error {
	points, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for i := len(points) - 1; i >= 0; i-- {
		if err := unix.Unmount(points[i], unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			if err = unix.Unmount(points[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return fmt.Errorf("unmount %s: %w", points[i], err)
			}
		}
	}
	return nil
}
