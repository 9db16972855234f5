package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"google.golang.org/protobuf/proto"
	v1 "tandem/api/tandem/v1"
)

// Pull brings an image from its registry, or a mirror of it. Layers that are
// here already are not fetched again. Callers that pull the same thing with the
// same credentials at the same time share one download. Requests that fail for a
// passing reason are tried again; a layer starts from its beginning then.
//
// NotFound, Unauthenticated, PermissionDenied, Unavailable (registry not
// reached), ResourceExhausted (disk full, rate limit) and InvalidArgument (bad
// content, naming the layer) leave the store as it was.
func (s *LocalStore) Pull(ctx context.Context, ref string, o PullOptions) (*v1.Image, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	named, err := parseRef(ref)
	if err != nil {
		return nil, err
	}
	want := o.Platform
	if want == "" {
		want = s.opts.Platform
	} else if n := strings.Count(want, "/"); n < 1 || n > 2 || !strings.HasPrefix(want, "linux/") {
		return nil, fmt.Errorf("platform %q; write linux/ARCH or linux/ARCH/VARIANT: %w", want, errdefs.ErrInvalidArgument)
	}
	auth := ""
	if o.Auth != nil {
		auth = hashOf([]byte(strings.Join([]string{o.Auth.Username, o.Auth.Password, o.Auth.Token}, "\x00")))
	}
	key := strings.Join([]string{named.String(), want, auth}, " ")
	img, _, err := s.pullWork.do(ctx, key, o.Progress, func(ctx context.Context, p ProgressFunc) (*v1.Image, error) {
		done, err := s.begin(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		return s.pull(ctx, named, want, o, p)
	})
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", reference.FamiliarString(named), remoteError(err))
	}
	return proto.Clone(img).(*v1.Image), nil
}

func (s *LocalStore) pull(ctx context.Context, named reference.Named, want string, o PullOptions, p ProgressFunc) (*v1.Image, error) {
	what := "image " + reference.FamiliarString(named)
	tell(p, &v1.Progress{Id: what, Action: "resolving"})
	list, tr, err := s.endpoints(ctx, named, o.Auth)
	if err != nil {
		return nil, err
	}
	defer tr.close()
	var errs []error
	for i, e := range list {
		n, m, err := s.resolveRemote(ctx, e, named, want, o.Platform != "")
		if err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			if e.mirror {
				err = fmt.Errorf("mirror %s: %w", e.repo.Name(), err)
				s.opts.Logger.Warn("mirror has no answer", "image", named.String(), "error", err)
			}
			errs = append(errs, err)
			continue
		}
		n.names = []string{named.String()}
		// The one that answered first, then those after it.
		n.layer = func(j int) layerSource { return s.remoteLayer(list[i:], m.Layers[j]) }
		if err := s.roomFor(n, m); err != nil {
			return nil, err
		}
		images, err := s.add(ctx, []newImage{*n}, p)
		if err != nil {
			return nil, err
		}
		tell(p, &v1.Progress{Id: what, Action: "pulled", Message: n.digest, Done: true})
		return images[0], nil
	}
	// The registry's own answer comes last and counts.
	last := errs[len(errs)-1]
	if len(errs) > 1 {
		return nil, fmt.Errorf("%w (before that: %v)", last, errors.Join(errs[:len(errs)-1]...))
	}
	return nil, last
}

// resolveRemote fetches manifest and config from one endpoint.
func (s *LocalStore) resolveRemote(ctx context.Context, e *endpoint, named reference.Named, want string, asked bool) (*newImage, *manifestFile, error) {
	ident := "latest"
	switch r := named.(type) {
	case reference.Digested:
		ident = r.Digest().String()
	case reference.Tagged:
		ident = r.Tag()
	}
	n := &newImage{}
	for depth := 0; ; depth++ {
		d, raw, err := s.fetchManifest(ctx, e, ident)
		if err != nil {
			return nil, nil, err
		}
		if n.digest == "" {
			n.digest = d.Digest
		}
		m, err := decodeManifest("manifest "+d.Digest, raw)
		if err != nil {
			return nil, nil, err
		}
		if m.Config != nil {
			n.manifest = &manifestRecord{Digest: d.Digest, MediaType: manifestType(m, d), Raw: raw}
			for _, l := range m.Layers {
				n.manifest.Blobs = append(n.manifest.Blobs, l.Digest)
			}
			return n, m, s.fetchConfig(ctx, e, n, m, want, asked)
		}
		if depth >= maxIndexDepth {
			return nil, nil, badArchive("indexes nested more than %d deep", maxIndexDepth)
		}
		child, err := choose("it", m.Manifests, want)
		if err != nil {
			return nil, nil, err
		}
		ident = child.Digest
	}
}

func (s *LocalStore) fetchManifest(ctx context.Context, e *endpoint, ident string) (d descriptor, raw []byte, err error) {
	err = s.retry(ctx, "manifest "+ident, func() error {
		wctx, _, stop := s.watch(ctx)
		defer stop()
		d, raw, err = e.manifest(wctx, ident)
		if err != nil && errors.Is(context.Cause(wctx), errStalled) {
			err = fmt.Errorf("%s: %w", e.repo.RegistryStr(), errStalled)
		}
		return err
	})
	return d, raw, err
}

