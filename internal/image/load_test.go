package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/image/imagetest"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/klauspost/compress/zstd"
)

func TestLoadFormats(t *testing.T) {
	ctx := context.Background()
	one, two := hello(t), layerTar(t, func(l *imagetest.Layer) { l.File("two", 0o644, "2") })
	enc, _ := zstd.NewWriter(nil)
	zst := enc.EncodeAll(two, nil)
	docker := dockerArchive(t, "app:1", one, two, one)
	oci := ociArchive(t, "docker.io/library/app:1", [][]byte{gz(t, one), zst, one}, [][]byte{one, two, one}, nil)
	legacy := writeTar(t, member{name: "x/layer.tar", link: "../a/layer.tar"}, member{name: "a/layer.tar", body: one}, member{name: "c.json", body: configFor(t, one)},
		member{name: "manifest.json", body: mustJSON(t, []dockerManifest{{Config: "c.json", RepoTags: []string{"app:1"}, Layers: []string{"x/layer.tar"}}})})
	for what, archive := range map[string][]byte{
		"docker": docker, "docker gzip": gz(t, docker), "docker zstd": enc.EncodeAll(docker, nil), "oci": oci, "oci gzip": gz(t, oci), "legacy": legacy,
		"gzip layer in docker-archive": writeTar(t, member{name: "l", body: gz(t, one)}, member{name: "c.json", body: configFor(t, one)},
			member{name: "manifest.json", body: mustJSON(t, []dockerManifest{{Config: "c.json", RepoTags: []string{"app:1"}, Layers: []string{"l"}}})}),
	} {
		t.Run(what, func(t *testing.T) {
			s := openStore(t, Options{Platform: "linux/amd64"})
			images, err := s.Load(ctx, bytes.NewReader(archive), nil)
			if err != nil || len(images) != 1 {
				t.Fatalf("%v, %v", images, err)
			}
			img, err := s.Get(ctx, "app:1")
			if err != nil || img.Id != images[0].Id {
				t.Fatalf("%v, %v", img, err)
			}
			if err := s.Lease(ctx, "c", img.Id); err != nil {
				t.Fatal(err)
			}
			layers, err := s.Layers(ctx, img.Id, nil)
			if err != nil || layers[len(layers)-1].DiffID != hashOf(one) || len(img.Layers) == 3 && len(layers) != 2 {
				t.Errorf("layers: %v, %v", layers, err)
			}
		})
	}
}

