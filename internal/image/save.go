package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// saved is an image to be written.
type saved struct {
	id    string
	names []string // normalised tags, of those asked for
	rec   imageRecord
}

// Save writes images as a tar stream: format "docker" is what "docker load"
// reads (plain layers), "oci" an OCI layout. An image that was pulled and whose
// blobs are here is written to a layout with its own manifest; others get one
// with plain layers. The same images give the same bytes.
func (s *LocalStore) Save(ctx context.Context, w io.Writer, refs []string, format string) error {
	done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	if format != "docker" && format != "oci" {
		return fmt.Errorf("save: format %q; there are docker and oci: %w", format, errdefs.ErrInvalidArgument)
	}
	images, unpin, err := s.toSave(refs)
	if err != nil {
		return fmt.Errorf("save: %w", err)
	}
	defer unpin()
	out := &archiveWriter{ctx: ctx, tw: tar.NewWriter(w), seen: map[string]bool{}}
	if format == "docker" {
		err = s.saveDocker(out, images)
	} else {
		err = s.saveOCI(out, images)
	}
	if err == nil {
		err = out.tw.Close()
	}
	if err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

// toSave finds the images; their layers stay until unpin.
func (s *LocalStore) toSave(refs []string) ([]*saved, func(), error) {
	if len(refs) == 0 {
		return nil, nil, fmt.Errorf("name at least one image: %w", errdefs.ErrInvalidArgument)
	}
	var list []*saved
	var layers []string
	s.mu.Lock()
	err := s.db.View(func(tx *bolt.Tx) error {
		byID := map[string]*saved{}
		for _, ref := range refs {
			id, err := resolve(tx, ref)
			if err != nil {
				return err
			}
			img := byID[id]
			if img == nil {
				rec, _, err := record[imageRecord](tx, bucketImages, id)
				if err != nil {
					return err
				}
				img = &saved{id: id, rec: rec}
				byID[id], list = img, append(list, img)
				layers = append(layers, rec.Layers...)
			}
			names, err := namedIDs(tx)
			if err != nil {
				return err
			}
			for _, n := range namesMeant(ref, names[id]) {
				if !isDigestName(n) {
					img.names = append(img.names, n)
				}
			}
		}
		return nil
	})
	if err == nil {
		for _, d := range layers {
			s.pins[d]++
		}
	}
	s.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	return list, func() {
		s.mu.Lock()
		for _, d := range layers {
			if s.pins[d]--; s.pins[d] == 0 {
				delete(s.pins, d)
			}
		}
		s.mu.Unlock()
		s.collectFailed() // images may have been removed meanwhile
	}, nil
}

type archiveWriter struct {
	ctx  context.Context
	tw   *tar.Writer
	seen map[string]bool
}

func (a *archiveWriter) file(name string, size int64, r io.Reader) error {
	if a.seen[name] {
		return nil
	}
	a.seen[name] = true
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)}
	if err := a.tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(a.tw, &source{ctx: a.ctx, r: r})
	return err
}

func (a *archiveWriter) bytes(name string, raw []byte) error {
	return a.file(name, int64(len(raw)), bytes.NewReader(raw))
}

func (a *archiveWriter) json(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return a.bytes(name, raw)
}

// layer writes a layer's uncompressed tar, checking its digest.
func (s *LocalStore) saveLayer(out *archiveWriter, name, diffID string) error {
	l, found, err := s.layer(diffID)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("layer %s is lost; pull or load the image again: %w", diffID, errdefs.ErrDataLoss)
	}
	r, err := s.openTar(s.blobPath(l.Blob), l.Compression)
	if err != nil {
		return fmt.Errorf("layer %s: %w", diffID, err)
	}
	defer r.Close()
	sum := sha256.New()
	if out.seen[name] {
		return nil
	}
	if err := out.file(name, l.TarSize, io.TeeReader(r, sum)); err != nil {
		return fmt.Errorf("layer %s: %w", diffID, err)
	}
	if got := digestOf(sum); got != diffID {
		return fmt.Errorf("layer %s is damaged (content is %s); pull or load the image again: %w", diffID, got, errdefs.ErrDataLoss)
	}
	return nil
}

