package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	v1 "tandem/api/tandem/v1"
)

// Load reads a docker-archive (manifest.json) or an OCI layout (index.json) from
// a tar stream, plain or compressed with gzip, zstd or bzip2. The stream is read
// once; memory does not grow with it. An archive that is both, as "docker save"
// writes it, is read as OCI layout. Of an index, the image for this host is taken.
//
// All images of an archive are loaded, or none. What is wrong with an archive is
// InvalidArgument and names the layer and entry.
func (s *LocalStore) Load(ctx context.Context, r io.Reader, p ProgressFunc) ([]*v1.Image, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	a, err := s.readArchive(ctx, r, func(n int64, name string) {
		tell(p, &v1.Progress{Id: "archive", Action: "reading", Current: n, Unit: "bytes", Message: name})
	})
	if err != nil {
		return nil, fmt.Errorf("load: %w", s.diskError(err, 0))
	}
	defer a.dir.release()
	var images []newImage
	_, oci := a.files["index.json"]
	_, docker := a.files["manifest.json"]
	switch {
	case oci:
		images, err = a.ociImages(s.opts.Platform)
		if docker && err == nil {
			a.addRepoTags(images)
		}
	case docker:
		images, err = a.dockerImages()
	default:
		err = badArchive("neither manifest.json (docker-archive) nor index.json (OCI layout) is in it")
	}
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	out, err := s.add(ctx, images, p)
	if err != nil {
		return nil, fmt.Errorf("load: %w", s.diskError(err, 0))
	}
	for _, img := range out {
		tell(p, &v1.Progress{Id: "image " + img.Id, Action: "loaded", Message: strings.Join(familiar(img.Names), ", "), Done: true})
	}
	return out, nil
}

func nameOr(names []string, id string) string {
	if len(names) > 0 {
		return Familiar(names[0])
	}
	return short(id)
}

// dockerManifest is an item of a docker-archive's manifest.json.
type dockerManifest struct {
	Config   string   `json:"Config"`
	RepoTags []string `json:"RepoTags"`
	Layers   []string `json:"Layers"`
}

func (a *archive) dockerManifests() ([]dockerManifest, error) {
	raw, err := a.json("manifest.json")
	if err != nil {
		return nil, err
	}
	var items []dockerManifest
	if err := json.Unmarshal(raw, &items); err != nil {
		return nil, badArchive("manifest.json: %v", err)
	}
	if len(items) == 0 || len(items) > maxArchiveImage {
		return nil, badArchive("manifest.json has %d images, not 1 to %d", len(items), maxArchiveImage)
	}
	return items, nil
}

func (a *archive) dockerImages() ([]newImage, error) {
	items, err := a.dockerManifests()
	if err != nil {
		return nil, err
	}
	var out []newImage
	for _, m := range items {
		raw, err := a.json(m.Config)
		if err != nil {
			return nil, err
		}
		if want := strings.TrimSuffix(path.Base(m.Config), ".json"); fullID.MatchString("sha256:"+want) && hashOf(raw) != "sha256:"+want {
			return nil, badArchive("config %q: wrong digest: content is %s", m.Config, hashOf(raw))
		}
		c, err := decodeConfig(raw)
		if err != nil {
			return nil, err
		}
		if len(c.RootFS.DiffIDs) != len(m.Layers) {
			return nil, badArchive("image %q has %d layers in its config and %d in manifest.json", m.Config, len(c.RootFS.DiffIDs), len(m.Layers))
		}
		names, err := tagNames(m.RepoTags)
		if err != nil {
			return nil, err
		}
		if err := a.checkLayers(m.Layers, c.RootFS.DiffIDs); err != nil {
			return nil, err
		}
		out = append(out, newImage{config: raw, names: names, layer: func(i int) layerSource { return a.source(m.Layers[i]) }})
	}
	return out, nil
}

// checkLayers finds out before anything is stored whether all layers are there
// and what the config says.
func (a *archive) checkLayers(files, diffIDs []string) error {
	for i, name := range files {
		f, err := a.file(name)
		if err != nil {
			return err
		}
		switch {
		case f.err != nil:
			return f.err
		case f.layer == nil:
			return badArchive("layer %q is no tar, gzip or zstd stream", name)
		case f.layer.diffID != diffIDs[i]:
			return badArchive("layer %q: wrong digest: content is %s, the config says %s", name, f.layer.diffID, diffIDs[i])
		}
	}
	return nil
}

func tagNames(tags []string) ([]string, error) {
	if len(tags) > maxArchiveImage {
		return nil, badArchive("%d names for one image", len(tags))
	}
	var out []string
	for _, t := range tags {
		n, err := Normalize(t)
		if err != nil {
			return nil, err
		}
		if !isDigestName(n) {
			out = append(out, n)
		}
	}
	return out, nil
}

// addRepoTags gives the images of an OCI layout the names that the manifest.json
// beside it has for them.
func (a *archive) addRepoTags(images []newImage) {
	items, err := a.dockerManifests()
	if err != nil {
		return
	}
	for _, m := range items {
		raw, err := a.json(m.Config)
		if err != nil {
			continue
		}
		for i := range images {
			if len(images[i].names) == 0 && hashOf(images[i].config) == hashOf(raw) {
				if names, err := tagNames(m.RepoTags); err == nil {
					images[i].names = names
				}
			}
		}
	}
}

// errNoPlatform marks an index without an image for this host.
var errNoPlatform = errors.New("no image for this platform")

func noPlatform(what, want string, have []string) error {
	return fmt.Errorf("%s has no image for %s, only for %s: %w: %w", what, want, strings.Join(have, ", "), errNoPlatform, errdefs.ErrNotFound)
}