func TestBadArchivesLeaveNothing(t *testing.T) {
	one := hello(t)
	evil := layerTar(t, func(l *imagetest.Layer) {
		l.File("ok", 0o644, "fine")
		l.Entry(tar.Header{Typeflag: tar.TypeReg, Name: "../../etc/passwd", Mode: 0o644}, "root::0:0")
	})
	device := layerTar(t, func(l *imagetest.Layer) {
		l.Entry(tar.Header{Typeflag: tar.TypeBlock, Name: "dev/sda", Devmajor: 8, Mode: 0o600}, "")
	})
	good := dockerArchive(t, "app:1", one)
	bomb := gz(t, append(layerTar(t, func(l *imagetest.Layer) {}), make([]byte, 40<<20)...))
	many := make([][]byte, 128)
	for i := range many {
		many[i] = one
	}
	cfg := configFor(t, one)
	manifest := func(m dockerManifest) member {
		return member{name: "manifest.json", body: mustJSON(t, []dockerManifest{m})}
	}
	flip := func(suffix string) func([]member) []member {
		return func(ms []member) []member {
			for i := range ms {
				if strings.HasSuffix(ms[i].name, suffix) {
					ms[i].body = append([]byte(nil), ms[i].body...)
					ms[i].body[len(ms[i].body)/2] ^= 1
				}
			}
			return ms
		}
	}
	cases := map[string]struct {
		archive []byte
		want    []string
	}{
		"empty":            {nil, []string{"empty"}},
		"rubbish":          {bytes.Repeat([]byte("rubbish "), 500), []string{"archive"}},
		"no manifest":      {writeTar(t, member{name: "x", body: []byte("x")}), []string{"manifest.json", "index.json"}},
		"truncated":        {good[:len(good)/2], []string{"truncated", "a/layer.tar"}},
		"truncated gzip":   {gz(t, good)[:200], []string{"archive"}},
		"layer escapes":    {dockerArchive(t, "app:1", one, evil), []string{"b/layer.tar", "../../etc/passwd"}},
		"layer device":     {dockerArchive(t, "app:1", device), []string{"a/layer.tar", "dev/sda", "block device 8:0"}},
		"file escapes":     {writeTar(t, member{name: "../x", body: []byte("x")}), []string{"../x"}},
		"bomb":             {dockerArchive(t, "app:1", bomb), []string{"a/layer.tar", "larger than"}},
		"missing layer":    {writeTar(t, member{name: "c.json", body: cfg}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"l.tar", "missing"}},
		"missing config":   {writeTar(t, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"c.json", "missing"}},
		"another layer":    {writeTar(t, member{name: "c.json", body: cfg}, member{name: "l.tar", body: evil[:0:0]}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"l.tar"}},
		"wrong layer":      {writeTar(t, member{name: "c.json", body: cfg}, member{name: "l.tar", body: device}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"l.tar"}},
		"wrong config":     {writeTar(t, member{name: strings.Repeat("0", 64) + ".json", body: cfg}, member{name: "l.tar", body: one}, manifest(dockerManifest{Config: strings.Repeat("0", 64) + ".json", Layers: []string{"l.tar"}})), []string{"wrong digest"}},
		"config rubbish":   {writeTar(t, member{name: "c.json", body: []byte(`{"rootfs": 7}`)}, member{name: "l.tar", body: one}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"image config"}},
		"link loop":        {writeTar(t, member{name: "l.tar", link: "m.tar"}, member{name: "m.tar", link: "l.tar"}, member{name: "c.json", body: cfg}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar"}})), []string{"too many links"}},
		"windows":          {writeTar(t, member{name: "c.json", body: []byte(`{"os":"windows"}`)}, manifest(dockerManifest{Config: "c.json"})), []string{"windows"}},
		"bad name":         {dockerArchive(t, "UPPER CASE", one), []string{"UPPER CASE"}},
		"too many layers":  {dockerArchive(t, "app:1", many...), []string{"128 layers"}},
		"layer count":      {writeTar(t, member{name: "c.json", body: cfg}, member{name: "l.tar", body: one}, manifest(dockerManifest{Config: "c.json", Layers: []string{"l.tar", "l.tar"}})), []string{"layers"}},
		"oci bad layer":    {ociArchive(t, "app:1", [][]byte{gz(t, one)}, [][]byte{one}, flip(hashOf(gz(t, one))[7:])), []string{hashOf(gz(t, one))}},
		"oci bad config":   {ociArchive(t, "app:1", [][]byte{gz(t, one)}, [][]byte{one}, flip(hashOf(configFor(t, one))[7:])), []string{"wrong digest"}},
		"oci wrong diffid": {ociArchive(t, "app:1", [][]byte{gz(t, one)}, [][]byte{evil}, nil), []string{"wrong digest"}},
		"oci empty index":  {writeTar(t, member{name: "index.json", body: []byte(`{"schemaVersion":2}`)}), []string{"no image"}},
		"oci bad digest":   {writeTar(t, member{name: "index.json", body: []byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x"}]}`)}), []string{"bad descriptor"}},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			s := openStore(t, Options{MaxLayerBytes: 32 << 20})
			images, err := s.Load(context.Background(), bytes.NewReader(c.archive), nil)
			if !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Fatalf("%v, %v; want an invalid argument", images, err)
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error %q does not name %q", err, w)
				}
			}
			assertEmpty(t, s)
		})
	}
}

func TestSourceFailureIsNotTheArchivesFault(t *testing.T) {
	good, broken := dockerArchive(t, "app:1", hello(t)), errors.New("connection lost")
	for cut := 0; cut < len(good); cut += 700 {
		s := openStore(t, Options{})
		_, err := s.Load(context.Background(), io.MultiReader(bytes.NewReader(good[:cut]), &failing{broken}), nil)
		if !errors.Is(err, broken) || errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("after %d bytes: %v", cut, err)
		}
		assertEmpty(t, s)
		s.Close()
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

func TestSaveAndLoadAgain(t *testing.T) {
	ctx := context.Background()
	s := openStore(t, Options{Platform: "linux/amd64"})
	f := newRegistry(t, false)
	src := smallImage(t, "save", 3)
	ref := push(t, f, "app:1", src)
	s.opts.Keychain = pullOptions().Keychain
	pulled, err := s.Pull(ctx, ref, PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	loaded := load(t, s, imagetest.BusyboxImage(t))[0]
	if err := s.Tag(ctx, "busybox:test", "box:2"); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"docker", "oci"} {
		var one, two bytes.Buffer
		refs := []string{ref, "busybox:test", "box:2"}
		if err := s.Save(ctx, &one, refs, format); err != nil {
			t.Fatal(err)
		}
		if err := s.Save(ctx, &two, refs, format); err != nil || !bytes.Equal(one.Bytes(), two.Bytes()) {
			t.Errorf("%s: two saves differ, %v", format, err)
		}
		other := openStore(t, Options{Platform: "linux/amd64"})
		images, err := other.Load(ctx, bytes.NewReader(one.Bytes()), nil)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]*v1.Image{ref: pulled, "busybox:test": loaded, "box:2": loaded}
		for name, img := range want {
			if got, err := other.Get(ctx, name); err != nil || got.Id != img.Id || strings.Join(got.Layers, " ") != strings.Join(img.Layers, " ") {
				t.Errorf("%s: %s: %v, %v, of %d", format, name, got, err, len(images))
			}
		}
		var third bytes.Buffer
		if err := other.Save(ctx, &third, refs, format); err != nil || !bytes.Equal(one.Bytes(), third.Bytes()) {
			t.Errorf("%s: saved again after loading, it differs: %v", format, err)
		}
		independentCheck(t, format, one.Bytes(), src, ref)
	}
	if err := s.Save(ctx, io.Discard, []string{"nothing"}, "oci"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("save of an unknown image: %v", err)
	}
	if err := s.Save(ctx, io.Discard, []string{ref}, "zip"); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("save in an unknown format: %v", err)
	}
}

