package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// prepared is what a container's creation needs, found once.
type prepared struct {
	fixed string
	spec  *v1.RuntimeSpec
}

// bring makes a container that does not run: image, disks, network, create,
// start. Each part begins as early as it can: the image is pulled and converted
// while the machine boots, disks are attached before the guest answers.
func (c *container) bring(ctx, soft context.Context, want *v1.ContainerAssignment, live string) error {
	c.phase = v1.ContainerState_CONTAINER_STATE_CREATING
	r := c.rec
	defer c.leased()
	if err := c.prepare(soft, want); err != nil {
		return err
	}
	if c.k.disks.running() {
		if err := c.k.disks.attachAll(soft, c.id); err != nil {
			return err
		}
	}
	o := c.k.observe(c.id)
	if o.sess == nil {
		c.phase = v1.ContainerState_CONTAINER_STATE_PENDING
		return waiting(c.k.String() + ": " + o.why)
	}
	done, err := o.sess.turn(soft)
	if err != nil {
		return err
	}
	defer done()
	call, cancel := context.WithTimeout(ctx, 2*c.a.o.Tuning.CallTimeout)
	defer cancel()
	stop := context.AfterFunc(o.sess.ctx, cancel)
	defer stop()
	if err := c.k.disks.mountAll(call, o.sess, c.id); err != nil {
		return err
	}
	made := o.st == nil || r.Anew && !r.Running
	if made {
		if err := c.create(call, want, o.sess, live); err != nil {
			return err
		}
	}
	if err := c.leased(); err != nil { // before it may run
		return fmt.Errorf("image %s: %w", want.Spec.Image, err)
	}
	if r.Machine == "" {
		if err := c.a.net.ready(call); err != nil {
			return fmt.Errorf("network of this host: %w", err)
		}
	}
	if want.Hold {
		c.phase = v1.ContainerState_CONTAINER_STATE_CREATED
		return nil
	}
	if made { // who attaches need not wait for the start
		c.attachable = true
		c.publish(want)
		c.attachable = false
	}
	if err := o.sess.awaitNetwork(soft); err != nil {
		return err
	}
	return c.start(call, want, o.sess, live)
}

// prepare finds the image and the disks, and merges them with the user's
// wishes. Everything it makes is held by the container's id.
func (c *container) prepare(ctx context.Context, want *v1.ContainerAssignment) error {
	r := c.rec
	if c.prep != nil && c.prep.fixed == r.Fixed {
		return nil
	}
	img, err := c.image(ctx, want)
	if err != nil {
		return err
	}
	if err := c.lease(ctx, img.Id); err != nil {
		return fmt.Errorf("image %s: %w", want.Spec.Image, err)
	}
	layers, err := c.a.o.Images.Layers(ctx, img.Id, c.progress)
	if err != nil {
		return fmt.Errorf("image %s: %w", want.Spec.Image, err)
	}
	vols, err := volumesOf(want, img.Config)
	if err != nil {
		return err
	}
	for i, v := range vols { // what it has already stays, whatever it is called
		if k := slices.IndexFunc(r.Volumes, func(o volumeUse) bool { return o.Anonymous && o.Target == v.Target }); v.Anonymous && k >= 0 {
			vols[i].ID = r.Volumes[k].ID
		}
	}
	var disks []disk
	var names []string
	for _, l := range layers {
		name := layerDisk(l.DiffID)
		names = append(names, name)
		if !slices.ContainsFunc(disks, func(d disk) bool { return d.Name == name }) {
			disks = append(disks, disk{Name: name, Path: l.Path, FSType: l.FSType, ReadOnly: true})
		}
	}
	for _, v := range vols {
		size := c.a.o.Tuning.AnonymousSize
		if !v.Anonymous {
			if size, err = c.a.volumeSize(v.ID); err != nil {
				return fmt.Errorf("volume for %s: %w", v.Target, err)
			}
		}
		vol, err := c.a.o.Volumes.Ensure(ctx, v.ID, size)
		if err != nil {
			return fmt.Errorf("volume for %s: %w", v.Target, err)
		}
		// A disk is writable for all its users in one kernel; read_only is the mount's.
		d := disk{Name: volumeDisk(v.ID), Path: vol.Path, FSType: "ext4", Volume: v.ID}
		if !slices.ContainsFunc(disks, func(have disk) bool { return have.Name == d.Name }) {
			disks = append(disks, d)
		}
	}
	nets, err := c.a.networkSpecs(want)
	if err != nil {
		return err
	}
	spec, err := runtimeSpec(want, img.Config, names, vols, nets)
	if err != nil {
		return err
	}
	stale := slices.DeleteFunc(slices.Clone(r.Volumes), func(v volumeUse) bool {
		return !v.Anonymous || slices.ContainsFunc(vols, func(n volumeUse) bool { return n.ID == v.ID })
	})
	c.setImage(img)
	r.Image, r.Disks, r.Volumes, r.Machine = img.Id, disks, vols, want.MachineId
	c.save()
	c.k.disks.hold(c.id, disks)
	for _, v := range stale {
		if err := c.a.o.Volumes.Remove(ctx, v.ID); err != nil && !errdefs.IsNotFound(err) {
			c.log.Warn("an anonymous volume that is not used any more stays", "volume", v.ID, "error", err)
		}
	}
	c.prep = &prepared{fixed: r.Fixed, spec: spec}
	return nil
}

