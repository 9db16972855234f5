package jsonlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var t0 = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func collect(t *testing.T, path string, o Options) []Entry {
	t.Helper()
	var es []Entry
	if err := Read(context.Background(), path, o, func(e Entry) error { es = append(es, e); return nil }); err != nil {
		t.Fatal(err)
	}
	return es
}

func lines(es []Entry) string {
	var b strings.Builder
	for _, e := range es {
		b.Write(e.Line)
	}
	return b.String()
}

func TestDockersForm(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, err := NewWriter(path, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"hel", "lo\nsecond", "\n"} {
		if err := w.Write("stdout", []byte(p), t0); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Write("stderr", []byte("\xff!"), t0.Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if got := w.Pending("stderr"); string(got) != "\xff!" {
		t.Errorf("pending %q", got)
	}
	if err := errors.Join(w.Flush(t0.Add(time.Second)), w.Close()); err != nil {
		t.Fatal(err)
	}
	b, _ := os.ReadFile(path)
	want := `{"log":"hello\n","stream":"stdout","time":"2026-01-02T03:04:05.000000006Z"}
{"log":"second\n","stream":"stdout","time":"2026-01-02T03:04:05.000000006Z"}
{"log":"` + "\uFFFD" + `!","raw":"/yE=","stream":"stderr","time":"2026-01-02T03:04:06.000000006Z"}
`
	if string(b) != want {
		t.Errorf("got\n%s", b)
	}
	es := collect(t, path, Options{Tail: -1})
	if len(es) != 3 || string(es[2].Line) != "\xff!" || !es[0].Time.Equal(t0) {
		t.Errorf("%+v", es)
	}
}

func TestSelection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, _ := NewWriter(path, 0, 0)
	for i := range 100 {
		s := "stdout"
		if i%10 == 0 {
			s = "stderr"
		}
		if err := w.Write(s, fmt.Appendf(nil, "%d\n", i), t0.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"tail":        {Options{Tail: 2}, "98\n99\n"},
		"tail stderr": {Options{Tail: 2, Stderr: true}, "80\n90\n"},
		"tail 0":      {Options{Tail: 0}, ""},
		"since":       {Options{Tail: -1, Since: t0.Add(97 * time.Second)}, "97\n98\n99\n"},
		"until":       {Options{Tail: 2, Until: t0.Add(5 * time.Second)}, "4\n5\n"},
		"both":        {Options{Tail: 1, Stdout: true, Stderr: true}, "99\n"},
	} {
		if got := lines(collect(t, path, c.o)); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if got := collect(t, path, Options{Tail: 1000}); len(got) != 100 {
		t.Errorf("a longer tail than there is: %d", len(got))
	}
}

func TestRotationAndTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, _ := NewWriter(path, minSize, 3)
	line := strings.Repeat("x", 1000) + "\n"
	for range 1000 {
		if err := w.Write("stdout", []byte(line), t0); err != nil {
			t.Fatal(err)
		}
	}
	var sum int64
	for i := range 5 {
		st, err := os.Stat(fileName(path, i))
		if (err == nil) != (i < 3) {
			t.Errorf("file %d: %v", i, err)
		}
		if err == nil {
			sum += st.Size()
		}
	}
	if sum > 3*minSize {
		t.Errorf("%d bytes", sum)
	}
	if got := lines(collect(t, path, Options{Tail: 100})); got != strings.Repeat(line, 100) {
		t.Errorf("a tail across files: %d bytes", len(got))
	}
	w.Close()
	// A crash in the middle of a line costs that line only.
	f, _ := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	f.WriteString(`{"log":"half`)
	f.Close()
	w, err := NewWriter(path, minSize, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write("stdout", []byte("after\n"), t0); err != nil {
		t.Fatal(err)
	}
	if got := lines(collect(t, path, Options{Tail: 2})); got != line+"after\n" {
		t.Errorf("after a torn line: %q", got[max(0, len(got)-40):])
	}
	w.Close()
	if err := os.Truncate(path, 10); err != nil {
		t.Fatal(err)
	}
	collect(t, path, Options{Tail: -1})
}

func TestLongLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w, _ := NewWriter(path, 0, 0)
	long := bytes.Repeat([]byte{1}, 3*MaxLine+5) // six bytes each when encoded
	if err := errors.Join(w.Write("stdout", append(long, '\n'), t0), w.Close()); err != nil {
		t.Fatal(err)
	}
	es := collect(t, path, Options{Tail: -1})
	if len(es) != 4 || lines(es) != string(long)+"\n" {
		t.Errorf("%d entries, %d bytes", len(es), len(lines(es)))
	}
	if got := collect(t, path, Options{Tail: 2}); len(got) != 2 {
		t.Errorf("tail: %d", len(got))
	}
}

func TestFollowAcrossRotations(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "log")
	next := 0
	done := make(chan error, 1)
	go func() {
		done <- Read(context.Background(), path, Options{Tail: -1, Follow: true}, func(e Entry) error {
			if string(e.Line) != fmt.Sprintf("%d\n", next) {
				return fmt.Errorf("got %q, want %d", e.Line, next)
			}
			if next++; next == 30000 {
				return io.EOF
			}
			return nil
		})
	}()
	w, _ := NewWriter(path, 256<<10, 90)
	for i := range 30000 {
		if err := w.Write("stdout", fmt.Appendf(nil, "%d\n", i), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != io.EOF {
		t.Fatal(err)
	}
	go func() { // and it ends with the directory
		done <- Read(context.Background(), path, Options{Tail: 0, Follow: true}, func(Entry) error { return nil })
	}()
	time.Sleep(50 * time.Millisecond)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// FuzzRead: whatever is in the file, reading it ends, and keeps its bounds.
func FuzzRead(f *testing.F) {
	f.Add([]byte(`{"log":"a\n","stream":"stdout","time":"2026-01-02T03:04:05Z"}`+"\n"), int64(1))
	f.Add([]byte("\n\n{}\n"), int64(-1))
	f.Fuzz(func(t *testing.T, b []byte, tail int64) {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		n := int64(0)
		err := Read(context.Background(), path, Options{Tail: tail}, func(e Entry) error {
			n++
			if len(e.Line) > MaxLine || e.Stream != "stdout" && e.Stream != "stderr" {
				t.Errorf("entry %+v", e)
			}
			return nil
		})
		if err != nil || tail >= 0 && n > tail {
			t.Errorf("%d entries, tail %d: %v", n, tail, err)
		}
	})
}