// independentCheck reads the archive with another implementation.
func independentCheck(t *testing.T, format string, archive []byte, src interface{ RawManifest() ([]byte, error) }, ref string) {
	t.Helper()
	dir := t.TempDir()
	if format == "docker" {
		p := filepath.Join(dir, "a.tar")
		if err := os.WriteFile(p, archive, 0o600); err != nil {
			t.Fatal(err)
		}
		tag, _ := name.NewTag(ref)
		img, err := tarball.ImageFromPath(p, &tag)
		if err == nil {
			err = validate.Image(img)
		}
		if err != nil {
			t.Errorf("docker-archive: %v", err)
		}
		return
	}
	tr := tar.NewReader(bytes.NewReader(archive))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		b, rerr := io.ReadAll(tr)
		if err != nil || rerr != nil {
			t.Fatal(err, rerr)
		}
		p := filepath.Join(dir, h.Name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	idx, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatalf("OCI layout: %v", err)
	}
	m, err := idx.IndexManifest()
	if err != nil || len(m.Manifests) != 3 {
		t.Fatalf("OCI layout: %v, %v", m, err)
	}
	img, err := idx.Image(m.Manifests[0].Digest)
	if err == nil {
		err = validate.Image(img) // it can't read plain layers: the pulled image only
	}
	if err != nil {
		t.Errorf("OCI layout: %v", err)
	}
	want, _ := src.RawManifest()
	if m.Manifests[0].Digest.String() != hashOf(want) {
		t.Errorf("the pulled image has not kept its manifest: %v", m.Manifests[0])
	}
}

func TestAllImagesOfAnArchiveOrNone(t *testing.T) {
	ctx := context.Background()
	one, two := hello(t), layerTar(t, func(l *imagetest.Layer) { l.File("two", 0o644, "2") })
	archive := func(second []byte) []byte {
		return writeTar(t, member{name: "1.tar", body: one}, member{name: "2.tar", body: two}, member{name: "1.json", body: configFor(t, one)}, member{name: "2.json", body: second},
			member{name: "manifest.json", body: mustJSON(t, []dockerManifest{
				{Config: "1.json", RepoTags: []string{"a:1", "a:2"}, Layers: []string{"1.tar"}}, {Config: "2.json", RepoTags: []string{"b:1"}, Layers: []string{"1.tar", "2.tar"}}})})
	}
	s := openStore(t, Options{Platform: "linux/amd64"})
	if _, err := s.Load(ctx, bytes.NewReader(archive(configFor(t, one, one))), nil); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("second image is wrong: %v", err)
	}
	assertEmpty(t, s)
	images, err := s.Load(ctx, bytes.NewReader(archive(configFor(t, one, two))), nil)
	if err != nil || len(images) != 2 || len(images[0].Names) != 2 || len(images[1].Layers) != 2 {
		t.Errorf("both right: %v, %v", images, err)
	}
	assertSound(t, s, true)
}

func TestTreesOverTheLimitAreReadAgain(t *testing.T) {
	// Each layer is within the limit of entries, all together are not.
	var layers [][]byte
	for i := range 5 {
		layers = append(layers, layerTar(t, func(l *imagetest.Layer) {
			for j := range 40 {
				l.File(fmt.Sprintf("f-%d-%d", i, j), 0o644, "x")
			}
		}))
	}
	s := openStore(t, Options{Platform: "linux/amd64", MaxLayerEntries: 50})
	if _, err := s.Load(context.Background(), bytes.NewReader(dockerArchive(t, "app:1", layers...)), nil); err != nil {
		t.Fatal(err)
	}
	assertSound(t, s, true)
}

func TestLoadNeedsLittleMemory(t *testing.T) {
	// 96 MiB of layer through a store whose limits allow it: what stays allocated
	// must be far below.
	big := &bigLayer{size: 96 << 20}
	s := openStore(t, Options{})
	done, result := make(chan struct{}), make(chan uint64)
	go func() { result <- peakHeap(done) }()
	img, err := s.Import(context.Background(), big.tar(t), "big:1", ImportOptions{})
	close(done)
	peak := <-result
	if err != nil || img.SizeBytes < 96<<20 {
		t.Fatalf("%v, %v", img, err)
	}
	if peak > 64<<20 {
		t.Errorf("peak heap %d MiB", peak>>20)
	}
}