// fetchConfig fetches and checks the image's configuration against its manifest.
func (s *LocalStore) fetchConfig(ctx context.Context, e *endpoint, n *newImage, m *manifestFile, want string, asked bool) error {
	switch m.Config.MediaType {
	case "", typeOCIConfig, "application/vnd.docker.container.image.v1+json":
	default:
		return fmt.Errorf("it is no container image but %q: %w", m.Config.MediaType, errdefs.ErrInvalidArgument)
	}
	if m.Config.Size > maxConfigBytes {
		return badConfig("%d bytes, more than %d", m.Config.Size, maxConfigBytes)
	}
	err := s.retry(ctx, "config "+m.Config.Digest, func() error {
		wctx, wrap, stop := s.watch(ctx)
		defer stop()
		body, err := e.blob(wctx, m.Config.Digest)
		if err != nil {
			return err
		}
		defer body.Close()
		var b bytes.Buffer
		if _, err := io.Copy(&b, io.LimitReader(wrap(body), maxConfigBytes+1)); err != nil {
			return &sourceError{err}
		}
		n.config = b.Bytes()
		return nil
	})
	if err != nil {
		return fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	if got := hashOf(n.config); got != m.Config.Digest {
		return badConfig("wrong digest: content is %s, the manifest says %s", got, m.Config.Digest)
	}
	c, err := decodeConfig(n.config)
	if err != nil {
		return err
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return badConfig("it has %d layers, the manifest %d", len(c.RootFS.DiffIDs), len(m.Layers))
	}
	for _, l := range m.Layers {
		if strings.Contains(l.MediaType, "foreign") || strings.Contains(l.MediaType, "nondistributable") || strings.Contains(l.MediaType, "encrypted") {
			return fmt.Errorf("layer %s: layers of type %q are not supported: %w", l.Digest, l.MediaType, errdefs.ErrInvalidArgument)
		}
	}
	if !asked {
		return hostPlatform(c, want)
	}
	return nil
}

// roomFor checks before the first byte whether the layers can fit: each is kept
// as it comes and once more, at least as large, as a block image.
func (s *LocalStore) roomFor(n *newImage, m *manifestFile) error {
	c, err := decodeConfig(n.config)
	if err != nil {
		return err
	}
	var need int64
	seen := map[string]bool{}
	for i, l := range m.Layers {
		d := c.RootFS.DiffIDs[i]
		if _, have, err := s.layerComplete(d); err != nil {
			return err
		} else if have || seen[d] {
			continue
		}
		seen[d] = true
		if l.Size > s.opts.MaxLayerBytes {
			return fmt.Errorf("layer %s has %d bytes, more than %d: %w", l.Digest, l.Size, s.opts.MaxLayerBytes, errdefs.ErrInvalidArgument)
		}
		if need += l.Size; need > s.opts.MaxImageBytes {
			return fmt.Errorf("its layers have more than %d bytes: %w", s.opts.MaxImageBytes, errdefs.ErrInvalidArgument)
		}
	}
	return s.needSpace("layers", 2*need)
}

// remoteLayer downloads and stages a layer, from the first endpoint that has it right.
func (s *LocalStore) remoteLayer(list []*endpoint, l descriptor) layerSource {
	return func(ctx context.Context, p ProgressFunc) (*staged, *workDir, error) {
		dir, err := s.newWorkDir()
		if err != nil {
			return nil, nil, err
		}
		var errs []error
		for _, e := range list {
			var st *staged
			err := s.retry(ctx, "layer "+l.Digest, func() (err error) {
				st, err = s.download(ctx, e, l, dir.path, p)
				return err
			})
			if err == nil {
				return st, dir, nil
			}
			errs = append(errs, fmt.Errorf("from %s: %w", e.repo.RegistryStr(), err))
			if ctx.Err() != nil || errors.Is(err, errdefs.ErrResourceExhausted) {
				break
			}
		}
		dir.release()
		return nil, nil, errors.Join(errs...)
	}
}

func (s *LocalStore) download(ctx context.Context, e *endpoint, l descriptor, dir string, p ProgressFunc) (*staged, error) {
	id := "layer " + l.Digest
	tell(p, &v1.Progress{Id: id, Action: "pulling", Total: l.Size, Unit: "bytes"})
	wctx, wrap, stop := s.watch(ctx)
	defer stop()
	body, err := e.blob(wctx, l.Digest)
	if err != nil {
		if errors.Is(context.Cause(wctx), errStalled) {
			err = errStalled
		}
		return nil, fmt.Errorf("%s: %w", id, err)
	}
	defer body.Close()
	st, err := s.stage(ctx, dir, wrap(body), stageOptions{
		what: id, digest: l.Digest, size: l.Size, maxBytes: l.Size,
		onBytes: func(n int64) {
			tell(p, &v1.Progress{Id: id, Action: "pulling", Current: n, Total: l.Size, Unit: "bytes"})
		},
	})
	if err == nil {
		tell(p, &v1.Progress{Id: id, Action: "pulled", Current: l.Size, Total: l.Size, Unit: "bytes", Done: true})
	}
	return st, err
}
