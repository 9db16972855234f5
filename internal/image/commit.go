package image

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
	v1 "tandem/api/tandem/v1"
)

// newImage is an image about to be added.
type newImage struct {
	config   []byte
	names    []string // normalised
	manifest *manifestRecord
	digest   string // what a registry or layout calls it: the index's or manifest's
	// layer brings the i-th layer.
	layer func(i int) layerSource
}

// add makes sure that the store has all layers of the images, then records all
// of them and their names in one step. The layers are pinned all along; on
// failure what was made is removed.
func (s *LocalStore) add(ctx context.Context, images []newImage, p ProgressFunc) (out []*v1.Image, err error) {
	var all []string
	layers := make([][]string, len(images))
	for i, n := range images {
		c, err := decodeConfig(n.config)
		if err != nil {
			return nil, err
		}
		if len(c.RootFS.DiffIDs) == 0 {
			return nil, badConfig("the image has no layers")
		}
		layers[i] = c.RootFS.DiffIDs
		all = append(all, layers[i]...)
	}
	unpin := s.pin(all)
	defer func() {
		unpin()
		if err != nil {
			s.collectFailed()
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(s.opts.Parallel)
	seen := map[string]bool{}
	for i, n := range images {
		for j, d := range layers[i] {
			if !seen[d] {
				seen[d] = true
				g.Go(func() error { return s.ensureLayer(gctx, d, p, n.layer(j)) })
			}
		}
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	err = s.db.Update(func(tx *bolt.Tx) error {
		for i, n := range images {
			if err := s.record(tx, hashOf(n.config), layers[i], n); err != nil {
				return fmt.Errorf("image %s: %w", nameOr(n.names, hashOf(n.config)), err)
			}
		}
		for _, n := range images {
			img, err := s.view(tx, hashOf(n.config))
			if err != nil {
				return err
			}
			out = append(out, img)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("record images: %w", s.diskError(err, 0))
	}
	return out, nil
}

func (s *LocalStore) record(tx *bolt.Tx, id string, layers []string, n newImage) error {
	rec, _, err := record[imageRecord](tx, bucketImages, id)
	if err != nil {
		return err
	}
	rec.Config, rec.Layers, rec.Size = n.config, layers, 0
	for _, d := range layers {
		l, found, err := record[layerRecord](tx, bucketLayers, d)
		if err != nil {
			return err
		}
		if !found {
			return fmt.Errorf("layer %s vanished: %w", d, errdefs.ErrAborted)
		}
		rec.Size += l.TarSize
	}
	if rec.Size > s.opts.MaxImageBytes {
		return fmt.Errorf("image of %d bytes, more than %d: %w", rec.Size, s.opts.MaxImageBytes, errdefs.ErrInvalidArgument)
	}
	if n.manifest != nil {
		known := false
		for _, m := range rec.Manifests {
			known = known || m.Digest == n.manifest.Digest
		}
		if !known {
			// The newest few are enough: each is a way to save the image as it came.
			rec.Manifests = append([]manifestRecord{*n.manifest}, rec.Manifests[:min(3, len(rec.Manifests))]...)
		}
	}
	if err := putRecord(tx, bucketImages, id, rec); err != nil {
		return err
	}
	for _, name := range n.names {
		if err := putRecord(tx, bucketNames, name, nameRecord{ID: id, Digest: n.digest}); err != nil {
			return err
		}
	}
	return nil
}
