// Package image keeps the images of one host: pulled from a registry, loaded
// from an archive or imported from a root file-system tar; verified by digest;
// content-addressed; each layer converted once to a read-only ext4 block image,
// keyed by diffID, which machines get hot-attached and metal mounts by loop.
//
//	s, err := image.Open("/var/lib/tandem/images", image.Options{})
//	img, err := s.Pull(ctx, "nginx:1.27", image.PullOptions{})
//	err = s.Lease(ctx, "c-1", img.Id)            // stays while container c-1 needs it
//	layers, err := s.Layers(ctx, img.Id, nil)    // block images, the lowest first
//	err = s.Release(ctx, "c-1")
//
// Every operation either succeeds or leaves nothing behind; a kill at any point
// leaves only temporary files that the next Open removes.
//
// Errors belong to the classes of github.com/containerd/errdefs.
package image

import (
	"context"
	"io"

	v1 "tandem/api/tandem/v1"
)

// Layer is one layer of an image, ready for use.
type Layer struct {
	DiffID string // "sha256:…" of the uncompressed tar
	Path   string // read-only block image on this host
	FSType string // "ext4"
	Size   int64  // bytes of the block image
}

// ProgressFunc takes steps of long work; nil is allowed. It must not block.
type ProgressFunc func(*v1.Progress)

// PullOptions select what to pull and how to sign in.
type PullOptions struct {
	Platform string           // "linux/amd64" by default: this host's
	Auth     *v1.RegistryAuth // nil: ~/.docker/config.json, then anonymous
	Progress ProgressFunc
}

// ImportOptions describe a root file system that is imported.
type ImportOptions struct {
	Changes  []string // Dockerfile instructions: CMD, ENTRYPOINT, ENV, USER, WORKDIR, EXPOSE, LABEL, VOLUME, STOPSIGNAL, HEALTHCHECK
	Progress ProgressFunc
}

// Store is what the agent needs of a host's images. Implemented by Open's result.
type Store interface {
	Pull(ctx context.Context, ref string, o PullOptions) (*v1.Image, error)
	// Load reads a docker-archive or an OCI layout tar (plain, gzip or zstd).
	Load(ctx context.Context, r io.Reader, p ProgressFunc) ([]*v1.Image, error)
	// Save writes images; format is "docker" or "oci".
	Save(ctx context.Context, w io.Writer, refs []string, format string) error
	Import(ctx context.Context, r io.Reader, ref string, o ImportOptions) (*v1.Image, error)

	// Get finds an image by reference, id or unique id prefix.
	Get(ctx context.Context, ref string) (*v1.Image, error)
	List(ctx context.Context) ([]*v1.Image, error)
	Tag(ctx context.Context, source, target string) error
	// Remove takes a name away, and the image with its last name; FailedPrecondition
	// when it is in use and force is false.
	Remove(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error)

	// Layers returns the image's layers, lowest first, converting those that are
	// not yet. The caller must hold a lease on the image.
	Layers(ctx context.Context, id string, p ProgressFunc) ([]Layer, error)
	// Lease keeps an image and its layers for a holder (a container's or
	// machine's id) until released; leases survive restarts.
	Lease(ctx context.Context, holder, id string) error
	// LeaseSoon is Lease that does not wait for the disk: the lease holds as long as
	// this process lives, and when kept has returned without an error also after it.
	LeaseSoon(ctx context.Context, holder, id string) (kept func() error, err error)
	Release(ctx context.Context, holder string) error
	Leases(ctx context.Context) (map[string][]string, error)
	// Prune removes images without a name (all: without a lease too), unused
	// layers and blobs. Never what a lease holds.
	Prune(ctx context.Context, all bool) (deleted []string, reclaimed int64, err error)
	Close() error
}