// lease keeps the image for the container. Nothing has to wait until that is on the
// disk but the start: see leased.
func (c *container) lease(ctx context.Context, image string) (err error) {
	if err := c.leased(); err != nil { // an earlier one, of a step that was given up
		return err
	}
	c.leasing, err = c.a.o.Images.LeaseSoon(ctx, c.id, image)
	return err
}

// leased returns when the lease that was begun, if any, is on the disk.
func (c *container) leased() error {
	if c.leasing == nil {
		return nil
	}
	err := c.leasing()
	c.leasing = nil
	if err != nil {
		c.prep = nil // from the beginning, with the image as it is then
	}
	return err
}

// image finds the container's image, by the pull policy when it is new.
func (c *container) image(ctx context.Context, want *v1.ContainerAssignment) (*v1.Image, error) {
	if c.rec.Image != "" { // chosen already: it stays the same until the container is replaced
		img, err := c.a.o.Images.Get(ctx, c.rec.Image)
		if err == nil {
			return img, nil
		}
		if !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("image %s: %w", want.Spec.Image, err)
		}
	}
	return c.a.images.ensure(ctx, want.Spec.Image, want.Spec.Platform, want.Spec.PullPolicy, func() {
		c.message = "pulling image " + want.Spec.Image
		c.publish(want)
	})
}

func (c *container) progress(p *v1.Progress) { c.a.hub.setProgress(p) }

// setImage keeps what the image says of the container's health.
func (c *container) setImage(img *v1.Image) {
	c.imageConfig, c.imageOf = img.Config, img.Id
	if c.imageConfig == nil {
		c.imageConfig = &v1.ImageConfig{}
	}
}

// healthcheck is the container's check, or nil.
func (c *container) healthcheck(ctx context.Context, want *v1.ContainerAssignment) *v1.HealthCheck {
	if c.imageConfig == nil || c.imageOf != c.rec.Image {
		img, err := c.a.o.Images.Get(ctx, c.rec.Image)
		if err != nil {
			img = &v1.Image{Id: c.rec.Image} // the user's check still counts
		}
		c.setImage(img)
	}
	c.prepCheck = mergeHealth(want.Spec, c.imageConfig)
	return c.prepCheck
}

