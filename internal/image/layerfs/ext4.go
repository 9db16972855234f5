package layerfs

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
)

// FSType is the file system of the block images.
const FSType = "ext4"

// Ext4 reads the scanned stream again and writes the layer's block image into
// f, an empty regular file opened for reading and writing; holes stay holes. It
// returns the image's size in bytes. It does not sync f.
func (t *Tree) Ext4(r io.Reader, f *os.File) (int64, error) {
	w := &sparseFile{f: f}
	err := t.pipeTar(r, func(tarStream io.Reader) error {
		return tar2ext4.ConvertTarToExt4(tarStream, w, tar2ext4.MaximumDiskSize(t.maxDisk()))
	})
	if err != nil {
		return 0, fmt.Errorf("convert to ext4: %w", err)
	}
	if err := f.Truncate(w.end); err != nil {
		return 0, fmt.Errorf("convert to ext4: %w", err)
	}
	if err := t.fix(f); err != nil {
		return 0, fmt.Errorf("finish the ext4 image: %w", err)
	}
	return w.end, nil
}

// maxDisk is room enough for the layer: the writer reserves one block of group
// descriptors for each 16 GiB.
func (t *Tree) maxDisk() int64 {
	const perEntry = 2*4096 + 256 + 300 // a partial block, an attribute block, an inode, a name
	need := t.bytes + t.bytes/64 + int64(t.entries)*perEntry + 64<<20
	const step = 16 << 30
	return (need + step - 1) / step * step
}

// sparseFile leaves blocks of zeros unwritten where nothing has been written
// before. It is an io.ReadWriteSeeker.
type sparseFile struct {
	f        *os.File
	pos, end int64
}

const block = 4096

var zeros [block]byte

func (s *sparseFile) Read(p []byte) (int, error) {
	n, err := s.f.ReadAt(p, s.pos)
	s.pos += int64(n)
	if n == len(p) {
		return n, nil
	}
	// Past the last written byte, but inside the image: a hole.
	for n < len(p) && s.pos < s.end {
		p[n] = 0
		n, s.pos = n+1, s.pos+1
	}
	if n > 0 {
		return n, nil
	}
	return n, err
}

func (s *sparseFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
		s.pos = offset
	case io.SeekCurrent:
		s.pos += offset
	case io.SeekEnd:
		s.pos = s.end + offset
	}
	return s.pos, nil
}

func (s *sparseFile) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) {
		// Gather a run of blocks that are all to be written, or all to be skipped.
		n, hole := 0, false
		for n < len(p)-done {
			size := min(len(p)-done-n, int(block-(s.pos+int64(n))%block))
			chunk := p[done+n : done+n+size]
			skip := s.pos+int64(n) >= s.end && bytes.Equal(chunk, zeros[:size])
			if n > 0 && skip != hole {
				break
			}
			hole, n = skip, n+size
		}
		if !hole {
			if _, err := s.f.WriteAt(p[done:done+n], s.pos); err != nil {
				return done, err
			}
		}
		done += n
		s.pos += int64(n)
		s.end = max(s.end, s.pos)
	}
	return done, nil
}
