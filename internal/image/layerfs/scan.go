package layerfs

import (
	"archive/tar"
	"errors"
	"io"
	"path"
	"strings"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// Scan reads an uncompressed layer tar up to its end-of-archive mark, checks
// every entry and returns the tree. It reads no file content.
//
// Refused (*EntryError, errdefs.ErrInvalidArgument): paths and hard links with
// "..", hard links to what the layer does not hold, symbolic links followed out
// of the layer, devices other than null, zero, full, random, urandom, tty,
// console, ptmx and overlay whiteouts (char 0/0), unknown entry types, names,
// links, owners, attributes and sizes beyond the limits, truncated or broken
// archives. Errors of r itself are returned as they are.
func Scan(r io.Reader, limits Limits) (*Tree, error) {
	s := &scanner{tree: newTree(), lim: limits.withDefaults()}
	src := &errReader{r: r}
	tr := tar.NewReader(src)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return s.tree, nil
		}
		if err != nil {
			return nil, archiveError(src, err, s.last)
		}
		if err := s.add(hdr); err != nil {
			return nil, err
		}
		s.last = hdr.Name
	}
}

// errReader remembers a failure of the stream below the tar, to tell it from a
// broken archive.
type errReader struct {
	r   io.Reader
	err error
}

func (e *errReader) Read(p []byte) (int, error) {
	n, err := e.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		e.err = err
	}
	return n, err
}

func archiveError(src *errReader, err error, last string) error {
	switch {
	case src.err != nil:
		return src.err
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refuse(last, "the archive is truncated after this entry")
	default:
		return refuse(last, "broken archive after this entry: %v", err)
	}
}

type scanner struct {
	tree  *Tree
	lim   Limits
	last  string // name of the entry before, for messages
	names int    // names ever put into the tree
	steps int    // names looked up: deep paths and links must not cost for ever
}

// add takes one tar entry into the tree.
func (s *scanner) add(hdr *tar.Header) error {
	index := s.tree.entries
	s.tree.entries++
	if s.tree.entries > s.lim.MaxEntries {
		return refuse(hdr.Name, "the layer has more than %d entries", s.lim.MaxEntries)
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if hdr.ModTime.After(s.tree.newest) {
		s.tree.newest = hdr.ModTime
	}
	parts, err := s.split(hdr.Name, hdr.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if hdr.Typeflag != tar.TypeDir {
			return refuse(hdr.Name, "the root of a layer must be a directory")
		}
		m, err := s.meta(hdr)
		if err == nil {
			s.tree.root.ino.dir = m
		}
		return err
	}
	base := parts[len(parts)-1]
	dir, err := s.parent(hdr.Name, parts[:len(parts)-1], true)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return s.whiteout(hdr, dir, base, index)
	}
	if hdr.Typeflag == tar.TypeLink {
		return s.link(hdr, dir, base)
	}
	if hdr.Typeflag == tar.TypeChar && hdr.Devmajor == 0 && hdr.Devminor == 0 {
		return s.hide(hdr.Name, dir, base, index) // overlay's own form of a whiteout
	}
	ino, err := s.inode(hdr, index)
	if err != nil {
		return err
	}
	return s.place(hdr, dir, base, ino)
}

// place puts an inode under its name with the rules of layers: a directory
// keeps the children it has; a directory over a whiteout is opaque.
func (s *scanner) place(hdr *tar.Header, dir *node, base string, ino *inode) error {
	old := dir.children[base]
	if ino.kind == kindDir {
		if old != nil && old.ino.kind == kindDir {
			old.ino.dir, old.ino.entry = ino.dir, ino.entry
			return nil
		}
		ino.opaque = old != nil && old.ino.kind == kindWhiteout
	}
	_, err := s.put(hdr.Name, dir, base, ino)
	return err
}

// put adds a name to the tree, within the limits of the tree and of ext4.
func (s *scanner) put(entry string, dir *node, name string, ino *inode) (*node, error) {
	if s.names++; s.names > s.lim.MaxEntries {
		return nil, refuse(entry, "the layer has more than %d files and directories", s.lim.MaxEntries)
	}
	if ino.kind == kindDir && dir.dirs >= maxLinks {
		return nil, refuse(entry, "its directory has more than %d subdirectories", maxLinks)
	}
	if n := dir.size + 1 + len(name); n > s.lim.MaxPath {
		return nil, refuse(entry, "path of %d bytes after following symbolic links, more than %d", n, s.lim.MaxPath)
	}
	return dir.put(name, ino), nil
}

// whiteout handles ".wh." entries; they hide what lower layers have, never what
// this layer has.
func (s *scanner) whiteout(hdr *tar.Header, dir *node, base string, index int) error {
	if base == whiteoutOpaque {
		dir.ino.opaque = true
		return nil
	}
	if strings.HasPrefix(base, whiteoutMeta) {
		return nil // bookkeeping of aufs
	}
	name := base[len(whiteoutPrefix):]
	if name == "" || name == "." || name == ".." {
		return refuse(hdr.Name, "a whiteout of %q is not allowed", name)
	}
	return s.hide(hdr.Name, dir, name, index)
}

