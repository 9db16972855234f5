package jsonlog

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// What openAll finds while files are rotated is what there was at one moment: no
// file is missing between two others.
func TestOpenAllWhileRotating(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	const keep = 6
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			for i := keep; i > 0; i-- {
				if err := os.Rename(fileName(path, i-1), fileName(path, i)); err != nil && !errors.Is(err, fs.ErrNotExist) {
					done <- err
					return
				}
			}
			if err := os.WriteFile(path+".new", []byte(strconv.Itoa(n)), 0o600); err != nil {
				done <- err
				return
			}
			if err := os.Rename(path+".new", path); err != nil {
				done <- err
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
	}()
	for range 300 {
		files, err := openAll(path)
		if err != nil {
			t.Fatal(err)
		}
		last := -1
		for _, f := range files {
			b := make([]byte, 20)
			n, _ := f.Read(b)
			at, err := strconv.Atoi(string(b[:n]))
			if err != nil || last >= 0 && at != last+1 {
				t.Errorf("file %d after %d (%v)", at, last, err)
			}
			last = at
		}
		closeAll(files)
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
