package jsonlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// Entry is one line, or one piece of a long line.
type Entry struct {
	Time   time.Time
	Stream string // "stdout" or "stderr"
	Line   []byte // with its newline, when it had one; at most MaxLine bytes
}

// Options select entries. The zero value is everything that is there now.
type Options struct {
	Follow       bool      // go on with what is written later
	Tail         int64     // only the last so many of the others' choice; < 0 = all
	Since, Until time.Time // zero = no bound
	Stdout       bool      // neither: both
	Stderr       bool
}

func (o *Options) wants(e *Entry) bool {
	if o.Stdout != o.Stderr && (e.Stream == "stdout") != o.Stdout {
		return false
	}
	return (o.Since.IsZero() || !e.Time.Before(o.Since)) && (o.Until.IsZero() || !e.Time.After(o.Until))
}

// line bounds of the encoded form: every byte may need six ("\u0001"), plus base64.
const maxEncoded = MaxLine*8 + 512

func decode(line []byte) (Entry, bool) {
	var r record
	if len(line) > maxEncoded || json.Unmarshal(line, &r) != nil {
		return Entry{}, false
	}
	at, err := time.Parse(time.RFC3339Nano, r.Time)
	if err != nil || r.Stream != "stdout" && r.Stream != "stderr" {
		return Entry{}, false
	}
	e := Entry{Time: at, Stream: r.Stream, Line: []byte(r.Log)}
	if len(r.Raw) > 0 {
		e.Line = r.Raw
	}
	return e, len(e.Line) <= MaxLine
}

// Read calls fn for each entry, oldest first. With Follow it returns when ctx
// ends, fn fails, Until has passed or the log's directory is removed (nil).
// Lines that can't be read (cut by a crash) are left out.
func Read(ctx context.Context, path string, o Options, fn func(Entry) error) error {
	files, err := openAll(path)
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	var watch *watcher
	if o.Follow {
		if watch, err = newWatcher(path); err != nil {
			return err
		}
		defer watch.close()
	}
	start, skip := 0, int64(0)
	if o.Tail >= 0 {
		if start, skip, err = tailStart(files, &o); err != nil {
			return err
		}
	}
	emit := func(line []byte) error {
		e, ok := decode(line)
		if !ok || !o.wants(&e) {
			return nil
		}
		return fn(e)
	}
	var rd *lineReader
	for i := start; i < len(files); i++ {
		off := int64(0)
		if i == start {
			off = skip
		}
		rd = &lineReader{f: files[i], off: off}
		if err := rd.all(ctx, emit); err != nil {
			return err
		}
	}
	if !o.Follow {
		return nil
	}
	return follow(ctx, path, rd, watch, &o, emit)
}

// openAll opens what exists, oldest first, and retries when a rotation came between:
// a file that was on its way from one name to the next would be missing.
func openAll(path string) ([]*os.File, error) {
	for try := 0; ; try++ {
		var files []*os.File
		var at [maxFilesLimit + 1]*os.File // by the number in the name
		for i := maxFilesLimit; i >= 0; i-- {
			f, err := os.Open(fileName(path, i))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				closeAll(files)
				return nil, fmt.Errorf("container log: %w", err)
			}
			if err == nil {
				files, at[i] = append(files, f), f
			}
		}
		if len(files) == 0 || try > 100 || unmoved(path, at[:]) {
			return files, nil
		}
		closeAll(files)
		time.Sleep(time.Duration(min(try, 10)) * time.Millisecond)
	}
}

// unmoved is true if every name still names what was opened by it, or nothing: no
// name gets a file back that it had before, so all of them were right at one moment.
func unmoved(path string, at []*os.File) bool {
	for i, f := range at {
		now, err := os.Stat(fileName(path, i))
		if f == nil {
			if !errors.Is(err, fs.ErrNotExist) {
				return false
			}
			continue
		}
		was, werr := f.Stat()
		if err != nil || werr != nil || !os.SameFile(now, was) {
			return false
		}
	}
	return at[0] != nil // while there is none, the writer is between two
}

// same is true if path still names f's file.
func same(f *os.File, path string) bool {
	a, err1 := f.Stat()
	b, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(a, b)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// lineReader reads whole lines from an offset on and remembers how far it came.
type lineReader struct {
	f   *os.File
	off int64
}

func (r *lineReader) all(ctx context.Context, emit func([]byte) error) error {
	br := bufio.NewReaderSize(io.NewSectionReader(r.f, r.off, 1<<62), maxEncoded)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		line, err := br.ReadSlice('\n')
		switch {
		case err == nil:
			r.off += int64(len(line))
			if err := emit(line); err != nil {
				return err
			}
		case errors.Is(err, bufio.ErrBufferFull): // no entry is so long: skip it
			r.off += int64(len(line))
		case errors.Is(err, io.EOF):
			return nil // an unfinished line is read again when it is whole
		default:
			return fmt.Errorf("container log: %w", err)
		}
	}
}

// tailStart finds where the last o.Tail wanted entries begin, reading backwards.
func tailStart(files []*os.File, o *Options) (file int, off int64, err error) {
	want := o.Tail
	if want == 0 {
		if len(files) == 0 {
			return 0, 0, nil
		}
		st, err := files[len(files)-1].Stat()
		if err != nil {
			return 0, 0, err
		}
		return len(files) - 1, wholeEnd(files[len(files)-1], st.Size()), nil
	}
	for i := len(files) - 1; i >= 0; i-- {
		st, err := files[i].Stat()
		if err != nil {
			return 0, 0, err
		}
		end := st.Size()
		var rest []byte // begin of the line whose start is not read yet
		for end > 0 {
			n := min(end, 64<<10)
			block := make([]byte, n, int(n)+len(rest))
			if _, err := files[i].ReadAt(block, end-n); err != nil && !errors.Is(err, io.EOF) {
				return 0, 0, fmt.Errorf("container log: %w", err)
			}
			end -= n
			block = append(block, rest...)
			// Lines of block, last first; the first may begin earlier.
			for {
				k := bytes.LastIndexByte(bytes.TrimSuffix(block, []byte{'\n'}), '\n')
				if k < 0 && end > 0 {
					break
				}
				if e, ok := decode(block[k+1:]); ok && o.wants(&e) {
					if want--; want == 0 {
						return i, end + int64(k+1), nil
					}
				}
				if k < 0 {
					block = nil
					break
				}
				block = block[:k+1]
			}
			if rest = block; len(rest) > 2*maxEncoded {
				rest = nil // rubbish without newlines
			}
		}
	}
	return 0, 0, nil
}

// wholeEnd is the end of the last whole line.
func wholeEnd(f *os.File, size int64) int64 {
	n := min(size, maxEncoded)
	b := make([]byte, n)
	if _, err := f.ReadAt(b, size-n); err != nil && !errors.Is(err, io.EOF) {
		return size
	}
	if k := bytes.LastIndexByte(b, '\n'); k >= 0 {
		return size - n + int64(k+1)
	}
	return size - n
}
