package image

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"tandem/internal/image/layerfs"
)

// staged is a layer that was read, checked and written to a work directory, not
// yet in the store.
type staged struct {
	path   string
	diffID string
	rec    layerRecord
	tree   *layerfs.Tree // nil: to be read again
}

// stageOptions say what is known of a layer before it is read.
type stageOptions struct {
	what     string           // for messages: "layer sha256:…"
	digest   string           // expected of the stream as it comes; "" = unknown
	size     int64            // expected of the stream as it comes; 0 = unknown
	maxBytes int64            // of the stream as it comes
	onBytes  func(read int64) // progress; may be nil
}

// sourceError is a failure to read where a layer comes from, as opposed to what
// is wrong with the layer.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// stage reads a layer once: it checks its digest and every entry, computes the
// diffID, and writes the blob into dir. A plain tar is written as zstd, which
// costs less than writing three times the bytes; a compressed one stays as it
// is, so that its digest and the manifest's stay true.
func (s *LocalStore) stage(ctx context.Context, dir string, r io.Reader, o stageOptions) (*staged, error) {
	f, err := os.CreateTemp(dir, "blob-")
	if err != nil {
		return nil, s.diskError(err, 0)
	}
	defer f.Close()
	st, err := s.stageTo(ctx, f, r, o)
	if err != nil {
		os.Remove(f.Name())
		var se *sourceError
		if errors.As(err, &se) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("%s: %w", o.what, err)
		}
		return nil, fmt.Errorf("%s: %w", o.what, s.diskError(err, o.size))
	}
	return st, nil
}

func (s *LocalStore) stageTo(ctx context.Context, f *os.File, r io.Reader, o stageOptions) (*staged, error) {
	in := &source{ctx: ctx, r: r, max: o.maxBytes, onBytes: o.onBytes}
	if o.digest != "" {
		in.sum = sha256.New()
	}
	head := bufio.NewReaderSize(in, 1<<18)
	peek, err := head.Peek(512)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	compression := sniff(peek)
	out := &digestWriter{w: f, sum: sha256.New()}
	var plain io.Reader
	var finish func() error
	if compression == "" {
		enc, err := zstd.NewWriter(out, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		plain, finish = io.TeeReader(head, enc), enc.Close
	} else {
		dec, closeDec, err := decompress(io.TeeReader(head, out), compression)
		if err != nil {
			return nil, s.checked(in, head, o, err)
		}
		defer closeDec()
		plain, finish = dec, func() error { return nil }
	}
	diff := sha256.New()
	tar := &boundedReader{r: io.TeeReader(plain, diff), max: s.opts.MaxLayerBytes, what: "the uncompressed layer"}
	buf := bufio.NewReaderSize(tar, 1<<18)
	tree, err := layerfs.Scan(buf, s.opts.limits())
	if err == nil {
		_, err = io.Copy(io.Discard, buf)
	}
	if err != nil {
		return nil, s.checked(in, head, o, classify(err))
	}
	// What follows a compressed stream belongs to the blob's digest too.
	if _, err := io.Copy(io.Discard, io.TeeReader(head, writerIf(compression != "", out))); err != nil {
		return nil, err
	}
	if err := finish(); err != nil {
		return nil, err
	}
	if err := in.verify(o); err != nil {
		return nil, err
	}
	st := &staged{path: f.Name(), diffID: digestOf(diff), tree: tree}
	st.rec = layerRecord{Blob: digestOf(out.sum), BlobSize: out.n, Compression: compression, TarSize: tar.n, Entries: tree.Entries()}
	if compression == "" {
		st.rec.Compression = "zstd"
	}
	return st, nil
}

// checked prefers "wrong digest" to whatever a corrupt blob made fail first.
func (s *LocalStore) checked(in *source, rest io.Reader, o stageOptions, err error) error {
	var se *sourceError
	if errors.As(err, &se) || o.digest == "" || in.ctx.Err() != nil {
		return err
	}
	if _, rerr := io.Copy(io.Discard, io.LimitReader(rest, o.size+1)); rerr != nil {
		return err
	}
	if verr := in.verify(o); verr != nil {
		return verr
	}
	return err
}

// classify makes errors of a broken stream InvalidArgument.
func classify(err error) error {
	var se *sourceError
	if errors.As(err, &se) || errors.Is(err, errdefs.ErrInvalidArgument) || errors.Is(err, errdefs.ErrResourceExhausted) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || isPathError(err) {
		return err
	}
	return fmt.Errorf("broken compressed stream: %v: %w", err, errdefs.ErrInvalidArgument)
}

func isPathError(err error) bool {
	var pe *os.PathError
	return errors.As(err, &pe)
}

func writerIf(ok bool, w io.Writer) io.Writer {
	if ok {
		return w
	}
	return io.Discard
}

// source counts and hashes what comes, and stops at its limits.
type source struct {
	ctx     context.Context
	r       io.Reader
	n, max  int64
	told    int64
	onBytes func(int64)
	sum     hash.Hash // nil: nobody asks
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, &sourceError{err}
	}
	n, err := s.r.Read(p)
	s.n += int64(n)
	if s.sum != nil {
		s.sum.Write(p[:n])
	}
	if s.max > 0 && s.n > s.max {
		return n, fmt.Errorf("more than %d bytes come, which is not expected: %w", s.max, errdefs.ErrInvalidArgument)
	}
	if s.onBytes != nil && (s.n-s.told >= 1<<18 || err != nil) {
		s.told = s.n
		s.onBytes(s.n)
	}
	var known *sourceError
	if err == nil || errors.Is(err, io.EOF) || errors.As(err, &known) || errors.Is(err, errdefs.ErrInvalidArgument) {
		return n, err
	}
	return n, &sourceError{err}
}

func (s *source) verify(o stageOptions) error {
	if o.size > 0 && s.n != o.size {
		return fmt.Errorf("wrong size: %d bytes came, %d were promised: %w", s.n, o.size, errdefs.ErrInvalidArgument)
	}
	if o.digest != "" {
		if got := digestOf(s.sum); got != o.digest {
			return fmt.Errorf("wrong digest: content is %s: %w", got, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

type digestWriter struct {
	w   io.Writer
	sum hash.Hash
	n   int64
}

func (d *digestWriter) Write(p []byte) (int, error) {
	n, err := d.w.Write(p)
	d.sum.Write(p[:n])
	d.n += int64(n)
	return n, err
}

func digestOf(h hash.Hash) string { return "sha256:" + hex.EncodeToString(h.Sum(nil)) }

// boundedReader fails when more than max bytes come: a decompression bomb.
type boundedReader struct {
	r      io.Reader
	n, max int64
	what   string
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.n += int64(n); b.n > b.max {
		return n, fmt.Errorf("%s is larger than %d bytes: %w", b.what, b.max, errdefs.ErrInvalidArgument)
	}
	return n, err
}

// sniff tells the compression of a stream by its first bytes.
func sniff(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	case bytes.HasPrefix(head, []byte("BZh")):
		return "bzip2"
	}
	return ""
}

// decompress opens a compressed stream with bounded memory.
func decompress(r io.Reader, compression string) (io.Reader, func(), error) {
	nothing := func() {}
	switch compression {
	case "":
		return r, nothing, nil
	case "gzip":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, classify(err)
		}
		return z, nothing, nil
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, nil, classify(err)
		}
		return z, z.Close, nil
	case "bzip2":
		return bzip2.NewReader(r), nothing, nil
	}
	return nil, nil, fmt.Errorf("unknown compression %q: %w", compression, errdefs.ErrInvalidArgument)
}
