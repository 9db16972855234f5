package agent

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/singleflight"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/image"
)

// images finds and pulls images for containers: one pull at a time per image,
// however many containers wait for it.
type images struct {
	a     *Agent
	ctx   context.Context // a pull goes on when its first asker goes
	group singleflight.Group
}

// ensure finds an image by its pull policy. pulling is called when a pull begins.
func (i *images) ensure(ctx context.Context, ref, platform, policy string, pulling func()) (*v1.Image, error) {
	if policy != "always" {
		img, err := i.a.o.Images.Get(ctx, ref)
		if err == nil || !errdefs.IsNotFound(err) {
			return img, err
		}
		if policy == "never" {
			return nil, fmt.Errorf("image %s is not on this host and pull_policy is never (load or pull it first): %w", ref, err)
		}
	}
	pulling()
	ch := i.group.DoChan(ref+"\x00"+platform, func() (any, error) {
		img, err := i.a.o.Images.Pull(i.ctx, ref, image.PullOptions{Platform: platform, Progress: i.a.hub.setProgress})
		if err == nil {
			i.a.hub.event(i.a.newEvent("image", "pull", img.Id, ref, ""))
		}
		return img, err
	})
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case res := <-ch:
		if res.Err != nil {
			return nil, fmt.Errorf("pull image %s: %w", ref, res.Err)
		}
		return res.Val.(*v1.Image), nil
	}
}
