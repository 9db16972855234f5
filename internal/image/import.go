package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "tandem/api/tandem/v1"
)

// Import makes an image of one layer from a root file-system tar, plain or
// compressed with gzip, zstd or bzip2. ref may be empty: the image has no name
// then. The same tar with the same changes gives the same id: its creation time
// is the newest time in the tar.
func (s *LocalStore) Import(ctx context.Context, r io.Reader, ref string, o ImportOptions) (*v1.Image, error) {
	done, err := s.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	var names []string
	if ref != "" {
		name, err := Normalize(ref)
		if err != nil {
			return nil, err
		}
		if isDigestName(name) {
			return nil, fmt.Errorf("import %q: a name with a digest can't be given: %w", ref, errdefs.ErrInvalidArgument)
		}
		names = []string{name}
	}
	var run runConfig
	if err := applyChanges(&run, o.Changes); err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	dir, err := s.newWorkDir()
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	defer dir.release()
	st, err := s.stageImport(ctx, dir, r, o.Progress)
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	_, arch, _ := strings.Cut(s.opts.Platform, "/")
	arch, variant, _ := strings.Cut(arch, "/")
	created := s.created(st)
	raw, err := json.Marshal(configFile{
		Created: &created, Architecture: arch, Variant: variant, OS: "linux", Config: run,
		RootFS:  rootFS{Type: "layers", DiffIDs: []string{st.diffID}},
		History: []historyItem{{Created: &created, Comment: "imported"}},
	})
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	images, err := s.add(ctx, []newImage{{config: raw, names: names, layer: func(int) layerSource {
		return func(context.Context, ProgressFunc) (*staged, *workDir, error) { return st, dir.hold(), nil }
	}}}, o.Progress)
	if err != nil {
		return nil, fmt.Errorf("import: %w", err)
	}
	return images[0], nil
}

// stageImport stages the root file system. bzip2 and trailing rubbish are for
// the importer alone: as a layer they would not be understood elsewhere.
func (s *LocalStore) stageImport(ctx context.Context, dir *workDir, r io.Reader, p ProgressFunc) (*staged, error) {
	head := bufio.NewReaderSize(r, 1<<16)
	peek, err := head.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, &sourceError{err}
	}
	if len(peek) == 0 {
		return nil, badArchive("it is empty")
	}
	in := io.Reader(head)
	if sniff(peek) == "bzip2" {
		if in, _, err = decompress(head, "bzip2"); err != nil {
			return nil, err
		}
	}
	st, err := s.stage(ctx, dir.path, in, stageOptions{
		what: "root file system", maxBytes: s.opts.MaxArchiveBytes,
		onBytes: func(n int64) {
			tell(p, &v1.Progress{Id: "archive", Action: "reading", Current: n, Unit: "bytes"})
		},
	})
	if err == nil && st.tree.Entries() == 0 {
		return nil, badArchive("the root file system is empty")
	}
	return st, err
}

// created is the newest time in the layer; not in the future.
func (s *LocalStore) created(st *staged) time.Time {
	now, t := s.opts.Clock.Now(), st.tree.Newest()
	if t.After(now) {
		t = now
	}
	if t.Unix() < 0 {
		t = time.Unix(0, 0)
	}
	return t.UTC().Truncate(time.Second)
}
