// Package volume keeps the disks of one host: named volumes and machines'
// scratch disks, as sparse ext4 image files. Data outlives containers, machines
// and Tandem itself.
//
//	s, err := volume.Open("/var/lib/tandem/volumes", volume.Options{})
//	v, err := s.Ensure(ctx, "shop-db", 10<<30) // made or grown; v.Path is a raw image
//	err = s.Use(ctx, "shop-db", "m-1")         // before it is attached: one holder at a time
//	err = s.Unuse(ctx, "shop-db", "m-1")       // after it was detached
//
// Errors belong to the classes of github.com/containerd/errdefs.
package volume

import "context"

// Volume is one disk.
type Volume struct {
	ID        string // [a-z0-9-]{1,64}
	Path      string // raw ext4 image
	SizeBytes int64  // virtual size
	UsedBytes int64  // blocks allocated on the host
	Holder    string // who has it in use (see Store.Use); empty: nobody, or nobody can tell
}

// Store makes and removes disks. Implemented by Open's result.
type Store interface {
	// Ensure makes the disk if it is not there; a larger size grows it (offline),
	// a smaller one is InvalidArgument.
	Ensure(ctx context.Context, id string, sizeBytes int64) (Volume, error)
	// EnsureScratch is Ensure for a disk that is worth nothing once its machine
	// stops: without a journal, copied from a template, never flushed. The first of
	// a size makes the template; each further one takes milliseconds.
	EnsureScratch(ctx context.Context, id string, sizeBytes int64) (Volume, error)
	Get(ctx context.Context, id string) (Volume, error)
	List(ctx context.Context) ([]Volume, error)
	// Remove deletes the disk; FailedPrecondition while Use holds it.
	Remove(ctx context.Context, id string) error
	// Use marks a disk as attached to a holder (machine id, or "metal"): one
	// writer at a time; FailedPrecondition names the other. Survives restarts.
	Use(ctx context.Context, id, holder string) error
	Unuse(ctx context.Context, id, holder string) error
	Close() error
}