// create makes the container in the runtime.
func (c *container) create(ctx context.Context, want *v1.ContainerAssignment, sess *session, live string) error {
	r := c.rec
	spec := proto.Clone(c.prep.spec).(*v1.RuntimeSpec)
	spec.Resources = want.Spec.Resources
	spec.Name = want.Name
	r.Made, r.Live, r.Failure = true, live, ""
	c.save()
	err := sess.rt.Create(ctx, spec)
	if errdefs.IsAlreadyExists(err) {
		// Left by a creation that was cut short: nobody knows how far it came.
		if err = sess.rt.Delete(ctx, c.id, true); err == nil {
			err = sess.rt.Create(ctx, spec)
		}
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	r.Anew = false
	c.k.created(c.id)
	c.event("create")
	return nil
}

// start starts it. That it runs is written down first.
func (c *container) start(ctx context.Context, want *v1.ContainerAssignment, sess *session, live string) error {
	r := c.rec
	if st := c.k.observe(c.id).st; st.GetState() == v1.ContainerState_CONTAINER_STATE_EXITED {
		r.LastExit = exitToken(st)
	}
	if r.Live != live { // changed while it did not run
		if err := sess.rt.Update(ctx, c.id, want.Spec.Resources); err != nil {
			if !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotImplemented(err) {
				return fmt.Errorf("change limits: %w", err)
			}
			if err := c.scrap(ctx, sess); err != nil { // the runtime can't change what rests: make it anew
				return err
			}
			return c.bringAgain(ctx, want, sess, live)
		}
		r.Live = live
	}
	r.Running, r.Boot, r.StartedAt, r.Done, r.Failure = true, sess.boot, c.a.o.Clock.Now(), false, ""
	r.Run++
	r.NextStart = r.NextStart.Truncate(0)
	r.Health = healthState{}
	c.startedIn, c.unsure = sess, false
	c.save()
	err := sess.rt.Start(ctx, c.id)
	if errdefs.IsNotFound(err) && !c.inRuntime(ctx, sess) {
		c.k.forget(c.id)
		r.Running = false
		return c.bringAgain(ctx, want, sess, live)
	}
	if err != nil {
		return c.startFailed(want, sess, err)
	}
	c.event("start")
	return c.tend(ctx, want, live)
}

// inRuntime asks whether the container exists at all.
func (c *container) inRuntime(ctx context.Context, sess *session) bool {
	list, err := sess.rt.List(ctx)
	return err != nil || slices.ContainsFunc(list, func(st *v1.RuntimeStatus) bool { return st.GetId() == c.id })
}

// bringAgain creates and starts what the runtime has lost.
func (c *container) bringAgain(ctx context.Context, want *v1.ContainerAssignment, sess *session, live string) error {
	if err := c.create(ctx, want, sess, live); err != nil {
		return err
	}
	return waitAgain(c)
}

// waitAgain lets the next step, at once, do the rest.
func waitAgain(c *container) error {
	c.poke()
	return waiting("its start")
}

// startFailed tells what can't run (a command that is not there) from what
// could not be done now. Docker's rule: the former rests unless its policy is to
// be always tried again.
func (c *container) startFailed(want *v1.ContainerAssignment, sess *session, err error) error {
	r := c.rec
	r.Running = false
	if sess.ctx.Err() != nil || errors.Is(err, context.Canceled) || errdefs.IsUnavailable(err) || errdefs.IsDeadlineExceeded(err) || errors.Is(err, context.DeadlineExceeded) {
		// Whether it runs is not known; the runtime tells, in this session or the next.
		r.Running, c.unsure = true, true
		c.startedIn = nil
		if sess.ctx.Err() == nil { // it answers late, or not to this call: ask again
			return fmt.Errorf("start: %w", err)
		}
		return waiting(c.k.String() + ", which was lost while it started: " + cut(err.Error(), 512))
	}
	r.FinishedAt, r.ExitCode = c.a.o.Clock.Now(), 128
	switch {
	case errdefs.IsNotFound(err):
		r.ExitCode = 127
	case errdefs.IsPermissionDenied(err), errdefs.IsInvalidArgument(err):
		r.ExitCode = 126
	}
	c.event("die", "exitCode", fmt.Sprint(r.ExitCode), "reason", "start failed")
	if shouldRestart(want.Spec.Restart, exitInfo{Code: r.ExitCode}, r.Restarts) {
		r.Restarts++
		c.save()
		return fmt.Errorf("start: %w", err)
	}
	r.Done, r.Failure = true, "start: "+cut(err.Error(), 2000)
	c.save()
	return nil
}

// scrap deletes the container from the runtime, but keeps its disks.
func (c *container) scrap(ctx context.Context, sess *session) error {
	if err := sess.rt.Delete(ctx, c.id, true); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete: %w", err)
	}
	c.k.forget(c.id)
	return nil
}
