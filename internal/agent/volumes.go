package agent

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

// volumeKeeper makes the disks of named volumes and removes those that are not
// asked for any more, with scratch disks and leases whose owner is gone.
type volumeKeeper struct {
	a    *Agent
	wake chan struct{}
}

func newVolumeKeeper(a *Agent) *volumeKeeper {
	return &volumeKeeper{a: a, wake: make(chan struct{}, 1)}
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
// received: an agent without intent knows nothing.
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
	have, err := a.o.Volumes.List(ctx)
	if err != nil {
		return err
	}
	for _, vol := range have {
		machine, scratch := strings.CutPrefix(vol.ID, "scratch-")
		switch {
		case want[vol.ID], strings.HasPrefix(vol.ID, "anon-"): // an anonymous one goes with its container
			continue
		case scratch:
			if a.kernel(machine) != nil {
				continue
			}
			if err := a.o.Volumes.Unuse(ctx, vol.ID, machine); err != nil && !errdefs.IsNotFound(err) {
				failed = err
				continue
			}
		}
		if err := a.o.Volumes.Remove(ctx, vol.ID); err != nil && !errdefs.IsNotFound(err) {
			failed = err // in use: its container is still ending
			continue
		}
		a.log.Info("removed a disk that is not in the spec", "volume", vol.ID)
		a.hub.removeVolume(vol.ID)
	}
	if err := v.leases(ctx); err != nil {
		failed = err
	}
	return failed
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
