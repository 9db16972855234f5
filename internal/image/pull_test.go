package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestPullTwiceFetchesOnce(t *testing.T) {
	ctx := context.Background()
	f := newRegistry(t, false)
	src := smallImage(t, "a", 3)
	ref := push(t, f, "team/app:1", src)
	s := openStore(t, pullOptions())
	var mu sync.Mutex
	seen := map[string]int64{}
	img, err := s.Pull(ctx, ref, PullOptions{Progress: func(p *v1.Progress) {
		mu.Lock()
		defer mu.Unlock()
		seen[p.Action] = max(seen[p.Action], p.Current)
	}})
	if err != nil {
		t.Fatal(err)
	}
	want, _ := src.ConfigName()
	digest, _ := src.Digest()
	if img.Id != want.String() || len(img.Layers) != 3 || img.Names[0] != ref || img.Digests[0] != f.host()+"/team/app@"+digest.String() {
		t.Errorf("image: %v", img)
	}
	for _, a := range []string{"pulling", "converting", "ready"} {
		if seen[a] == 0 {
			t.Errorf("no progress of %q: %v", a, seen)
		}
	}
	n := f.blobs.Load()
	if _, err := s.Pull(ctx, ref, PullOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := f.blobs.Load() - n; got != 1 { // the config
		t.Errorf("second pull fetched %d blobs, want the config only", got)
	}
	byDigest := f.host() + "/team/app@" + digest.String()
	if got, err := s.Get(ctx, byDigest); err != nil || got.Id != img.Id {
		t.Errorf("get by digest: %v, %v", got, err)
	}
	if got, err := s.Pull(ctx, byDigest, PullOptions{}); err != nil || len(got.Names) != 1 {
		t.Errorf("pull by digest: %v, %v", got, err)
	}
	if _, err := s.Pull(ctx, f.host()+"/team/app@sha256:"+strings.Repeat("0", 64), PullOptions{}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("unknown digest: %v", err)
	}
	if _, err := s.Pull(ctx, f.host()+"/team/none:1", PullOptions{}); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("unknown name: %v", err)
	}
}

func TestConcurrentPullsShareTheWork(t *testing.T) {
	f := newRegistry(t, false)
	ref := push(t, f, "app:1", smallImage(t, "shared", 4))
	s := openStore(t, pullOptions())
	gate := make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if strings.Contains(r.URL.Path, "/manifests/") {
			<-gate
		}
		h.ServeHTTP(w, r)
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), ref, PullOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	wait(t, func() bool {
		s.pullWork.mu.Lock()
		defer s.pullWork.mu.Unlock()
		for _, c := range s.pullWork.calls {
			return c.waiters == 8
		}
		return false
	})
	close(gate)
	wg.Wait()
	if got := f.blobs.Load(); got != 5 {
		t.Errorf("%d blobs were fetched, want 4 layers and a config", got)
	}
}

func TestPullPlatforms(t *testing.T) {
	f := newRegistry(t, false)
	amd, arm := smallImage(t, "amd", 1), smallImage(t, "arm", 1)
	c, _ := arm.ConfigFile()
	c.Architecture = "arm64"
	arm, err := mutate.ConfigFile(arm, c)
	if err != nil {
		t.Fatal(err)
	}
	idx := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: arm, Descriptor: ggcr.Descriptor{Platform: &ggcr.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}},
		mutate.IndexAddendum{Add: amd, Descriptor: ggcr.Descriptor{Platform: &ggcr.Platform{OS: "linux", Architecture: "amd64"}}})
	r, _ := name.ParseReference(f.host() + "/multi:1")
	if err := remote.WriteIndex(r, idx); err != nil {
		t.Fatal(err)
	}
	single := push(t, f, "armonly:1", arm)
	ctx, s := context.Background(), openStore(t, pullOptions())
	for platform, want := range map[string]ggcr.Image{"": amd, "linux/amd64": amd, "linux/arm64": arm, "linux/arm64/v8": arm} {
		id, _ := want.ConfigName()
		if img, err := s.Pull(ctx, r.String(), PullOptions{Platform: platform}); err != nil || img.Id != id.String() {
			t.Errorf("platform %q: %v, %v", platform, img, err)
		}
	}
	if _, err := s.Pull(ctx, r.String(), PullOptions{Platform: "linux/s390x"}); !errors.Is(err, errdefs.ErrNotFound) || !strings.Contains(err.Error(), "linux/arm64/v8") {
		t.Errorf("missing platform: %v", err)
	}
	if _, err := s.Pull(ctx, r.String(), PullOptions{Platform: "windows"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("bad platform: %v", err)
	}
	if _, err := s.Pull(ctx, single, PullOptions{}); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("foreign image without asking: %v", err)
	}
}

