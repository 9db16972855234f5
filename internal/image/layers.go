package image

import (
	"bufio"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/files"
	"tandem/internal/image/layerfs"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
)

// layerSource brings a layer that the store does not have: staged into a
// directory of its own, which the store releases.
type layerSource func(ctx context.Context, p ProgressFunc) (*staged, *workDir, error)

// pin keeps layers from being collected while an operation that will need them
// runs. The result undoes it.
func (s *LocalStore) pin(diffIDs []string) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range diffIDs {
		s.pins[d]++
	}
	return func() {
		s.mu.Lock()
		for _, d := range diffIDs {
			if s.pins[d]--; s.pins[d] == 0 {
				delete(s.pins, d)
			}
		}
		s.mu.Unlock()
	}
}

// ensureLayer makes sure that the store has the layer's blob and block image.
// The caller has pinned it.
func (s *LocalStore) ensureLayer(ctx context.Context, diffID string, p ProgressFunc, src layerSource) error {
	for {
		if rec, ok, err := s.layerComplete(diffID); err != nil || ok {
			if ok {
				tell(p, &v1.Progress{Id: "layer " + diffID, Action: "present", Current: rec.TarSize, Total: rec.TarSize, Unit: "bytes", Done: true})
			}
			return err
		}
		_, joined, err := s.layerWork.do(ctx, diffID, p, func(ctx context.Context, p ProgressFunc) (struct{}, error) {
			return struct{}{}, s.makeLayer(ctx, diffID, p, src)
		})
		if err == nil || !joined || ctx.Err() != nil {
			return err
		}
		// Another caller's source failed; ours may do better.
	}
}

// layerComplete tells whether meta.db knows the layer and both files are there.
func (s *LocalStore) layerComplete(diffID string) (layerRecord, bool, error) {
	rec, found, err := s.layer(diffID)
	if err != nil || !found {
		return rec, false, err
	}
	return rec, fileHasSize(s.layerPath(diffID), rec.ImageSize) && fileHasSize(s.blobPath(rec.Blob), rec.BlobSize), nil
}

func (s *LocalStore) layer(diffID string) (rec layerRecord, found bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		rec, found, err = record[layerRecord](tx, bucketLayers, diffID)
		return err
	})
	return rec, found, err
}

func fileHasSize(path string, size int64) bool {
	st, err := os.Lstat(path)
	return err == nil && st.Mode().IsRegular() && st.Size() == size
}

func (s *LocalStore) makeLayer(ctx context.Context, diffID string, p ProgressFunc, src layerSource) error {
	done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	unpin := s.pin([]string{diffID})
	defer func() {
		unpin()
		if ctx.Err() != nil {
			s.collectFailed() // all who wanted it have gone
		}
	}()
	if _, ok, err := s.layerComplete(diffID); err != nil || ok {
		return err
	}
	st, dir, err := s.restage(ctx, diffID)
	if st == nil {
		if src == nil {
			return fmt.Errorf("layer %s: its blob is lost or damaged (%v); pull or load the image again: %w", diffID, err, errdefs.ErrDataLoss)
		}
		named := func(m *v1.Progress) {
			m.Id = "layer " + diffID
			tell(p, m)
		}
		if st, dir, err = src(ctx, named); err != nil {
			return err
		}
	}
	defer dir.release()
	if st.diffID != diffID {
		return fmt.Errorf("layer %s: wrong digest: the uncompressed content is %s: %w", diffID, st.diffID, errdefs.ErrInvalidArgument)
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return ctx.Err()
	}
	tell(p, &v1.Progress{Id: "layer " + diffID, Action: "converting", Total: st.rec.TarSize, Unit: "bytes"})
	if st.tree == nil {
		if st.tree, err = s.scanBlob(ctx, st.path, st.rec.Compression, diffID); err != nil {
			return fmt.Errorf("layer %s: %w", diffID, err)
		}
	}
	image, size, err := s.convert(ctx, st, dir.path, p)
	if err != nil {
		return fmt.Errorf("layer %s: %w", diffID, s.diskError(err, st.tree.Bytes()))
	}
	st.rec.ImageSize = size
	if err := s.commitLayer(st, image); err != nil {
		return fmt.Errorf("layer %s: %w", diffID, s.diskError(err, 0))
	}
	tell(p, &v1.Progress{Id: "layer " + diffID, Action: "ready", Current: st.rec.TarSize, Total: st.rec.TarSize, Unit: "bytes", Done: true})
	return nil
}

// restage checks a blob that the store has already: its block image is missing.
func (s *LocalStore) restage(ctx context.Context, diffID string) (*staged, *workDir, error) {
	rec, found, err := s.layer(diffID)
	if err != nil || !found {
		return nil, nil, err
	}
	blob := s.blobPath(rec.Blob)
	tree, err := s.scanBlob(ctx, blob, rec.Compression, diffID)
	if err != nil {
		return nil, nil, err
	}
	dir, err := s.newWorkDir()
	if err != nil {
		return nil, nil, err
	}
	return &staged{path: blob, diffID: diffID, rec: rec, tree: tree}, dir, nil
}