func (s *scanner) hide(entry string, dir *node, name string, index int) error {
	if old := dir.children[name]; old != nil {
		if old.ino.kind == kindDir {
			old.ino.opaque = true
		}
		return nil
	}
	_, err := s.put(entry, dir, name, &inode{kind: kindWhiteout, entry: index})
	return err
}

// link handles a hard link whose file comes earlier; one whose file comes later
// is refused, as every container engine does.
func (s *scanner) link(hdr *tar.Header, dir *node, base string) error {
	parts, err := s.split(hdr.Name, hdr.Linkname)
	if err != nil {
		return refuse(hdr.Name, "hard link to %s: %s", cut(hdr.Linkname), reason(err))
	}
	if len(parts) == 0 {
		return refuse(hdr.Name, "hard link to the root directory")
	}
	tdir, err := s.parent(hdr.Name, parts[:len(parts)-1], false)
	if err != nil {
		return refuse(hdr.Name, "hard link to %s: %s", cut(hdr.Linkname), reason(err))
	}
	target := tdir.children[parts[len(parts)-1]]
	switch {
	case target == nil || target.ino.kind == kindWhiteout:
		return refuse(hdr.Name, "hard link to %s, which the layer does not hold before it", cut(hdr.Linkname))
	case target.ino.kind == kindDir:
		return refuse(hdr.Name, "hard link to the directory %s", cut(hdr.Linkname))
	case target.ino.links >= maxLinks:
		return refuse(hdr.Name, "more than %d hard links to one file", maxLinks)
	}
	if dir.children[base] == target {
		return nil
	}
	_, err = s.put(hdr.Name, dir, base, target.ino)
	return err
}

// split checks a path and returns its components; a leading slash is the
// layer's root.
func (s *scanner) split(entry, p string) ([]string, error) {
	if len(p) > s.lim.MaxPath {
		return nil, refuse(entry, "path of %d bytes, more than %d", len(p), s.lim.MaxPath)
	}
	if strings.IndexByte(p, 0) >= 0 {
		return nil, refuse(entry, "path with a zero byte")
	}
	var parts []string
	for _, c := range strings.Split(p, "/") {
		switch {
		case c == "" || c == ".":
		case c == "..":
			return nil, refuse(entry, `path with "..": it could escape the layer`)
		case len(c) > maxComponent:
			return nil, refuse(entry, "file name of %d bytes, more than %d", len(c), maxComponent)
		default:
			parts = append(parts, c)
		}
	}
	return parts, nil
}

// parent finds the directory at parts, following symbolic links inside the
// layer. With create, missing directories are made.
func (s *scanner) parent(entry string, parts []string, create bool) (*node, error) {
	dir, followed := s.tree.root, 0
	todo := append([]string(nil), parts...)
	for len(todo) > 0 {
		c := todo[0]
		todo = todo[1:]
		if s.steps++; s.steps > stepsPerEntry*s.lim.MaxEntries {
			return nil, refuse(entry, "the layer's paths are too deep to be followed")
		}
		if c == ".." {
			if dir == s.tree.root {
				return nil, refuse(entry, "a symbolic link in its path leads out of the layer")
			}
			dir = dir.parent
			continue
		}
		child := dir.children[c]
		switch {
		case child == nil || child.ino.kind == kindWhiteout:
			if !create {
				return nil, refuse(entry, "%s is not in the layer", cut(path.Join(dir.path(), c)))
			}
			made, err := s.put(entry, dir, c, &inode{kind: kindDir, entry: -1, opaque: child != nil})
			if err != nil {
				return nil, err
			}
			dir = made
		case child.ino.kind == kindDir:
			dir = child
		case child.ino.kind == kindSymlink:
			if followed++; followed > maxFollow {
				return nil, refuse(entry, "more than %d symbolic links in its path", maxFollow)
			}
			target := child.ino.target
			if strings.HasPrefix(target, "/") {
				dir = s.tree.root
			}
			var add []string
			for _, p := range strings.Split(target, "/") {
				if len(p) > maxComponent {
					return nil, refuse(entry, "a symbolic link in its path has a name of %d bytes", len(p))
				}
				if p != "" && p != "." {
					add = append(add, p)
				}
			}
			if len(add)+len(todo) > s.lim.MaxPath {
				return nil, refuse(entry, "path too long after following symbolic links")
			}
			todo = append(add, todo...)
		default:
			return nil, refuse(entry, "%s is not a directory", cut(path.Join(dir.path(), c)))
		}
	}
	return dir, nil
}

func cut(s string) string {
	if len(s) > 200 {
		s = s[:200] + "..."
	}
	return `"` + strings.ToValidUTF8(s, "?") + `"`
}

func reason(err error) string {
	var e *EntryError
	if errors.As(err, &e) {
		return e.Reason
	}
	return err.Error()
}