func TestPullFromBadRegistries(t *testing.T) {
	isLayer := func(r *http.Request, biggest string) bool { return strings.HasSuffix(r.URL.Path, biggest) }
	cases := map[string]struct {
		tamper func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool
		class  error // nil: the pull succeeds in the end
		text   string
	}{
		"500 twice": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			if isLayer(r, layer) && n < 3 {
				w.WriteHeader(500)
				return true
			}
			return false
		}},
		"500 for ever": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			if isLayer(r, layer) {
				w.WriteHeader(500)
				return true
			}
			return false
		}, class: errdefs.ErrUnavailable, text: "500"},
		"cut once": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return isLayer(r, layer) && n < 2 && cutBody(w, r, h)
		}},
		"cut always": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return isLayer(r, layer) && cutBody(w, r, h)
		}, class: errdefs.ErrUnavailable, text: "layer sha256:"},
		"corrupt": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return isLayer(r, layer) && changeBody(w, r, h, func(b []byte) []byte { b[len(b)/2] ^= 0xff; return b })
		}, class: errdefs.ErrInvalidArgument, text: "wrong digest"},
		"another blob": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return isLayer(r, layer) && changeBody(w, r, h, func(b []byte) []byte { return []byte("not what was asked for") })
		}, class: errdefs.ErrInvalidArgument, text: "layer sha256:"},
		"endless": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return isLayer(r, layer) && changeBody(w, r, h, func(b []byte) []byte { return append(b, make([]byte, 1<<20)...) })
		}, class: errdefs.ErrInvalidArgument, text: "layer sha256:"},
		"manifest is rubbish": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			return strings.Contains(r.URL.Path, "/manifests/") && changeBody(w, r, h, func(b []byte) []byte { return []byte("[1,2") })
		}, class: errdefs.ErrInvalidArgument, text: "manifest"},
		"sign in": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
			return true
		}, class: errdefs.ErrUnauthenticated},
		"slow down": {tamper: func(n int32, layer string, w http.ResponseWriter, r *http.Request, h http.Handler) bool {
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.WriteHeader(429)
				return true
			}
			return false
		}, class: errdefs.ErrResourceExhausted},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newRegistry(t, false)
			src := smallImage(t, what, 3)
			ref := push(t, f, "app:1", src)
			layers, _ := src.Layers()
			d, _ := layers[1].Digest()
			var n atomic.Int32
			f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
				count := n.Load()
				if r.Method == http.MethodGet && isLayer(r, d.String()) {
					count = n.Add(1)
				}
				if !c.tamper(count, d.String(), w, r, h) {
					h.ServeHTTP(w, r)
				}
			})
			o := pullOptions()
			o.Retries = 3
			s := openStore(t, o)
			_, err := s.Pull(context.Background(), ref, PullOptions{})
			if c.class == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("error %v, want %v with %q", err, c.class, c.text)
			}
			assertEmpty(t, s)
			if l, _ := s.List(context.Background()); len(l) > 0 {
				t.Errorf("images: %v", l)
			}
		})
	}
}

// cutBody sends half of what was promised and closes the connection.
func cutBody(w http.ResponseWriter, r *http.Request, h http.Handler) bool {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	w.Header().Set("Content-Length", fmt.Sprint(rec.Body.Len()))
	w.WriteHeader(rec.Code)
	w.Write(rec.Body.Bytes()[:rec.Body.Len()/2])
	panic(http.ErrAbortHandler)
}

func changeBody(w http.ResponseWriter, r *http.Request, h http.Handler, change func([]byte) []byte) bool {
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, r)
	for k, v := range rec.Header() {
		if k != "Content-Length" {
			w.Header()[k] = v
		}
	}
	w.WriteHeader(rec.Code)
	w.Write(change(rec.Body.Bytes()))
	return true
}

func TestStalledDownloadIsTriedAgain(t *testing.T) {
	f := newRegistry(t, false)
	src := smallImage(t, "stall", 1)
	ref := push(t, f, "app:1", src)
	layers, _ := src.Layers()
	d, _ := layers[0].Digest()
	var n atomic.Int32
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if strings.HasSuffix(r.URL.Path, d.String()) && n.Add(1) == 1 {
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(200)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			return
		}
		h.ServeHTTP(w, r)
	})
	o := pullOptions()
	o.StallTimeout = 2 * time.Second
	s := openStore(t, o)
	if _, err := s.Pull(context.Background(), ref, PullOptions{}); err != nil || n.Load() != 2 {
		t.Errorf("%v after %d requests", err, n.Load())
	}
}

func TestCancelledPullLeavesNothing(t *testing.T) {
	f := newRegistry(t, false)
	src := smallImage(t, "cancel", 3)
	ref := push(t, f, "app:1", src)
	layers, _ := src.Layers()
	d, _ := layers[2].Digest()
	reached := make(chan struct{})
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, d.String()) {
			close(reached)
			<-r.Context().Done()
			return
		}
		h.ServeHTTP(w, r)
	})
	s := openStore(t, pullOptions())
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-reached; cancel() }()
	if _, err := s.Pull(ctx, ref, PullOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("error: %v", err)
	}
	assertEmpty(t, s)
}
