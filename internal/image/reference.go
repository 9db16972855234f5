package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	bolt "go.etcd.io/bbolt"
)

var (
	fullID   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	idPrefix = regexp.MustCompile(`^(sha256:)?[0-9a-f]{4,64}$`)
)

// Normalize returns the name under which the store knows a reference:
// "busybox" becomes "docker.io/library/busybox:latest". InvalidArgument when it
// is no reference.
func Normalize(ref string) (string, error) {
	n, err := parseRef(ref)
	if err != nil {
		return "", err
	}
	return n.String(), nil
}

// Familiar shortens a stored name for people: "busybox:latest". What is no
// reference is returned as it is.
func Familiar(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return reference.FamiliarString(n)
}

func parseRef(ref string) (reference.Named, error) {
	if len(ref) > 1024 {
		return nil, fmt.Errorf("image reference of %d bytes: %w", len(ref), errdefs.ErrInvalidArgument)
	}
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, fmt.Errorf("image reference %q: %v; write NAME[:TAG] or NAME@sha256:DIGEST: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if d, ok := n.(reference.Digested); ok {
		if d.Digest().Algorithm() != "sha256" {
			return nil, fmt.Errorf("image reference %q: only sha256 digests are supported: %w", ref, errdefs.ErrInvalidArgument)
		}
		// A digest says all; a tag beside it would only mislead.
		return reference.WithDigest(reference.TrimNamed(n), d.Digest())
	}
	return reference.TagNameOnly(n), nil
}

// resolve finds the id of an image by full id, name, name@digest or id prefix.
func resolve(tx *bolt.Tx, ref string) (string, error) {
	notFound := fmt.Errorf("image %q is not on this host; pull or load it: %w", ref, errdefs.ErrNotFound)
	if fullID.MatchString(ref) {
		if tx.Bucket(bucketImages).Get([]byte(ref)) != nil {
			return ref, nil
		}
		return "", notFound
	}
	named, refErr := parseRef(ref)
	if refErr == nil {
		n, found, err := record[nameRecord](tx, bucketNames, named.String())
		if err != nil {
			return "", err
		}
		if found {
			return n.ID, nil
		}
		if id, err := resolveDigest(tx, named); err != nil || id != "" {
			return id, err
		}
	}
	if idPrefix.MatchString(ref) {
		prefix := "sha256:" + strings.TrimPrefix(ref, "sha256:")
		c := tx.Bucket(bucketImages).Cursor()
		k, _ := c.Seek([]byte(prefix))
		if strings.HasPrefix(string(k), prefix) {
			if next, _ := c.Next(); strings.HasPrefix(string(next), prefix) {
				return "", fmt.Errorf("image id %q is ambiguous; write more of it: %w", ref, errdefs.ErrInvalidArgument)
			}
			return string(k), nil
		}
	} else if refErr != nil {
		return "", refErr
	}
	return "", notFound
}

// resolveDigest finds NAME@DIGEST when the image has another name of the same
// repository by which that digest came.
func resolveDigest(tx *bolt.Tx, named reference.Named) (string, error) {
	d, ok := named.(reference.Digested)
	if !ok {
		return "", nil
	}
	id := ""
	err := eachRecord(tx, bucketNames, func(name string, n nameRecord) error {
		if n.Digest == d.Digest().String() && repository(name) == named.Name() {
			id = n.ID
		}
		return nil
	})
	return id, err
}

// repository is a stored name without tag and digest.
func repository(name string) string {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return name
	}
	return n.Name()
}

func isDigestName(name string) bool { return strings.Contains(name, "@") }
