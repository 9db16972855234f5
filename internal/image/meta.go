package image

import (
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
)

// What meta.db holds. Records are JSON: unknown fields are ignored, so that a
// newer store's records can be read by an older one.
var (
	bucketImages = []byte("images") // id -> imageRecord
	bucketNames  = []byte("names")  // "docker.io/library/x:tag" or "…@sha256:…" -> nameRecord
	bucketLayers = []byte("layers") // diffID -> layerRecord
	bucketLeases = []byte("leases") // holder -> leaseRecord
)

// imageRecord is one image. Its id is the digest of Config.
type imageRecord struct {
	Config    []byte           `json:"config"`
	Layers    []string         `json:"layers"` // diffIDs, lowest first
	Size      int64            `json:"size"`   // bytes of the uncompressed layers
	Manifests []manifestRecord `json:"manifests,omitempty"`
}

// manifestRecord is a manifest by which the image came.
type manifestRecord struct {
	Digest    string   `json:"digest"`
	MediaType string   `json:"media_type"`
	Raw       []byte   `json:"raw"`
	Blobs     []string `json:"blobs"` // digests of the layers' blobs, lowest first
}

type nameRecord struct {
	ID     string `json:"id"`
	Digest string `json:"digest,omitempty"` // of the manifest that the registry gave for the name
}

// layerRecord is one layer whose files are complete.
type layerRecord struct {
	Blob        string `json:"blob"` // digest of the stored blob
	BlobSize    int64  `json:"blob_size"`
	Compression string `json:"compression"` // "", "gzip", "zstd"
	TarSize     int64  `json:"tar_size"`    // bytes of the uncompressed tar
	ImageSize   int64  `json:"image_size"`  // bytes of the block image
	Entries     int    `json:"entries"`
}

type leaseRecord struct {
	IDs []string `json:"ids"`
}

func (s *LocalStore) initDB() error {
	return s.db.Update(func(tx *bolt.Tx) error {
		for _, b := range [][]byte{bucketImages, bucketNames, bucketLayers, bucketLeases} {
			if _, err := tx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		return nil
	})
}

// record reads one record; found is false when there is none.
func record[T any](tx *bolt.Tx, bucket []byte, key string) (v T, found bool, err error) {
	raw := tx.Bucket(bucket).Get([]byte(key))
	if raw == nil {
		return v, false, nil
	}
	if err := json.Unmarshal(raw, &v); err != nil {
		return v, false, fmt.Errorf("record %s %q is corrupt (%v); restore the image store or remove it and pull again: %w", bucket, key, err, errdefs.ErrDataLoss)
	}
	return v, true, nil
}

func putRecord[T any](tx *bolt.Tx, bucket []byte, key string, v T) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("record %s %q: %w", bucket, key, err)
	}
	return tx.Bucket(bucket).Put([]byte(key), raw)
}

func eachRecord[T any](tx *bolt.Tx, bucket []byte, visit func(key string, v T) error) error {
	return tx.Bucket(bucket).ForEach(func(k, _ []byte) error {
		v, _, err := record[T](tx, bucket, string(k))
		if err != nil {
			return err
		}
		return visit(string(k), v)
	})
}

// leasedIDs returns the ids that some lease holds, with one of the holders; also
// leases that are on their way to the disk.
func (s *LocalStore) leasedIDs(tx *bolt.Tx) (map[string]string, error) {
	out := map[string]string{}
	err := eachRecord(tx, bucketLeases, func(holder string, l leaseRecord) error {
		for _, id := range l.IDs {
			out[id] = holder
		}
		return nil
	})
	s.soonMu.Lock()
	defer s.soonMu.Unlock()
	for l := range s.soon {
		out[l.id] = l.holder
	}
	return out, err
}

// namedIDs returns the names of every image that has one.
func namedIDs(tx *bolt.Tx) (map[string][]string, error) {
	out := map[string][]string{}
	err := eachRecord(tx, bucketNames, func(name string, n nameRecord) error {
		out[n.ID] = append(out[n.ID], name)
		return nil
	})
	return out, err
}
