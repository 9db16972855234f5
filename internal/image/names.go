package image

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	v1 "tandem/api/tandem/v1"
)

// Get finds an image by reference, id or unique id prefix (4 digits or more).
func (s *LocalStore) Get(ctx context.Context, ref string) (*v1.Image, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var out *v1.Image
	err = s.db.View(func(tx *bolt.Tx) error {
		id, err := resolve(tx, ref)
		if err != nil {
			return err
		}
		out, err = s.view(tx, id)
		return err
	})
	return out, err
}

// List returns all images, newest first.
func (s *LocalStore) List(ctx context.Context) ([]*v1.Image, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var out []*v1.Image
	err = s.db.View(func(tx *bolt.Tx) error {
		names, leased, err := s.usage(tx)
		if err != nil {
			return err
		}
		return eachRecord(tx, bucketImages, func(id string, rec imageRecord) error {
			img, err := toImage(tx, id, rec, names[id], leased[id] != "")
			out = append(out, img)
			return err
		})
	})
	sort.SliceStable(out, func(i, j int) bool {
		return out[i].GetCreatedAt().AsTime().After(out[j].GetCreatedAt().AsTime())
	})
	return out, err
}

func (s *LocalStore) usage(tx *bolt.Tx) (names map[string][]string, leased map[string]string, err error) {
	if names, err = namedIDs(tx); err == nil {
		leased, err = s.leasedIDs(tx)
	}
	return names, leased, err
}

// view is the image as the API shows it.
func (s *LocalStore) view(tx *bolt.Tx, id string) (*v1.Image, error) {
	rec, found, err := record[imageRecord](tx, bucketImages, id)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("image %s: %w", id, errdefs.ErrNotFound)
	}
	names, leased, err := s.usage(tx)
	if err != nil {
		return nil, err
	}
	return toImage(tx, id, rec, names[id], leased[id] != "")
}

// toImage fills in names and digests.
func toImage(tx *bolt.Tx, id string, rec imageRecord, names []string, inUse bool) (*v1.Image, error) {
	img, err := parseConfig(rec.Config)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", id, err)
	}
	img.Id, img.SizeBytes, img.InUse = id, rec.Size, inUse
	for _, name := range names {
		n, _, err := record[nameRecord](tx, bucketNames, name)
		if err != nil {
			return nil, err
		}
		if !isDigestName(name) {
			img.Names = append(img.Names, name)
		}
		if n.Digest != "" {
			img.Digests = append(img.Digests, repository(name)+"@"+n.Digest)
		}
	}
	sort.Strings(img.Digests)
	img.Digests = slices.Compact(img.Digests)
	return img, nil
}

// Tag gives an image one more name. A name that another image had moves.
func (s *LocalStore) Tag(ctx context.Context, source, target string) error {
	done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	named, err := parseRef(target)
	if err != nil {
		return err
	}
	if isDigestName(named.String()) {
		return fmt.Errorf("tag %q: a name with a digest can't be given: %w", target, errdefs.ErrInvalidArgument)
	}
	return s.diskError(s.db.Update(func(tx *bolt.Tx) error {
		id, err := resolve(tx, source)
		if err != nil {
			return err
		}
		return putRecord(tx, bucketNames, named.String(), nameRecord{ID: id})
	}), 0)
}

// Remove takes a name away, and with its last name the image and the layers that
// no other image has. By id it takes all names, if there is one only or force is
// true. With force a leased image loses its names and stays until it is released
// and pruned.
func (s *LocalStore) Remove(ctx context.Context, ref string, force bool) (untagged, deleted []string, err error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer done()
	var gone string
	var takeNames []string
	layers, _, err := s.collect(func(tx *bolt.Tx) error {
		id, err := resolve(tx, ref)
		if err != nil {
			return err
		}
		names, leased, err := s.usage(tx)
		if err != nil {
			return err
		}
		takeNames = namesMeant(ref, names[id])
		if takeNames == nil {
			if len(tags(names[id])) > 1 && !force {
				return fmt.Errorf("image %s has several names (%s); remove them one by one or use force: %w",
					short(id), strings.Join(familiar(tags(names[id])), ", "), errdefs.ErrFailedPrecondition)
			}
			takeNames = names[id]
		}
		last := len(takeNames) == len(names[id])
		if last && leased[id] != "" && !force {
			return fmt.Errorf("image %s is in use by %s; remove that first or use force: %w", Familiar(ref), leased[id], errdefs.ErrFailedPrecondition)
		}
		for _, n := range takeNames {
			if err := tx.Bucket(bucketNames).Delete([]byte(n)); err != nil {
				return err
			}
		}
		if last && leased[id] == "" {
			gone = id
			return tx.Bucket(bucketImages).Delete([]byte(id))
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("remove image: %w", s.diskError(err, 0))
	}
	if gone != "" {
		deleted = append([]string{gone}, layers...)
	}
	return takeNames, deleted, nil
}

// namesMeant returns the stored names that ref takes away; nil when ref is an id.
func namesMeant(ref string, names []string) []string {
	if fullID.MatchString(ref) {
		return nil
	}
	named, err := parseRef(ref)
	if err != nil {
		return nil
	}
	if !slices.Contains(names, named.String()) {
		return nil
	}
	out := []string{named.String()}
	// What came by digest under the same repository goes with the last tag of it.
	rest := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == out[0] })
	sameRepo := func(n string) bool { return repository(n) == named.Name() }
	if !slices.ContainsFunc(tags(rest), sameRepo) {
		for _, n := range rest {
			if isDigestName(n) && sameRepo(n) {
				out = append(out, n)
			}
		}
	}
	return out
}

func tags(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), isDigestName)
}

func familiar(names []string) []string {
	out := make([]string, len(names))
	for i, n := range names {
		out[i] = Familiar(n)
	}
	return out
}

func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	return id[:min(12, len(id))]
}
