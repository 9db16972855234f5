package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	v1 "tandem/api/tandem/v1"
)

// Pull brings an image from its registry.
func (s *LocalStore) Pull(ctx context.Context, ref string, o PullOptions) (*v1.Image, error) {
	return nil, fmt.Errorf("pull %s: %w", ref, errdefs.ErrNotImplemented)
}
