package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"strings"
	"testing"

	"tandem/internal/image/imagetest"
)

// member is one file of an archive that a test writes.
type member struct {
	name, link string
	body       []byte
}

func writeTar(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m.name, Size: int64(len(m.body)), Mode: 0o644}
		if m.link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, m.link, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func layerTar(t testing.TB, fill func(*imagetest.Layer)) []byte {
	t.Helper()
	l := &imagetest.Layer{}
	fill(l)
	b, err := l.Tar()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func configFor(t testing.TB, layers ...[]byte) []byte {
	t.Helper()
	c := configFile{Architecture: "amd64", OS: "linux", RootFS: rootFS{Type: "layers"}}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, hashOf(l))
	}
	return mustJSON(t, c)
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// dockerArchive is a docker-archive with these layers, manifest first.
func dockerArchive(t testing.TB, ref string, layers ...[]byte) []byte {
	t.Helper()
	config := configFor(t, layers...)
	m := dockerManifest{Config: "c.json", RepoTags: []string{ref}}
	members := []member{{name: "c.json", body: config}}
	for i, l := range layers {
		n := string(rune('a'+i)) + "/layer.tar"
		m.Layers = append(m.Layers, n)
		members = append(members, member{name: n, body: l})
	}
	return writeTar(t, append([]member{{name: "manifest.json", body: mustJSON(t, []dockerManifest{m})}}, members...)...)
}

// ociArchive is an OCI layout of one image whose layer blobs are given with
// their uncompressed tars.
func ociArchive(t testing.TB, ref string, blobs, tars [][]byte, change func([]member) []member) []byte {
	t.Helper()
	config := configFor(t, tars...)
	m := manifestFile{SchemaVersion: 2, MediaType: typeOCIManifest, Config: &descriptor{MediaType: typeOCIConfig, Digest: hashOf(config), Size: int64(len(config))}}
	members := []member{{name: blobName(hashOf(config)), body: config}}
	for _, b := range blobs {
		m.Layers = append(m.Layers, descriptor{MediaType: typeOCILayer + "+gzip", Digest: hashOf(b), Size: int64(len(b))})
		members = append(members, member{name: blobName(hashOf(b)), body: b})
	}
	raw := mustJSON(t, m)
	index := manifestFile{SchemaVersion: 2, Manifests: []descriptor{{MediaType: typeOCIManifest, Digest: hashOf(raw), Size: int64(len(raw)),
		Annotations: map[string]string{annotationImageName: ref}}}}
	members = append(members, member{name: blobName(hashOf(raw)), body: raw}, member{name: "index.json", body: mustJSON(t, index)},
		member{name: "oci-layout", body: []byte(`{"imageLayoutVersion":"1.0.0"}`)})
	if change != nil {
		members = change(members)
	}
	return writeTar(t, members...)
}

func hello(t testing.TB) []byte {
	return layerTar(t, func(l *imagetest.Layer) { l.File("hello", 0o644, strings.Repeat("hello ", 1000)) })
}
