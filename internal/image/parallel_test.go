package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
)

// TestAllAtOnce loads, leases, removes and prunes from many sides: whoever holds
// a lease gets complete layers, and at the end there is what is needed, no more.
func TestAllAtOnce(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, pullOptions())
	reg := newRegistry(t, false)
	ref := push(t, reg, "app:1", smallImage(t, "all", 3))
	archives := make([][]byte, 4)
	for i := range archives {
		archives[i] = appArchive(t, i)
	}
	expected := func(err error) bool {
		return err == nil || errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, errdefs.ErrFailedPrecondition)
	}
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for i := range 12 {
				name, holder := fmt.Sprintf("app:%d", (g+i)%4), fmt.Sprintf("c%d", g)
				if _, err := s.Load(ctx, bytes.NewReader(archives[(g+i)%4]), nil); err != nil {
					t.Errorf("load: %v", err)
				}
				if _, err := s.Pull(ctx, ref, PullOptions{}); err != nil {
					t.Errorf("pull: %v", err)
				}
				if err := s.Lease(ctx, holder, name); err == nil {
					if _, _, err := s.Prune(ctx, true); err != nil {
						t.Errorf("prune: %v", err)
					}
					img, err := s.Get(ctx, name)
					if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
						t.Errorf("get: %v", err)
					}
					if img != nil {
						layers, err := s.Layers(ctx, img.Id, nil)
						if err != nil || len(layers) != 3 {
							t.Errorf("layers under a lease: %v, %v", layers, err)
						}
						for _, l := range layers {
							if !fileHasSize(l.Path, l.Size) {
								t.Errorf("layer %s is not complete", l.DiffID)
							}
						}
					}
					if err := s.Release(ctx, holder); err != nil {
						t.Errorf("release: %v", err)
					}
				} else if !expected(err) {
					t.Errorf("lease: %v", err)
				}
				if _, _, err := s.Remove(ctx, name, i%3 == 0); !expected(err) {
					t.Errorf("remove: %v", err)
				}
			}
		})
	}
	wg.Wait()
	assertSound(t, s, true)
}
