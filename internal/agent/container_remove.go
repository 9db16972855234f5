package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
)

// dismantle takes a container out of its kernel: stop, delete, unmount, detach.
func (c *container) dismantle(ctx context.Context, want *v1.ContainerAssignment) error {
	r := c.rec
	c.stopCheck()
	k := c.a.kernel(r.Machine)
	if k == nil { // its machine is gone, and all that was in it
		return nil
	}
	if c.k != k {
		if err := c.joinKernel(r.Machine); err != nil {
			return err
		}
	}
	o := k.observe(c.id)
	if o.sess == nil && !o.gone && k.mayRun() {
		return waiting(k.String() + ", to remove it there: " + o.why)
	}
	if o.sess == nil && want == nil {
		// Nobody can be asked to remove it there. A session that opens from now on
		// does that by itself; one that opened just now is asked.
		c.leaving.Store(true)
		o = k.observe(c.id)
	}
	if o.sess != nil && (o.st != nil || r.Made) {
		if r.Running {
			if err := c.stop(ctx, want, o); err != nil {
				return err
			}
		}
		call, cancel := context.WithTimeout(ctx, c.a.o.Tuning.CallTimeout)
		defer cancel()
		if err := c.scrap(call, o.sess); err != nil {
			return err
		}
	}
	if err := k.disks.release(ctx, o.sess, c.id); err != nil {
		return err
	}
	if r.Machine != "" {
		c.a.pokeMachine(r.Machine) // it detaches unused layers in time
	}
	r.Running, r.Made = false, false
	return nil
}

// replace removes the container so that it is made anew by another spec. Its
// anonymous volumes stay for the new one.
func (c *container) replace(ctx context.Context, want *v1.ContainerAssignment) error {
	c.phase = v1.ContainerState_CONTAINER_STATE_CREATING
	if err := c.dismantle(ctx, want); err != nil {
		return err
	}
	old := c.rec
	c.rec = &containerRecord{Name: old.Name, Project: old.Project, Volumes: old.Volumes, Anew: true, RestartGen: want.RestartGeneration,
		CreatedAt: c.a.o.Clock.Now(), Run: old.Run}
	c.prep, c.startedIn, c.unsure = nil, nil, false
	c.save()
	return nil
}

// remove makes the container and everything that was made for it be gone.
func (c *container) remove(ctx context.Context) error {
	c.phase = v1.ContainerState_CONTAINER_STATE_REMOVING
	if c.rec == nil {
		c.rec = &containerRecord{}
	}
	r := c.rec
	c.publish(nil)
	if err := c.dismantle(ctx, nil); err != nil {
		return err
	}
	if err := c.a.o.Images.Release(ctx, c.id); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("release the image: %w", err)
	}
	for _, v := range r.Volumes {
		if !v.Anonymous {
			continue
		}
		if err := c.a.o.Volumes.Unuse(ctx, v.ID, volumeHolder(r.Machine)); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove anonymous volume %s: %w", v.ID, err)
		}
		if err := c.a.o.Volumes.Remove(ctx, v.ID); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove anonymous volume %s: %w", v.ID, err)
		}
	}
	if err := c.a.state.remove("containers/" + c.id + ".json"); err != nil {
		return err
	}
	c.event("destroy")
	c.a.hub.removeContainer(c.id)
	c.a.dropContainer(c)
	return nil
}

// volumeHolder is the name under which a kernel holds volumes.
func volumeHolder(machine string) string {
	if machine == "" {
		return "metal"
	}
	return machine
}

// publish tells the hub what is seen now.
func (c *container) publish(want *v1.ContainerAssignment) {
	r := c.rec
	if r == nil {
		return
	}
	st := &v1.ContainerStatus{
		Id: c.id, Message: c.message, RestartCount: r.Restarts, ImageId: r.Image, HostId: c.a.hostID, MachineId: r.Machine,
		Ip: want.GetIp(), Attachable: c.attachable, ObservedGeneration: r.Generation, ObservedRestartGeneration: r.RestartGen,
	}
	st.AnonymousVolumes = slices.ContainsFunc(r.Volumes, func(v volumeUse) bool { return v.Anonymous })
	if list := want.GetAddresses(); len(list) > 1 {
		for _, x := range list {
			st.Ips = append(st.Ips, x.Ip)
		}
	}
	if !r.CreatedAt.IsZero() {
		st.CreatedAt = timestamppb.New(r.CreatedAt)
	}
	if r.Run > 0 && !r.StartedAt.IsZero() {
		st.StartedAt = timestamppb.New(r.StartedAt)
	}
	if !r.FinishedAt.IsZero() {
		st.FinishedAt = timestamppb.New(r.FinishedAt)
		st.ExitCode, st.OomKilled = r.ExitCode, r.OOM
	}
	switch {
	case want == nil:
		st.State = v1.ContainerState_CONTAINER_STATE_REMOVING
	case r.Running:
		c.publishRunning(st)
	case c.phase == v1.ContainerState_CONTAINER_STATE_FAILED:
		st.State = c.phase
	case r.Failure != "" && r.Done:
		st.State, st.Message = v1.ContainerState_CONTAINER_STATE_FAILED, r.Failure
	case r.Done, r.Stopped && !r.FinishedAt.IsZero():
		st.State = v1.ContainerState_CONTAINER_STATE_EXITED
	case c.phase != v1.ContainerState_CONTAINER_STATE_UNSPECIFIED:
		st.State = c.phase
	case r.Stopped:
		st.State = v1.ContainerState_CONTAINER_STATE_CREATED
	default:
		st.State = v1.ContainerState_CONTAINER_STATE_PENDING
	}
	c.a.hub.setContainer(st)
}

// publishRunning fills in what the runtime says of a running container. While
// a machine is only being reached again, what was known last stays.
func (c *container) publishRunning(st *v1.ContainerStatus) {
	st.State = v1.ContainerState_CONTAINER_STATE_RUNNING
	st.ExitCode, st.OomKilled, st.FinishedAt = 0, false, nil
	st.Health, st.FailingStreak, st.HealthOutput = c.rec.Health.Health, c.rec.Health.Streak, c.rec.Health.Output
	if c.k == nil {
		return
	}
	o := c.k.observe(c.id)
	switch {
	case c.unsure:
		st.State = v1.ContainerState_CONTAINER_STATE_CREATING
	case o.down:
		st.State = v1.ContainerState_CONTAINER_STATE_UNKNOWN
		st.Message = first(st.Message, o.why)
	case o.st.GetState() == v1.ContainerState_CONTAINER_STATE_PAUSED:
		st.State = v1.ContainerState_CONTAINER_STATE_PAUSED
	}
	if o.st != nil && o.st.State != v1.ContainerState_CONTAINER_STATE_EXITED {
		st.Pid = o.st.Pid
		if o.st.StartedAt != nil && o.st.State != v1.ContainerState_CONTAINER_STATE_CREATED {
			st.StartedAt = o.st.StartedAt
		}
	}
}

// isWait tells an actor's wait from a failure.
func isWait(err error) bool { return errors.Is(err, errWait) }
