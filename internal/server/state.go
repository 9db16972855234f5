package server

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
)

// watchSpace makes an event each time the disk of the state directory has become
// full, or has space again.
func (s *Server) watchSpace(ctx context.Context) {
	for was := false; ; {
		sp, moved := s.store.Space()
		if sp.Short != was {
			was = sp.Short
			action := "space"
			if sp.Short {
				action = "full"
			}
			s.ctl.Events.Add(&v1.Event{At: timestamppb.New(s.clock.Now()), Kind: "state", Action: action, Name: sp.Dir,
				Attributes: map[string]string{"free": fmt.Sprintf("%d MiB", sp.Free>>20), "needed": fmt.Sprintf("%d MiB", sp.Need>>20)}})
		}
		select {
		case <-ctx.Done():
			return
		case <-moved:
		}
	}
}
