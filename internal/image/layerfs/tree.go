package layerfs

import (
	"sort"
	"strings"
	"time"
)

type kind uint8

const (
	kindDir kind = iota
	kindFile
	kindSymlink
	kindDevice
	kindFifo
	kindWhiteout
)

// meta is what is kept of a directory's header: directories are written from
// memory, everything else from the second pass over the stream.
type meta struct {
	mode     int64
	uid, gid int
	mtime    time.Time
	xattrs   map[string]string
}

// inode is a file of any kind; several nodes share it when there are hard links.
type inode struct {
	kind   kind
	entry  int    // index of the tar entry that made it; -1: made up
	target string // symbolic links only
	links  int
	dir    *meta // directories only; nil: made up
	opaque bool  // directories only
}

// node is a name in the layer's tree.
type node struct {
	name     string
	parent   *node
	children map[string]*node
	dirs     int // children that are directories
	size     int // bytes of the path
	ino      *inode
}

// Tree is the checked content of a layer: names and metadata, no data.
type Tree struct {
	root    *node
	entries int   // tar entries seen
	bytes   int64 // sum of the live and dead files' sizes
	newest  time.Time
	// multiXattr: some entry has two or more extended attributes, whose order in
	// the block image needs care.
	multiXattr bool
}

// Entries is the number of entries the tar has.
func (t *Tree) Entries() int { return t.entries }

// Bytes is the sum of the sizes of the tar's files.
func (t *Tree) Bytes() int64 { return t.bytes }

// Newest is the latest modification time of any entry; zero without entries.
func (t *Tree) Newest() time.Time { return t.newest }

func newTree() *Tree {
	root := &node{children: map[string]*node{}, ino: &inode{kind: kindDir, entry: -1}}
	root.parent = root
	return &Tree{root: root}
}

// path is the node's path without a leading slash; "" for the root.
func (n *node) path() string {
	if n.parent == n {
		return ""
	}
	depth := 0
	for m := n; m.parent != m; m = m.parent {
		depth++
	}
	parts := make([]string, depth)
	for m := n; m.parent != m; m = m.parent {
		depth--
		parts[depth] = m.name
	}
	var b strings.Builder
	b.Grow(n.size)
	for i, p := range parts {
		if i > 0 {
			b.WriteByte('/')
		}
		b.WriteString(p)
	}
	return b.String()
}

// put gives dir a child, replacing what had the name.
func (dir *node) put(name string, ino *inode) *node {
	dir.drop(name)
	n := &node{name: name, parent: dir, ino: ino, size: dir.size + 1 + len(name)}
	ino.links++
	if ino.kind == kindDir {
		n.children = map[string]*node{}
		dir.dirs++
	}
	dir.children[name] = n
	return n
}

// drop removes the child and all below it.
func (dir *node) drop(name string) {
	old := dir.children[name]
	if old == nil {
		return
	}
	delete(dir.children, name)
	if old.ino.kind == kindDir {
		dir.dirs--
	}
	var unlink func(*node)
	unlink = func(n *node) {
		n.ino.links--
		for _, c := range n.children {
			unlink(c)
		}
	}
	unlink(old)
}

// sorted returns the children by name: the block image must not depend on map order.
func (dir *node) sorted() []*node {
	out := make([]*node, 0, len(dir.children))
	for _, c := range dir.children {
		out = append(out, c)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].name < out[j].name })
	return out
}

// walk visits n and all below it, parents first, siblings by name.
func (n *node) walk(visit func(*node) error) error {
	if err := visit(n); err != nil {
		return err
	}
	for _, c := range n.sorted() {
		if err := c.walk(visit); err != nil {
			return err
		}
	}
	return nil
}
