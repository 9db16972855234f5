package image

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/distribution/reference"
)

// Media types that are read.
const (
	typeOCIIndex        = "application/vnd.oci.image.index.v1+json"
	typeOCIManifest     = "application/vnd.oci.image.manifest.v1+json"
	typeOCIConfig       = "application/vnd.oci.image.config.v1+json"
	typeOCILayer        = "application/vnd.oci.image.layer.v1.tar"
	typeDockerList      = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeDockerManifest  = "application/vnd.docker.distribution.manifest.v2+json"
	annotationImageName = "io.containerd.image.name"
	annotationRefName   = "org.opencontainers.image.ref.name"
	annotationRefType   = "vnd.docker.reference.type" // attestations
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

func (p *platform) String() string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// manifestFile is an image manifest or an index: one has Config, the other Manifests.
type manifestFile struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType,omitempty"`
	Config        *descriptor       `json:"config,omitempty"`
	Layers        []descriptor      `json:"layers,omitempty"`
	Manifests     []descriptor      `json:"manifests,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

const maxIndexDepth = 4

func decodeManifest(what string, raw []byte) (*manifestFile, error) {
	if len(raw) > maxConfigBytes {
		return nil, badArchive("%s: %d bytes, more than %d", what, len(raw), maxConfigBytes)
	}
	var m manifestFile
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, badArchive("%s: %v", what, err)
	}
	if m.SchemaVersion != 2 {
		return nil, badArchive("%s: schema version %d is not supported, only 2", what, m.SchemaVersion)
	}
	if m.Config != nil && len(m.Manifests) > 0 {
		return nil, badArchive("%s: is both an image and an index", what)
	}
	if len(m.Manifests) > maxArchiveImage || len(m.Layers) > maxLayers {
		return nil, badArchive("%s: %d manifests, %d layers: too many", what, len(m.Manifests), len(m.Layers))
	}
	for _, list := range [][]descriptor{m.Manifests, m.Layers} {
		for _, d := range list {
			if !fullID.MatchString(d.Digest) || d.Size < 0 {
				return nil, badArchive("%s: bad descriptor: digest %.100q, size %d", what, d.Digest, d.Size)
			}
		}
	}
	if m.Config != nil && (!fullID.MatchString(m.Config.Digest) || m.Config.Size < 0) {
		return nil, badArchive("%s: bad config descriptor: digest %.100q, size %d", what, m.Config.Digest, m.Config.Size)
	}
	return &m, nil
}

// ociImages reads an OCI layout's index.json.
func (a *archive) ociImages(want string) ([]newImage, error) {
	raw, err := a.json("index.json")
	if err != nil {
		return nil, err
	}
	index, err := decodeManifest("index.json", raw)
	if err != nil {
		return nil, err
	}
	if len(index.Manifests) == 0 {
		return nil, badArchive("index.json lists no image")
	}
	var out []newImage
	byDigest := map[string]int{}
	for _, d := range index.Manifests {
		if d.Annotations[annotationRefType] != "" {
			continue
		}
		names := descriptorNames(d)
		if i, seen := byDigest[d.Digest]; seen {
			out[i].names = append(out[i].names, names...)
			continue
		}
		n, err := a.ociImage(d, want, 0)
		if err != nil {
			return nil, err
		}
		n.names, n.digest = names, d.Digest
		byDigest[d.Digest] = len(out)
		out = append(out, *n)
	}
	if len(out) == 0 {
		return nil, badArchive("index.json lists no image")
	}
	return out, nil
}

// descriptorNames reads the names a layout gives an image: containerd and Docker
// write the full name, others a full name or a mere tag.
func descriptorNames(d descriptor) []string {
	var out []string
	if n, err := Normalize(d.Annotations[annotationImageName]); err == nil {
		out = append(out, n)
	} else if ref := d.Annotations[annotationRefName]; strings.ContainsAny(ref, "/:") {
		if n, err := Normalize(ref); err == nil {
			out = append(out, n)
		}
	}
	return slices.DeleteFunc(out, isDigestName)
}

// blob returns a small blob whose digest and size are right.
func (a *archive) blob(d descriptor) ([]byte, error) {
	raw, err := a.json(blobName(d.Digest))
	if err != nil {
		return nil, err
	}
	if got := hashOf(raw); got != d.Digest || int64(len(raw)) != d.Size {
		return nil, badArchive("blob %s: wrong digest: content is %s, %d bytes", d.Digest, got, len(raw))
	}
	return raw, nil
}

func blobName(digest string) string {
	return "blobs/" + strings.Replace(digest, ":", "/", 1)
}

func (a *archive) ociImage(d descriptor, want string, depth int) (*newImage, error) {
	if depth > maxIndexDepth {
		return nil, badArchive("indexes nested more than %d deep", maxIndexDepth)
	}
	raw, err := a.blob(d)
	if err != nil {
		return nil, err
	}
	m, err := decodeManifest("manifest "+d.Digest, raw)
	if err != nil {
		return nil, err
	}
	if m.Config == nil {
		child, err := choose("the index "+d.Digest, m.Manifests, want)
		if err != nil {
			return nil, err
		}
		return a.ociImage(child, want, depth+1)
	}
	config, err := a.blob(*m.Config)
	if err != nil {
		return nil, err
	}
	return a.fromManifest(d, raw, m, config)
}

func (a *archive) fromManifest(d descriptor, raw []byte, m *manifestFile, config []byte) (*newImage, error) {
	c, err := decodeConfig(config)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, badArchive("manifest %s has %d layers, its config %d", d.Digest, len(m.Layers), len(c.RootFS.DiffIDs))
	}
	rec := &manifestRecord{Digest: d.Digest, MediaType: manifestType(m, d), Raw: raw}
	files := make([]string, len(m.Layers))
	for i, l := range m.Layers {
		files[i] = blobName(l.Digest)
		rec.Blobs = append(rec.Blobs, l.Digest)
		f, err := a.file(files[i])
		if err != nil {
			return nil, err
		}
		if f.digest != l.Digest || f.size != l.Size {
			return nil, badArchive("layer %s: wrong digest: content is %s, %d bytes", l.Digest, f.digest, f.size)
		}
	}
	if err := a.checkLayers(files, c.RootFS.DiffIDs); err != nil {
		return nil, err
	}
	return &newImage{config: config, manifest: rec, layer: func(i int) layerSource { return a.source(files[i]) }}, nil
}

func manifestType(m *manifestFile, d descriptor) string {
	for _, t := range []string{m.MediaType, d.MediaType} {
		if t != "" {
			return t
		}
	}
	return typeOCIManifest
}

// choose picks the descriptor for a platform: an exact match, then one whose
// variant is not said or the first of the architecture.
func choose(what string, list []descriptor, want string) (descriptor, error) {
	parts := strings.SplitN(want, "/", 3)
	var have []string
	var loose *descriptor
	for i, d := range list {
		if d.Annotations[annotationRefType] != "" {
			continue
		}
		if d.Platform == nil {
			if loose == nil {
				loose = &list[i]
			}
			continue
		}
		if d.Platform.OS == "unknown" {
			continue
		}
		have = append(have, d.Platform.String())
		if len(parts) < 2 || d.Platform.OS != parts[0] || d.Platform.Architecture != parts[1] {
			continue
		}
		if len(parts) < 3 || parts[2] == d.Platform.Variant {
			return d, nil
		}
	}
	if loose != nil {
		return *loose, nil
	}
	return descriptor{}, noPlatform(what, want, have)
}

// familiarTag is the tag of a stored name; "" without one.
func familiarTag(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return ""
	}
	if t, ok := n.(reference.Tagged); ok {
		return t.Tag()
	}
	return ""
}
