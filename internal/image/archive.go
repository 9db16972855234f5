package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

// archive is a docker-archive or OCI layout that was read once, front to back:
// small files are kept in memory, layers are staged on the way. Nothing of it is
// believed before its digest is.
type archive struct {
	files   map[string]*archiveFile
	dir     *workDir
	entries int // of all layers' trees that are kept in memory
}

// archiveFile is one regular file of an archive.
type archiveFile struct {
	digest string // sha256 of the file as it is
	size   int64
	data   []byte  // small files that are no layers
	layer  *staged // layers
	err    error   // why it can't be a layer; matters only if something says it is one
	link   string  // symbolic or hard link to another file
}

func badArchive(format string, args ...any) error {
	return fmt.Errorf("archive: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// readArchive reads r to its end.
func (s *LocalStore) readArchive(ctx context.Context, r io.Reader, p func(read int64, name string)) (*archive, error) {
	dir, err := s.newWorkDir()
	if err != nil {
		return nil, err
	}
	a := &archive{files: map[string]*archiveFile{}, dir: dir}
	if err := s.fillArchive(ctx, a, r, p); err != nil {
		dir.release()
		return nil, err
	}
	return a, nil
}

func (s *LocalStore) fillArchive(ctx context.Context, a *archive, r io.Reader, p func(int64, string)) error {
	name := ""
	in := &source{ctx: ctx, r: r, max: s.opts.MaxArchiveBytes}
	in.onBytes = func(n int64) { p(n, name) }
	head := bufio.NewReaderSize(in, 1<<18)
	peek, err := head.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("archive: %w", err)
	}
	if len(peek) == 0 {
		return badArchive("it is empty")
	}
	plain, stop, err := decompress(head, sniff(peek))
	if err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	defer stop()
	tr := tar.NewReader(bufio.NewReaderSize(plain, 1<<18))
	total, meta := int64(0), 0
	for count := 0; ; count++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return archiveReadError(err, name)
		}
		if count >= maxArchiveFiles {
			return badArchive("more than %d files", maxArchiveFiles)
		}
		name, err = archiveName(hdr.Name)
		if err != nil {
			return err
		}
		switch hdr.Typeflag {
		case tar.TypeDir, tar.TypeXGlobalHeader:
			continue
		case tar.TypeSymlink:
			if link, err := archiveName(path.Join(path.Dir(name), hdr.Linkname)); err == nil {
				a.files[name] = &archiveFile{link: link}
			}
			continue
		case tar.TypeLink:
			link, err := archiveName(hdr.Linkname)
			if err != nil {
				return err
			}
			a.files[name] = &archiveFile{link: link}
			continue
		case tar.TypeReg:
		default:
			return badArchive("file %q has the unexpected type %q", name, hdr.Typeflag)
		}
		if total += hdr.Size; total > s.opts.MaxArchiveBytes {
			return badArchive("file %q: with it the archive has more than %d bytes", name, s.opts.MaxArchiveBytes)
		}
		f, err := s.archiveFile(ctx, a, name, hdr.Size, tr)
		if err != nil {
			return err
		}
		if meta += len(f.data); meta > maxArchiveMeta {
			return badArchive("more than %d bytes of manifests and configs", maxArchiveMeta)
		}
		a.files[name] = f
	}
}

func archiveReadError(err error, name string) error {
	var se *sourceError
	if errors.As(err, &se) || errors.Is(err, errdefs.ErrInvalidArgument) {
		return fmt.Errorf("archive: %w", err)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return badArchive("truncated in file %q", name)
	}
	return badArchive("broken after file %q: %v", name, err)
}

