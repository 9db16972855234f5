// Package jsonlog keeps a container's output on disk in Docker's json-file
// form, one object a line, rotated by size:
//
//	{"log":"hello\n","stream":"stdout","time":"2026-01-02T15:04:05.000000001Z"}
//
// Bytes that are no UTF-8 are kept whole in a further field, "raw" (base64).
// Lines longer than MaxLine are cut into several entries; only the last one
// ends with a newline.
//
//	w, err := jsonlog.NewWriter(path, maxSize, maxFiles)
//	err = w.Write("stdout", p, time.Now()) // buffers the unfinished line
//	err = w.Flush(time.Now())              // writes unfinished lines too
//
// One process writes; any number read with Read, also while it is rotated.
package jsonlog

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// Bounds and defaults.
const (
	MaxLine         = 16 << 10 // bytes of one entry
	DefaultMaxSize  = 10 << 20 // bytes of one file
	DefaultMaxFiles = 3
	minSize         = 64 << 10
	maxFilesLimit   = 100
)

type record struct {
	Log    string `json:"log"`
	Raw    []byte `json:"raw,omitempty"`
	Stream string `json:"stream"`
	Time   string `json:"time"`
}

// Writer appends entries. It is safe for concurrent use.
type Writer struct {
	path     string
	maxSize  int64
	maxFiles int

	mu      sync.Mutex
	f       *os.File
	size    int64
	torn    bool // the file ends inside a line
	pending map[string][]byte
}

// NewWriter opens the log for appending. Zero sizes mean the defaults; maxSize
// is at least 64 KiB.
func NewWriter(path string, maxSize int64, maxFiles int) (*Writer, error) {
	if maxSize <= 0 {
		maxSize = DefaultMaxSize
	}
	if maxFiles <= 0 {
		maxFiles = DefaultMaxFiles
	}
	w := &Writer{path: path, maxSize: max(maxSize, minSize), maxFiles: min(maxFiles, maxFilesLimit), pending: map[string][]byte{}}
	if err := w.open(); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *Writer) open() error {
	f, err := os.OpenFile(w.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return fmt.Errorf("container log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("container log: %w", err)
	}
	w.f, w.size, w.torn = f, st.Size(), false
	if w.size > 0 {
		var last [1]byte
		_, err := f.ReadAt(last[:], w.size-1)
		w.torn = err != nil || last[0] != '\n'
	}
	return nil
}

// Write adds output. The error says that some of it could not be kept (a full
// disk); the writer goes on with what follows.
func (w *Writer) Write(stream string, p []byte, at time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []byte
	buf := w.pending[stream]
	for len(p) > 0 {
		n := bytes.IndexByte(p, '\n') + 1
		whole := n > 0
		if !whole {
			n = len(p)
		}
		if room := MaxLine - len(buf); n > room {
			n, whole = room, false
		}
		buf = append(buf, p[:n]...)
		p = p[n:]
		if whole || len(buf) == MaxLine {
			out = appendRecord(out, stream, buf, at)
			buf = buf[:0]
		}
	}
	w.pending[stream] = buf
	return w.append(out)
}

// Flush writes lines that have no newline yet.
func (w *Writer) Flush(at time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []byte
	for _, s := range []string{"stdout", "stderr"} {
		if b := w.pending[s]; len(b) > 0 {
			out = appendRecord(out, s, b, at)
			w.pending[s] = b[:0]
		}
	}
	return w.append(out)
}

// Pending is the unfinished line of a stream: what Read does not show yet.
func (w *Writer) Pending(stream string) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.pending[stream])
}

// Close closes the file; call Flush before.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.f == nil {
		return nil
	}
	err := w.f.Close()
	w.f = nil
	return err
}

func (w *Writer) append(out []byte) error {
	if len(out) == 0 {
		return nil
	}
	if w.f == nil {
		if err := w.open(); err != nil {
			return err
		}
	}
	if w.size > 0 && w.size+int64(len(out)) > w.maxSize {
		if err := w.rotate(); err != nil {
			return err
		}
	}
	if w.torn {
		out = append([]byte{'\n'}, out...)
	}
	n, err := w.f.Write(out)
	w.size += int64(n)
	w.torn = n > 0 && out[n-1] != '\n' || n == 0 && w.torn
	if err != nil {
		return fmt.Errorf("container log: %w", err)
	}
	return nil
}

// rotate renames first and opens the new file before anything is written to
// it: a reader that sees the path change knows that the old file is complete.
func (w *Writer) rotate() error {
	for i := w.maxFiles - 1; i > 0; i-- {
		from := fileName(w.path, i-1)
		if err := os.Rename(from, fileName(w.path, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate container log: %w", err)
		}
	}
	if w.maxFiles == 1 {
		if err := os.Remove(w.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("rotate container log: %w", err)
		}
	}
	w.f.Close()
	w.f = nil
	return w.open()
}

func fileName(path string, i int) string {
	if i == 0 {
		return path
	}
	return path + "." + strconv.Itoa(i)
}

// appendRecord is json.Marshal of record for the common case, without its cost.
func appendRecord(out []byte, stream string, line []byte, at time.Time) []byte {
	r := record{Log: string(line), Stream: stream, Time: at.UTC().Format(time.RFC3339Nano)}
	if !utf8.Valid(line) {
		r.Raw, r.Log = line, strings.ToValidUTF8(r.Log, "\uFFFD")
	}
	b, err := json.Marshal(&r)
	if err != nil { // strings and bytes always marshal
		return out
	}
	return append(append(out, b...), '\n')
}