// scanBlob reads a blob on this host and checks that it is the layer.
func (s *LocalStore) scanBlob(ctx context.Context, path, compression, diffID string) (*layerfs.Tree, error) {
	r, err := s.openTar(path, compression)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	in := &source{ctx: ctx, r: r, sum: sha256.New()}
	buf := bufio.NewReaderSize(in, 1<<18)
	tree, err := layerfs.Scan(buf, s.opts.limits())
	if err == nil {
		_, err = io.Copy(io.Discard, buf)
	}
	if err != nil {
		return nil, err
	}
	if got := digestOf(in.sum); got != diffID {
		return nil, fmt.Errorf("its content is %s, not what was written: %w", got, errdefs.ErrDataLoss)
	}
	return tree, nil
}

// convert writes the block image of a staged layer into dir, checking the
// content's digest once more on the way.
func (s *LocalStore) convert(ctx context.Context, st *staged, dir string, p ProgressFunc) (path string, size int64, err error) {
	r, err := s.openTar(st.path, st.rec.Compression)
	if err != nil {
		return "", 0, err
	}
	defer r.Close()
	f, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	in := &source{ctx: ctx, r: r, sum: sha256.New(), onBytes: func(n int64) {
		tell(p, &v1.Progress{Id: "layer " + st.diffID, Action: "converting", Current: n, Total: st.rec.TarSize, Unit: "bytes"})
	}}
	buf := bufio.NewReaderSize(in, 1<<18)
	size, err = st.tree.Ext4(buf, f)
	if err == nil {
		_, err = io.Copy(io.Discard, buf)
	}
	if err != nil {
		return "", 0, err
	}
	if got := digestOf(in.sum); got != st.diffID {
		return "", 0, fmt.Errorf("content read back is %s, not what was written: %w", got, errdefs.ErrDataLoss)
	}
	if err := f.Chmod(0o444); err != nil {
		return "", 0, err
	}
	return f.Name(), size, f.Sync()
}

// commitLayer gives the files their final names, then records the layer.
func (s *LocalStore) commitLayer(st *staged, image string) error {
	blob, final := s.blobPath(st.rec.Blob), s.layerPath(st.diffID)
	if st.path != blob {
		if err := syncFile(st.path); err != nil {
			return err
		}
		if err := os.Rename(st.path, blob); err != nil {
			return err
		}
		if err := files.SyncDir(filepath.Dir(blob)); err != nil {
			return err
		}
	}
	err := os.Rename(image, final)
	if err == nil {
		err = files.SyncDir(filepath.Dir(final))
	}
	if err == nil {
		err = s.db.Update(func(tx *bolt.Tx) error { return putRecord(tx, bucketLayers, st.diffID, st.rec) })
	}
	if err != nil {
		_, known, lerr := s.layer(st.diffID)
		if lerr == nil && !known {
			os.Remove(blob)
			os.Remove(final)
		}
	}
	return err
}

// syncFile makes a finished file durable and read-only.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	return f.Sync()
}

// tarStream is a stored layer, uncompressed.
type tarStream struct {
	io.Reader
	close func()
}

// Close releases the blob.
func (t *tarStream) Close() error {
	t.close()
	return nil
}

func (s *LocalStore) openTar(path, compression string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	r, stop, err := decompress(bufio.NewReaderSize(f, 1<<18), compression)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &tarStream{Reader: r, close: func() { stop(); f.Close() }}, nil
}

// Layers returns the image's layers, lowest first, converting those whose block
// image is missing. A layer that an image has twice is returned once, where it
// counts: at its highest place. FailedPrecondition without a lease on the image.
func (s *LocalStore) Layers(ctx context.Context, id string, p ProgressFunc) ([]Layer, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var rec imageRecord
	err = s.db.View(func(tx *bolt.Tx) error {
		full, err := resolve(tx, id)
		if err != nil {
			return err
		}
		leased, err := s.leasedIDs(tx)
		if err != nil {
			return err
		}
		if leased[full] == "" {
			return fmt.Errorf("image %s: its layers need a lease first, or they could be pruned: %w", id, errdefs.ErrFailedPrecondition)
		}
		rec, _, err = record[imageRecord](tx, bucketImages, full)
		return err
	})
	if err != nil {
		return nil, err
	}
	order := uniqueLast(rec.Layers)
	unpin := s.pin(order)
	defer unpin()
	g, gctx := errgroup.WithContext(ctx)
	for _, d := range order {
		g.Go(func() error { return s.ensureLayer(gctx, d, p, nil) })
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("image %s: %w", id, err)
	}
	out := make([]Layer, 0, len(order))
	for _, d := range order {
		l, found, err := s.layer(d)
		if err != nil {
			return nil, err
		}
		if !found {
			return nil, fmt.Errorf("image %s: layer %s is gone: %w", id, d, errdefs.ErrDataLoss)
		}
		out = append(out, Layer{DiffID: d, Path: s.layerPath(d), FSType: layerfs.FSType, Size: l.ImageSize})
	}
	return out, nil
}

// uniqueLast drops all but the last occurrence of each layer: what lies below is
// covered by it, and overlay refuses a directory twice.
func uniqueLast(layers []string) []string {
	last := map[string]int{}
	for i, d := range layers {
		last[d] = i
	}
	out := make([]string, 0, len(last))
	for i, d := range layers {
		if last[d] == i {
			out = append(out, d)
		}
	}
	return out
}

func tell(p ProgressFunc, m *v1.Progress) {
	if p != nil {
		p(m)
	}
}