// archiveName cleans a file name; an archive's are relative and stay inside.
func archiveName(name string) (string, error) {
	clean := path.Clean(strings.TrimPrefix(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") || len(clean) > 1024 {
		return "", badArchive("file name %.200q leads out of the archive", name)
	}
	return clean, nil
}

// archiveFile reads one file. What looks like a layer is staged as one: whether
// it is one is known only when the manifest has been seen, which may be last.
func (s *LocalStore) archiveFile(ctx context.Context, a *archive, name string, size int64, r io.Reader) (*archiveFile, error) {
	in := &source{ctx: ctx, sum: sha256.New(), r: readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		if err != nil && !errors.Is(err, io.EOF) {
			err = archiveReadError(err, name)
		}
		return n, err
	})}
	buf := bufio.NewReaderSize(in, 1<<18)
	peek, err := buf.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	f := &archiveFile{size: size}
	if looksLikeLayer(peek) {
		f.layer, f.err = s.stage(ctx, a.dir.path, buf, stageOptions{what: fmt.Sprintf("layer %q", name)})
		if f.err != nil && fatal(ctx, f.err) {
			return nil, fmt.Errorf("archive: %w", f.err)
		}
		// Trees of many layers must not fill the memory: what is over the limit
		// of one layer is read again when it is converted.
		if f.layer != nil {
			if a.entries += f.layer.rec.Entries; a.entries > s.opts.MaxLayerEntries {
				f.layer.tree = nil
			}
		}
	} else if size <= maxConfigBytes {
		var b bytes.Buffer
		if _, err := io.Copy(&b, buf); err != nil {
			return nil, err
		}
		f.data = b.Bytes()
	} else {
		f.err = badArchive("file %q is no tar, gzip or zstd stream", name)
	}
	if _, err := io.Copy(io.Discard, buf); err != nil {
		return nil, err
	}
	if f.data == nil && f.layer == nil && f.err == nil {
		f.data = []byte{}
	}
	f.digest = digestOf(in.sum)
	return f, nil
}

// fatal tells whether an error concerns the archive's reading or the host, not
// the one file's content.
func fatal(ctx context.Context, err error) bool {
	var se *sourceError
	return ctx.Err() != nil || errors.As(err, &se) || !errors.Is(err, errdefs.ErrInvalidArgument)
}

// looksLikeLayer: compressed, or beginning with a tar header or the zeros of an
// empty tar.
func looksLikeLayer(head []byte) bool {
	if sniff(head) != "" {
		return true
	}
	if len(head) < 512 {
		return false
	}
	sum, given := 0, 0
	for i, b := range head[:512] {
		if i >= 148 && i < 156 {
			if b >= '0' && b <= '7' {
				given = given*8 + int(b-'0')
			}
			b = ' '
		}
		sum += int(b)
	}
	return sum == given || sum == 8*' '
}

// file finds a file by name, following links inside the archive.
func (a *archive) file(name string) (*archiveFile, error) {
	clean, err := archiveName(name)
	if err != nil {
		return nil, err
	}
	for range 8 {
		f := a.files[clean]
		if f == nil {
			return nil, badArchive("file %q is missing", name)
		}
		if f.link == "" {
			return f, nil
		}
		clean = f.link
	}
	return nil, badArchive("file %q: too many links", name)
}

// json returns the content of a small file.
func (a *archive) json(name string) ([]byte, error) {
	f, err := a.file(name)
	if err != nil {
		return nil, err
	}
	if f.data == nil {
		return nil, badArchive("file %q is no JSON of at most %d bytes", name, maxConfigBytes)
	}
	return f.data, nil
}

// source hands a staged layer of the archive to the store.
func (a *archive) source(name string) layerSource {
	return func(context.Context, ProgressFunc) (*staged, *workDir, error) {
		f, err := a.file(name)
		if err != nil {
			return nil, nil, err
		}
		if f.err != nil {
			return nil, nil, f.err
		}
		if f.layer == nil {
			return nil, nil, badArchive("layer %q is no tar, gzip or zstd stream", name)
		}
		// The tree is not changed by its use. A private name: the same file may be a layer of several images, and
		// the first to be committed is moved away.
		st := *f.layer
		own, err := os.CreateTemp(a.dir.path, "use-")
		if err != nil {
			return nil, nil, err
		}
		own.Close()
		os.Remove(own.Name())
		if err := os.Link(f.layer.path, own.Name()); err != nil {
			return nil, nil, err
		}
		st.path = own.Name()
		return &st, a.dir.hold(), nil
	}
}
