package image

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	v1 "tandem/api/tandem/v1"
)

// endpoint is one place to fetch from: a mirror or the registry itself.
type endpoint struct {
	repo   name.Repository
	mirror bool
	puller *remote.Puller
}

// endpoints lists the mirrors of a reference's registry, then the registry.
func (s *LocalStore) endpoints(ctx context.Context, named reference.Named, auth *v1.RegistryAuth) ([]*endpoint, *hostTransport, error) {
	domain, path := reference.Domain(named), reference.Path(named)
	var list []*endpoint
	plain := slices.Clone(s.opts.Insecure)
	add := func(host, repo string, insecure, mirror bool) error {
		var opts []name.Option
		if insecure {
			opts = append(opts, name.Insecure)
			plain = append(plain, host)
		}
		r, err := name.NewRegistry(host, opts...)
		if err != nil {
			return fmt.Errorf("registry %q: %v: %w", host, err, errdefs.ErrInvalidArgument)
		}
		list = append(list, &endpoint{repo: r.Repo(repo), mirror: mirror})
		return nil
	}
	for _, m := range s.opts.Mirrors[domain] {
		host, insecure := strings.CutPrefix(m, "http://")
		host = strings.Trim(strings.TrimPrefix(host, "https://"), "/")
		host, prefix, _ := strings.Cut(host, "/")
		repo := path
		if prefix = strings.Trim(prefix, "/"); prefix != "" {
			repo = prefix + "/" + path
		}
		if err := add(host, repo, insecure, true); err != nil {
			return nil, nil, fmt.Errorf("mirror of %s: %w", domain, err)
		}
	}
	if err := add(domain, path, slices.Contains(s.opts.Insecure, domain), false); err != nil {
		return nil, nil, err
	}
	tr := newHostTransport(s.opts, plain)
	for _, e := range list {
		opts := []remote.Option{
			remote.WithContext(ctx), remote.WithTransport(tr), remote.WithUserAgent("tandem"),
			// Attempts are counted here, once, not in the library as well.
			remote.WithRetryBackoff(remote.Backoff{Steps: 1}),
			remote.WithRetryPredicate(func(error) bool { return false }),
			remote.WithRetryStatusCodes(),
		}
		if auth != nil && !e.mirror {
			opts = append(opts, remote.WithAuth(authn.FromConfig(authn.AuthConfig{
				Username: auth.Username, Password: auth.Password, RegistryToken: auth.Token,
			})))
		} else {
			opts = append(opts, remote.WithAuthFromKeychain(s.opts.Keychain))
		}
		p, err := remote.NewPuller(opts...)
		if err != nil {
			return nil, nil, fmt.Errorf("registry %s: %w", e.repo.RegistryStr(), err)
		}
		e.puller = p
	}
	return list, tr, nil
}

// manifest fetches a manifest or index by tag or digest.
func (e *endpoint) manifest(ctx context.Context, ident string) (descriptor, []byte, error) {
	var ref name.Reference = e.repo.Tag(ident)
	if strings.HasPrefix(ident, "sha256:") {
		ref = e.repo.Digest(ident)
	}
	d, err := e.puller.Get(ctx, ref)
	if err != nil {
		return descriptor{}, nil, err
	}
	mt := string(d.MediaType)
	if strings.Contains(mt, "docker.distribution.manifest.v1+") {
		return descriptor{}, nil, fmt.Errorf("the registry has it only in the withdrawn manifest format of schema 1; push it again with a newer client: %w", errdefs.ErrInvalidArgument)
	}
	return descriptor{MediaType: mt, Digest: d.Digest.String(), Size: d.Size}, d.Manifest, nil
}

// blob opens a blob; the content is not checked here.
func (e *endpoint) blob(ctx context.Context, digest string) (io.ReadCloser, error) {
	l, err := e.puller.Layer(ctx, e.repo.Digest(digest))
	if err != nil {
		return nil, err
	}
	body, err := l.Compressed()
	if err != nil {
		return nil, err
	}
	return &blobBody{body}, nil
}

// blobBody tells a wrong digest, which the library finds at the end, from a
// failure to read.
type blobBody struct{ io.ReadCloser }

// Read implements io.Reader.
func (b *blobBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil && strings.Contains(err.Error(), "error verifying") {
		err = fmt.Errorf("wrong digest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return n, err
}

var errStalled = errors.New("no byte came for too long")

// watch cancels what reads r when no byte comes for the store's StallTimeout.
func (s *LocalStore) watch(ctx context.Context) (context.Context, func(io.Reader) io.Reader, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	alive := make(chan struct{}, 1)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-alive:
			case <-s.opts.Clock.After(s.opts.StallTimeout):
				cancel(errStalled)
				return
			}
		}
	}()
	wrap := func(r io.Reader) io.Reader {
		return readerFunc(func(p []byte) (int, error) {
			n, err := r.Read(p)
			if n > 0 {
				select {
				case alive <- struct{}{}:
				default:
				}
			}
			if err != nil && errors.Is(context.Cause(ctx), errStalled) {
				err = errStalled
			}
			return n, err
		})
	}
	return ctx, wrap, func() { cancel(nil) }
}

type readerFunc func([]byte) (int, error)

// Read implements io.Reader.
func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// retry runs f until it succeeds, fails for good or has had its attempts.
func (s *LocalStore) retry(ctx context.Context, what string, f func() error) error {
	delay := s.opts.RetryDelay
	for attempt := 1; ; attempt++ {
		err := f()
		if err == nil || attempt >= s.opts.Retries || ctx.Err() != nil || !passing(err) {
			return err
		}
		s.opts.Logger.Warn("trying again", "what", what, "attempt", attempt, "in", delay, "error", err)
		select {
		case <-s.opts.Clock.After(delay):
		case <-ctx.Done():
			return ctx.Err()
		}
		delay *= 2
	}
}

// passing tells whether the same request may well succeed a moment later.
func passing(err error) bool {
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout, 499, 522:
			return true
		}
		return false
	}
	var certErr *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	var dns *net.DNSError
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, errdefs.ErrInvalidArgument), errors.Is(err, errPlainHTTP), errors.As(err, &certErr), errors.As(err, &unknown),
		errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOSPC):
		return false
	case errors.As(err, &dns):
		return dns.IsTemporary || dns.IsTimeout
	case errors.Is(err, errStalled), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return true
	}
	var ne net.Error
	var se *sourceError
	return errors.As(err, &se) || errors.As(err, &ne) && ne.Timeout()
}

// remoteError gives an error of a registry its class and says what to do.
func remoteError(err error) error {
	for _, known := range []error{errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrFailedPrecondition, errdefs.ErrResourceExhausted, errdefs.ErrDataLoss, errdefs.ErrAborted, context.Canceled} {
		if errors.Is(err, known) {
			return err
		}
	}
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusUnauthorized:
			return fmt.Errorf("%w; sign in, or check the name: %w", err, errdefs.ErrUnauthenticated)
		case http.StatusForbidden:
			return fmt.Errorf("%w; these credentials may not pull it: %w", err, errdefs.ErrPermissionDenied)
		case http.StatusNotFound:
			return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		case http.StatusTooManyRequests:
			return fmt.Errorf("%w; wait, or sign in for a higher limit: %w", err, errdefs.ErrResourceExhausted)
		}
	}
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		return fmt.Errorf("%w; put the registry's authority into /etc/tandem/certs.d/HOST:PORT/ca.crt: %w", err, errdefs.ErrUnavailable)
	}
	if strings.Contains(err.Error(), "does not match requested digest") {
		return fmt.Errorf("wrong digest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}
