package agent

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/volume"
)

// volumeKeeper makes the disks of named volumes and removes those that it is told
// to remove by name, with scratch disks and leases whose owner is gone.
type volumeKeeper struct {
	a      *Agent
	wake   chan struct{}
	warned map[string]bool // disks that nobody speaks of, and that was said
}

func newVolumeKeeper(a *Agent) *volumeKeeper {
	return &volumeKeeper{a: a, wake: make(chan struct{}, 1), warned: map[string]bool{}}
}

func (v *volumeKeeper) kick() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

func (v *volumeKeeper) run(ctx context.Context) {
	var retry backoff
	var timer <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-v.wake:
		case <-timer:
		}
		timer = nil
		if err := v.reconcile(ctx); err != nil && ctx.Err() == nil {
			wait := retry.next(v.a.o.Tuning.RetryDelay, v.a.o.Tuning.RetryDelayMax)
			v.a.log.Info("volumes", "error", err, "retry", wait)
			timer = v.a.o.Clock.After(wait)
		} else {
			retry.reset()
		}
	}
}

// reconcile goes once over all disks. Nothing is removed before a spec was ever
// received: an agent without intent knows nothing. A volume that the spec does not
// speak of is kept: only deleted_volumes removes data.
func (v *volumeKeeper) reconcile(ctx context.Context) error {
	a := v.a
	spec := a.current()
	if spec == nil {
		return nil
	}
	var failed error
	want := map[string]bool{}
	for _, w := range spec.Volumes {
		want[w.Id] = true
		size := w.SizeBytes
		if size <= 0 {
			size = a.o.Tuning.AnonymousSize
		}
		st := &v1.VolumeStatus{Id: w.Id, SizeBytes: size}
		vol, err := a.o.Volumes.Ensure(ctx, w.Id, size)
		if err != nil {
			st.Message = cut(err.Error(), 1024)
			if !errdefs.IsInvalidArgument(err) {
				failed = err
			}
		} else {
			st.Ready, st.SizeBytes, st.UsedBytes = true, vol.SizeBytes, vol.UsedBytes
		}
		a.hub.setVolume(st)
	}
	deleted := map[string]bool{}
	for _, id := range spec.DeletedVolumes {
		deleted[id] = true
	}
	a.hub.forgetVolumes(want, deleted)
	have, err := a.o.Volumes.List(ctx)
	if err != nil {
		return err
	}
	left := map[string]bool{}
	owners := a.anonymous() // after the list: who made what is in it is among them, or gone
	for _, vol := range have {
		machine, scratch := strings.CutPrefix(vol.ID, "scratch-")
		switch {
		case want[vol.ID]:
		case strings.HasPrefix(vol.ID, "anon-"):
			// It goes with its container, which removes it by itself unless that was cut short.
			if owner, ok := anonymousOwner(vol.ID); ok && !spec.Incomplete && !owners[owner] {
				if err := v.orphan(ctx, vol); err != nil {
					failed = err
				}
			}
		case deleted[vol.ID]:
			if err := a.o.Volumes.Remove(ctx, vol.ID); err != nil && !errdefs.IsNotFound(err) {
				failed, left[vol.ID] = err, true // in use: its container is still ending
				a.hub.setVolume(&v1.VolumeStatus{Id: vol.ID, SizeBytes: vol.SizeBytes, Message: cut("to be removed: "+err.Error(), 1024)})
				continue
			}
			a.log.Info("removed a volume", "volume", vol.ID)
		case !scratch:
			if !v.warned[vol.ID] {
				v.warned[vol.ID] = true
				a.log.Warn("this host has a volume that the server does not speak of; it is kept", "volume", vol.ID, "path", vol.Path)
			}
		case !spec.Incomplete && a.kernel(machine) == nil:
			if err := a.o.Volumes.Unuse(ctx, vol.ID, machine); err != nil && !errdefs.IsNotFound(err) {
				failed = err
				continue
			}
			if err := a.o.Volumes.Remove(ctx, vol.ID); err != nil && !errdefs.IsNotFound(err) {
				failed = err
				continue
			}
			a.log.Info("removed the scratch disk of a machine that is no more", "volume", vol.ID)
		}
	}
	for id := range deleted {
		if !left[id] {
			a.hub.removeVolume(id)
		}
	}
	if err := v.leases(ctx); err != nil {
		failed = err
	}
	return failed
}

// orphan removes an anonymous volume whose container is gone: an agent was killed
// before it wrote down that it had made it, or the container's record was lost.
func (v *volumeKeeper) orphan(ctx context.Context, vol volume.Volume) error {
	if vol.Holder != "" {
		machine := vol.Holder
		if machine == volumeHolder("") {
			machine = ""
		}
		if err := v.letGo(ctx, vol, machine); err != nil {
			return fmt.Errorf("anonymous volume %s of a container that is gone: %w", vol.ID, err)
		}
	}
	if err := v.a.o.Volumes.Remove(ctx, vol.ID); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("anonymous volume %s of a container that is gone: %w", vol.ID, err)
	}
	v.a.log.Info("removed an anonymous volume whose container is gone", "volume", vol.ID)
	return nil
}

// letGo takes a volume that no container holds out of a kernel.
func (v *volumeKeeper) letGo(ctx context.Context, vol volume.Volume, machine string) error {
	k := v.a.kernel(machine)
	if k == nil { // and so is the machine
		if err := v.a.o.Volumes.Unuse(ctx, vol.ID, vol.Holder); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		return nil
	}
	sess := k.observe("").sess
	if sess == nil && k.mayRun() {
		return fmt.Errorf("%s can't be asked to let go of it: %w", k, errdefs.ErrUnavailable)
	}
	const nobody = "" // no container's id
	k.disks.hold(nobody, []disk{{Name: volumeDisk(vol.ID), Path: vol.Path, FSType: "ext4", Volume: vol.ID}})
	return k.disks.release(ctx, sess, nobody)
}

// leases lets go of images held by containers that are gone.
func (v *volumeKeeper) leases(ctx context.Context) error {
	leases, err := v.a.o.Images.Leases(ctx)
	if err != nil {
		return err
	}
	for holder := range leases {
		if !v.a.hasContainer(holder) {
			if err := v.a.o.Images.Release(ctx, holder); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}
