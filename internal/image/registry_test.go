package image

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tandem/internal/image/imagetest"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// fakeRegistry is a real registry with a door that tests can tamper with.
type fakeRegistry struct {
	*httptest.Server
	mu     sync.Mutex
	tamper func(http.ResponseWriter, *http.Request, http.Handler) // nil: none
	blobs  atomic.Int32                                           // GETs of blobs
}

func newRegistry(t testing.TB, secure bool) *fakeRegistry {
	t.Helper()
	f := &fakeRegistry{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			f.blobs.Add(1)
		}
		f.mu.Lock()
		tamper := f.tamper
		f.mu.Unlock()
		if tamper != nil {
			tamper(w, r, inner)
			return
		}
		inner.ServeHTTP(w, r)
	})
	f.Server = httptest.NewUnstartedServer(h)
	f.Config.ErrorLog = log.New(io.Discard, "", 0)
	if secure {
		f.StartTLS()
	} else {
		f.Start()
	}
	t.Cleanup(f.Close)
	return f
}

func (f *fakeRegistry) host() string {
	_, h, _ := strings.Cut(f.URL, "://")
	return h
}

func (f *fakeRegistry) set(tamper func(http.ResponseWriter, *http.Request, http.Handler)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tamper = tamper
}

// smallImage has n layers of some KiB.
func smallImage(t testing.TB, seed string, n int) ggcr.Image {
	t.Helper()
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	for i := range n {
		l := &imagetest.Layer{}
		l.File(fmt.Sprintf("file-%d", i), 0o644, strings.Repeat(fmt.Sprintf("%s %d\n", seed, i), 2000))
		img = appendLayer(t, img, l)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c.Architecture, c.OS, c.Config.Cmd = "amd64", "linux", []string{"sh"}
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func appendLayer(t testing.TB, img ggcr.Image, l *imagetest.Layer) ggcr.Image {
	t.Helper()
	raw, err := l.Tar()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(raw)), nil }, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, layer); err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t testing.TB, f *fakeRegistry, ref string, img ggcr.Image, o ...remote.Option) string {
	t.Helper()
	r, err := name.ParseReference(f.host() + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img, append(o, remote.WithTransport(f.Client().Transport))...); err != nil {
		t.Fatal(err)
	}
	return r.String()
}

func pullOptions() Options {
	return Options{Platform: "linux/amd64", RetryDelay: time.Millisecond, Keychain: authn.NewMultiKeychain()}
}

func wait(t testing.TB, ready func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ready(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited a minute in vain")
		}
	}
}
