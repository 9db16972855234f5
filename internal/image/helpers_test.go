package image

import (
	"archive/tar"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"
)

// bigLayer streams a tar with one file of random bytes.
type bigLayer struct{ size int64 }

func (b *bigLayer) tar(t testing.TB) io.Reader {
	pr, pw := io.Pipe()
	go func() {
		w := tar.NewWriter(pw)
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "big", Size: b.size, Mode: 0o644})
		if err == nil {
			_, err = io.CopyN(w, rand.NewChaCha8([32]byte{1}), b.size)
		}
		if err == nil {
			err = w.Close()
		}
		pw.CloseWithError(err)
	}()
	t.Cleanup(func() { pr.Close() })
	return pr
}

// peakHeap samples the heap until done is closed.
func peakHeap(done chan struct{}) (peak uint64) {
	var m runtime.MemStats
	for {
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc)
		select {
		case <-done:
			return peak
		case <-time.After(20 * time.Millisecond):
		}
	}
}