func (s *LocalStore) saveDocker(out *archiveWriter, images []*saved) error {
	var items []dockerManifest
	for _, img := range images {
		m := dockerManifest{Config: strings.TrimPrefix(img.id, "sha256:") + ".json", RepoTags: familiar(img.names), Layers: []string{}}
		for _, d := range img.rec.Layers {
			name := strings.TrimPrefix(d, "sha256:") + "/layer.tar"
			if err := s.saveLayer(out, name, d); err != nil {
				return err
			}
			m.Layers = append(m.Layers, name)
		}
		if err := out.bytes(m.Config, img.rec.Config); err != nil {
			return err
		}
		items = append(items, m)
	}
	return out.json("manifest.json", items)
}

func (s *LocalStore) saveOCI(out *archiveWriter, images []*saved) error {
	if err := out.bytes("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	index := manifestFile{SchemaVersion: 2, MediaType: typeOCIIndex}
	for _, img := range images {
		d, err := s.saveOCIImage(out, img)
		if err != nil {
			return err
		}
		if len(img.names) == 0 {
			index.Manifests = append(index.Manifests, d)
		}
		sort.Strings(img.names)
		for _, n := range img.names {
			named := d
			named.Annotations = map[string]string{annotationImageName: n, annotationRefName: familiarTag(n)}
			index.Manifests = append(index.Manifests, named)
		}
	}
	return out.json("index.json", index)
}

func (s *LocalStore) saveOCIImage(out *archiveWriter, img *saved) (descriptor, error) {
	d, done, err := s.saveAsItCame(out, img)
	if err != nil || done {
		return d, err
	}
	m := manifestFile{SchemaVersion: 2, MediaType: typeOCIManifest,
		Config: &descriptor{MediaType: typeOCIConfig, Digest: img.id, Size: int64(len(img.rec.Config))}}
	for _, diffID := range img.rec.Layers {
		l, _, err := s.layer(diffID)
		if err != nil {
			return d, err
		}
		if err := s.saveLayer(out, blobName(diffID), diffID); err != nil {
			return d, err
		}
		m.Layers = append(m.Layers, descriptor{MediaType: typeOCILayer, Digest: diffID, Size: l.TarSize})
	}
	if err := out.bytes(blobName(img.id), img.rec.Config); err != nil {
		return d, err
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return d, err
	}
	d = descriptor{MediaType: typeOCIManifest, Digest: hashOf(raw), Size: int64(len(raw))}
	return d, out.bytes(blobName(d.Digest), raw)
}

// saveAsItCame writes the image with a manifest it came with, if all its blobs
// are here as that manifest has them.
func (s *LocalStore) saveAsItCame(out *archiveWriter, img *saved) (d descriptor, done bool, err error) {
	for _, m := range img.rec.Manifests {
		blobs := make([]layerRecord, len(m.Blobs))
		all := len(m.Blobs) == len(img.rec.Layers)
		for i := 0; all && i < len(blobs); i++ {
			l, found, err := s.layer(img.rec.Layers[i])
			if err != nil {
				return d, false, err
			}
			all, blobs[i] = found && l.Blob == m.Blobs[i], l
		}
		if !all {
			continue
		}
		for _, l := range blobs {
			if err := s.saveBlob(out, l); err != nil {
				return d, false, err
			}
		}
		if err := out.bytes(blobName(img.id), img.rec.Config); err != nil {
			return d, false, err
		}
		d = descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Raw))}
		return d, true, out.bytes(blobName(m.Digest), m.Raw)
	}
	return d, false, nil
}

func (s *LocalStore) saveBlob(out *archiveWriter, l layerRecord) error {
	if out.seen[blobName(l.Blob)] {
		return nil
	}
	f, err := os.Open(s.blobPath(l.Blob))
	if err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob, err)
	}
	defer f.Close()
	sum := sha256.New()
	if err := out.file(blobName(l.Blob), l.BlobSize, io.TeeReader(f, sum)); err != nil {
		return fmt.Errorf("blob %s: %w", l.Blob, err)
	}
	if got := digestOf(sum); got != l.Blob {
		return fmt.Errorf("blob %s is damaged (content is %s); pull or load the image again: %w", l.Blob, got, errdefs.ErrDataLoss)
	}
	return nil
}
