package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// fuzzStore is a store with small limits.
func fuzzStore(f *testing.F) *LocalStore {
	s, err := Open(f.TempDir(), Options{Platform: "linux/amd64", MaxArchiveBytes: 4 << 20, MaxLayerBytes: 4 << 20, MaxImageBytes: 8 << 20, MaxLayerEntries: 2000})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.Close() })
	return s
}

// loadAnything loads what a stranger made: it either works or is refused as
// invalid, and then leaves nothing.
func loadAnything(t *testing.T, s *LocalStore, archive []byte) {
	ctx := context.Background()
	images, err := s.Load(ctx, bytes.NewReader(archive), nil)
	if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errNoPlatform) {
		t.Fatalf("neither loaded nor refused as invalid: %v", err)
	}
	for _, img := range images {
		if err := s.Save(ctx, io.Discard, []string{img.Id}, "oci"); err != nil {
			t.Fatalf("loaded, but can't be saved: %v", err)
		}
		if err := s.Lease(ctx, "fuzz", img.Id); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Layers(ctx, img.Id, nil); err != nil {
			t.Fatalf("loaded, but its layers can't be had: %v", err)
		}
	}
	if err := s.Release(ctx, "fuzz"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Prune(ctx, true); err != nil {
		t.Fatal(err)
	}
	assertEmpty(t, s)
}

func FuzzDockerArchive(f *testing.F) {
	layer := hello(f)
	f.Add([]byte(`[{"Config":"c.json","RepoTags":["a:1"],"Layers":["l.tar"]}]`), configFor(f, layer), layer)
	f.Add([]byte(`[{"Config":"c.json","Layers":["../l.tar"]}]`), []byte(`{"config":{"Cmd":"x","Healthcheck":{"Interval":-1}}}`), layer[:700])
	s := fuzzStore(f)
	f.Fuzz(func(t *testing.T, manifest, config, layer []byte) {
		// Give the config the digest of the layer, so that more than digests is tried.
		config = bytes.ReplaceAll(config, []byte(hashOf(hello(t))), []byte(hashOf(layer)))
		loadAnything(t, s, writeTar(t, member{name: "l.tar", body: layer}, member{name: "c.json", body: config},
			member{name: "l", link: "l.tar"}, member{name: "manifest.json", body: manifest}))
	})
}

func FuzzOCIIndex(f *testing.F) {
	layer := hello(f)
	config := configFor(f, layer)
	manifest := mustJSON(f, manifestFile{SchemaVersion: 2, Config: &descriptor{Digest: "CONFIG", Size: 1}, Layers: []descriptor{{Digest: "LAYER", Size: 2}}})
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"MANIFEST","size":3,"annotations":{"io.containerd.image.name":"a:1"}}]}`), manifest, config, layer)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"MANIFEST","size":3,"platform":{"os":"linux","architecture":"s390x"}}]}`),
		[]byte(`{"schemaVersion":2,"manifests":[{"digest":"MANIFEST","size":3}]}`), config, gz(f, layer))
	s := fuzzStore(f)
	f.Fuzz(func(t *testing.T, index, manifest, config, layer []byte) {
		config = bytes.ReplaceAll(config, []byte(hashOf(hello(t))), []byte(hashOf(layer)))
		fill := func(b []byte, key string, body []byte, size string) []byte {
			b = bytes.ReplaceAll(b, []byte(key), []byte(hashOf(body)))
			return bytes.ReplaceAll(b, []byte(size), []byte(`"size":`+strconv.Itoa(len(body))))
		}
		manifest = fill(fill(manifest, "CONFIG", config, `"size":1`), "LAYER", layer, `"size":2`)
		index = fill(index, "MANIFEST", manifest, `"size":3`)
		loadAnything(t, s, writeTar(t, member{name: blobName(hashOf(layer)), body: layer}, member{name: blobName(hashOf(config)), body: config},
			member{name: blobName(hashOf(manifest)), body: manifest}, member{name: "index.json", body: index}))
	})
}

// FuzzArchive tries the outer archive itself.
func FuzzArchive(f *testing.F) {
	one := hello(f)
	f.Add(dockerArchive(f, "a:1", one))
	f.Add(gz(f, dockerArchive(f, "a:1", one)))
	f.Add(ociArchive(f, "a:1", [][]byte{gz(f, one)}, [][]byte{one}, nil))
	s := fuzzStore(f)
	f.Fuzz(func(t *testing.T, archive []byte) { loadAnything(t, s, archive) })
}

func FuzzReference(f *testing.F) {
	for _, r := range []string{"busybox", "localhost:5000/a/b:c", "a@sha256:" + strings.Repeat("0", 64), "sha256:abc", "UPPER", "a:b:c", ""} {
		f.Add(r)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		n, err := Normalize(ref)
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatal(err)
			}
			return
		}
		if again, err := Normalize(n); err != nil || again != n {
			t.Fatalf("%q -> %q -> %q, %v", ref, n, again, err)
		}
		if back, err := Normalize(Familiar(n)); err != nil || back != n {
			t.Fatalf("%q shown as %q, which means %q, %v", n, Familiar(n), back, err)
		}
	})
}

func FuzzChanges(f *testing.F) {
	for _, c := range []string{`CMD ["a"]`, "ENV a=b c='d e'", "HEALTHCHECK --interval=5s CMD curl x", "EXPOSE 1-5/udp", "LABEL a=\"b", "VOLUME [\"/x\"]", "WORKDIR a"} {
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, line string) {
		var c runConfig
		if err := applyChanges(&c, []string{line}); err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Fatal(err)
		}
		_, _ = decodeConfig(mustJSON(t, configFile{OS: "linux", Config: c}))
	})
}
