package control

import (
	"context"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// notTaken begins the message of a container whose host could not take what is
// wanted of it.
const notTaken = "its host can't take what is wanted of it: "

// blame tells in the containers that differ from what the agent took last why
// nothing happens to them: it can't say so itself, it does not know of them.
func (s *session) blame(ctx context.Context, last, spec *v1.HostSpec, why error) {
	if errdefs.IsUnavailable(why) || errdefs.IsFailedPrecondition(why) || ctx.Err() != nil {
		return // the connection broke, or a newer intent was quicker
	}
	had := map[string]*v1.ContainerAssignment{}
	for _, x := range last.GetContainers() {
		had[x.Id] = x
	}
	wanted := map[string]bool{}
	for _, x := range spec.Containers {
		wanted[x.Id] = !proto.Equal(x, had[x.Id])
	}
	msg := notTaken + cut(why.Error())
	s.say(ctx, func(x *v1.Container) bool {
		if last == nil && x.GetStatus().GetState() > v1.ContainerState_CONTAINER_STATE_PENDING {
			return false // what runs goes on
		}
		// The first reason stays: each write wakes who sends the intent, and an
		// error may be another each time.
		return wanted[x.Meta.Id] && !strings.HasPrefix(x.GetStatus().GetMessage(), notTaken)
	}, msg)
}

// unblame takes those messages back.
func (s *session) unblame(ctx context.Context) {
	s.say(ctx, func(x *v1.Container) bool { return strings.HasPrefix(x.GetStatus().GetMessage(), notTaken) }, "")
}

// say puts a message into the statuses of this host's containers that match.
func (s *session) say(ctx context.Context, match func(*v1.Container) bool, msg string) {
	c := s.h.c
	for _, x := range store.List[*v1.Container](c.store, "") {
		if x.GetAssignment().GetHostId() != s.hostID || x.GetStatus().GetMessage() == msg || !match(x) {
			continue
		}
		_, err := store.Update(ctx, c.store, store.KeyOf(x), func(x *v1.Container) error {
			if x.Status == nil {
				x.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING}
			}
			x.Status.Message = msg
			return nil
		})
		if err != nil && ctx.Err() == nil && !errdefs.IsNotFound(err) {
			c.log.Warn("a container's message could not be written", "container", x.Meta.Name, "message", msg, "err", err)
		}
	}
}
