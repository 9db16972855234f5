package layerfs

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
)

// WriteTar reads the scanned stream again and writes it normalised: every
// directory first, then each file once, under its first name and followed by its
// other names. The stream must be the one that was scanned, byte by byte: its
// digest must be checked by the caller.
func (t *Tree) WriteTar(r io.Reader, w io.Writer) error {
	out := tar.NewWriter(w)
	live := map[int][]*node{}
	err := t.root.walk(func(n *node) error {
		switch n.ino.kind {
		case kindDir:
			return out.WriteHeader(dirHeader(n))
		case kindWhiteout:
			return out.WriteHeader(&tar.Header{Typeflag: tar.TypeChar, Name: n.path(), ModTime: time.Unix(0, 0)})
		}
		live[n.ino.entry] = append(live[n.ino.entry], n)
		return nil
	})
	if err != nil {
		return fmt.Errorf("write directories: %w", err)
	}
	src := &errReader{r: r}
	in := tar.NewReader(src)
	for index := 0; len(live) > 0; index++ {
		hdr, err := in.Next()
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the layer changed between two readings: %w", errdefs.ErrDataLoss)
		}
		if err != nil {
			return archiveError(src, err, "")
		}
		names := live[index]
		if len(names) == 0 {
			continue
		}
		delete(live, index)
		if err := emit(out, in, hdr, names); err != nil {
			if src.err != nil {
				return src.err
			}
			return fmt.Errorf("entry %s: %w", cut(hdr.Name), err)
		}
	}
	return out.Close()
}

func emit(out *tar.Writer, in *tar.Reader, hdr *tar.Header, names []*node) error {
	m, err := (&scanner{tree: &Tree{}, lim: Limits{}.withDefaults()}).meta(hdr)
	if err != nil {
		return err
	}
	first := names[0].path()
	h := header(m, first)
	h.Typeflag = hdr.Typeflag
	switch names[0].ino.kind { // only what the kind has: the rest of a header may be rubbish
	case kindFile:
		h.Typeflag, h.Size = tar.TypeReg, hdr.Size
	case kindSymlink:
		h.Linkname = hdr.Linkname
	case kindDevice:
		h.Devmajor, h.Devminor = hdr.Devmajor, hdr.Devminor
	}
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	if h.Size > 0 {
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
	for _, n := range names[1:] {
		link := &tar.Header{Typeflag: tar.TypeLink, Name: n.path(), Linkname: first, Format: tar.FormatPAX, ModTime: time.Unix(0, 0)}
		if err := out.WriteHeader(link); err != nil {
			return err
		}
	}
	return nil
}

func dirHeader(n *node) *tar.Header {
	m := n.ino.dir
	if m == nil {
		m = &meta{mode: 0o755, mtime: time.Unix(0, 0)}
	}
	h := header(m, n.path()+"/")
	h.Typeflag = tar.TypeDir
	if n.parent == n {
		h.Name = "./"
	} else if n.ino.opaque {
		// An opaque root has no meaning to overlay: there is nothing beside it.
		h.PAXRecords[paxXattr+xattrOpaque] = "y"
	}
	return h
}

func header(m *meta, name string) *tar.Header {
	at := diskTime(m.mtime)
	h := &tar.Header{
		Name: name, Mode: m.mode, Uid: m.uid, Gid: m.gid,
		ModTime: at, AccessTime: at, ChangeTime: at,
		Format: tar.FormatPAX, PAXRecords: map[string]string{},
	}
	for k, v := range m.xattrs {
		h.PAXRecords[paxXattr+k] = v
	}
	return h
}

// pipeTar runs WriteTar into a buffered pipe and hands the reading end to use.
func (t *Tree) pipeTar(r io.Reader, use func(io.Reader) error) error {
	pr, pw := io.Pipe()
	wrote := make(chan error, 1)
	go func() {
		buf := bufio.NewWriterSize(pw, 1<<18)
		err := t.WriteTar(r, buf)
		if err == nil {
			err = buf.Flush()
		}
		pw.CloseWithError(err) // nil becomes EOF
		wrote <- err
	}()
	err := use(pr)
	pr.CloseWithError(errStopped)
	werr := <-wrote
	if werr != nil && !errors.Is(werr, errStopped) {
		return werr
	}
	return err
}

var errStopped = errors.New("the block image writer stopped")
