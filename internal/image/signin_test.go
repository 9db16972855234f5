package image

import (
	"context"
	"encoding/pem"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	v1 "tandem/api/tandem/v1"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

func TestTLSAndSignIn(t *testing.T) {
	ctx := context.Background()
	f := newRegistry(t, true)
	src := smallImage(t, "tls", 1)
	signedIn := remote.WithAuth(&authn.Basic{Username: "u", Password: "p"})
	f.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if u, p, _ := r.BasicAuth(); u != "u" || p != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(401)
			return
		}
		h.ServeHTTP(w, r)
	})
	ref := push(t, f, "app:1", src, signedIn)
	certs := t.TempDir()
	o := pullOptions()
	o.CertsDirs = []string{certs}
	s := openStore(t, o)
	good := PullOptions{Auth: &v1.RegistryAuth{Username: "u", Password: "p"}}
	if _, err := s.Pull(ctx, ref, good); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "certs.d") {
		t.Errorf("unknown authority: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(certs, f.host()), 0o755); err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(certs, f.host(), "ca.crt"), ca, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Pull(ctx, ref, PullOptions{}); !errors.Is(err, errdefs.ErrUnauthenticated) {
		t.Errorf("without credentials: %v", err)
	}
	if _, err := s.Pull(ctx, ref, PullOptions{Auth: &v1.RegistryAuth{Username: "u", Password: "wrong"}}); !errors.Is(err, errdefs.ErrUnauthenticated) || strings.Contains(err.Error(), "wrong") {
		t.Errorf("wrong credentials: %v", err)
	}
	if _, err := s.Pull(ctx, ref, good); err != nil {
		t.Errorf("with credentials: %v", err)
	}
	docker := t.TempDir()
	t.Setenv("DOCKER_CONFIG", docker)
	if err := os.WriteFile(filepath.Join(docker, "config.json"), []byte(`{"auths":{"`+f.host()+`":{"auth":"dTpw"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	o.Keychain = nil
	if _, err := openStore(t, o).Pull(ctx, ref, PullOptions{}); err != nil {
		t.Errorf("with docker's config.json: %v", err)
	}
}

func TestMirrors(t *testing.T) {
	ctx := context.Background()
	up, mirror := newRegistry(t, false), newRegistry(t, false)
	src := smallImage(t, "mirrored", 2)
	ref := push(t, up, "team/app:1", src)
	push(t, mirror, "cache/team/app:1", src)
	var leaked atomic.Bool
	check := func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if r.Header.Get("Authorization") != "" {
			leaked.Store(true)
		}
		h.ServeHTTP(w, r)
	}
	mirror.set(check)
	o := pullOptions()
	o.Mirrors = map[string][]string{up.host(): {"http://127.0.0.1:1", mirror.URL + "/cache"}}
	auth := PullOptions{Auth: &v1.RegistryAuth{Username: "u", Password: "p"}}
	img, err := openStore(t, o).Pull(ctx, ref, auth)
	if err != nil || img.Names[0] != ref || up.blobs.Load() != 0 || mirror.blobs.Load() != 3 {
		t.Errorf("from the mirror: %v, %v, %d and %d blobs", img, err, up.blobs.Load(), mirror.blobs.Load())
	}
	if leaked.Load() {
		t.Error("credentials for the registry were sent to its mirror")
	}
	layers, _ := src.Layers()
	d, _ := layers[0].Digest()
	mirror.set(func(w http.ResponseWriter, r *http.Request, h http.Handler) {
		if strings.HasSuffix(r.URL.Path, d.String()) {
			changeBody(w, r, h, func(b []byte) []byte { b[9] ^= 1; return b })
			return
		}
		h.ServeHTTP(w, r)
	})
	if _, err := openStore(t, o).Pull(ctx, ref, PullOptions{}); err != nil || up.blobs.Load() != 1 {
		t.Errorf("one bad layer at the mirror: %v, %d blobs of the registry", err, up.blobs.Load())
	}
	mirror.Close()
	if _, err := openStore(t, o).Pull(ctx, ref, PullOptions{}); err != nil {
		t.Errorf("mirror down: %v", err)
	}
}

func TestPlainHTTPNeedsPermission(t *testing.T) {
	tr := newHostTransport(Options{}.withDefaults(), []string{"plain.example:80"})
	defer tr.close()
	for url, allowed := range map[string]bool{
		"http://10.0.0.1/v2/": false, "http://registry.local/v2/": false, "http://plain.example:81/": false,
	} {
		req, _ := http.NewRequest(http.MethodGet, url, nil)
		_, err := tr.RoundTrip(req)
		if got := !errors.Is(err, errPlainHTTP); got != allowed {
			t.Errorf("%s: %v", url, err)
		}
	}
	for host, want := range map[string]bool{"localhost": true, "127.0.0.1": true, "127.1.2.3": true, "::1": true, "a.localhost": true, "10.0.0.1": false, "localhost.evil.example": false} {
		if isLoopback(host) != want {
			t.Errorf("loopback %s: %v", host, !want)
		}
	}
}
