package layerfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
)

// What the ext4 writer leaves to be put right:
//   - it makes /lost+found, which every container would see. Unless the layer
//     brings one, the directory is taken out again;
//   - it sorts the attributes in an attribute block in an order the kernel's
//     search does not expect, so that some are not found;
//   - it leaves the end of the inode bitmaps unset, which fsck complains about.

const (
	inodeRoot  = 2
	inodeLPF   = 11
	inodeBytes = 256
	leHeader   = 12
)

var le = binary.LittleEndian

// image gives access to the few structures that are patched. The writer uses
// one layout only: 4 KiB blocks, 32-byte group descriptors, no checksums.
type image struct {
	f         *os.File
	sb        []byte // 1024 bytes at offset 1024
	gd        []byte // first group's descriptor, 32 bytes at block 1
	inodes    uint32
	perGroup  uint32
	groupDesc []byte // all descriptors
}

func openImage(f *os.File) (*image, error) {
	im := &image{f: f, sb: make([]byte, 1024)}
	if _, err := f.ReadAt(im.sb, 1024); err != nil {
		return nil, err
	}
	if le.Uint16(im.sb[0x38:]) != 0xef53 || le.Uint32(im.sb[0x18:]) != 2 {
		return nil, errors.New("not the expected file system")
	}
	im.inodes, im.perGroup = le.Uint32(im.sb[0:]), le.Uint32(im.sb[0x28:])
	groups := im.inodes / im.perGroup
	im.groupDesc = make([]byte, groups*32)
	if _, err := f.ReadAt(im.groupDesc, block); err != nil {
		return nil, err
	}
	im.gd = im.groupDesc[:32]
	return im, nil
}

func (im *image) inodeAt(n uint32) int64 {
	group, index := (n-1)/im.perGroup, (n-1)%im.perGroup
	table := le.Uint32(im.groupDesc[group*32+8:])
	return int64(table)*block + int64(index)*inodeBytes
}

func (t *Tree) fix(f *os.File) error {
	im, err := openImage(f)
	if err != nil {
		return err
	}
	if err := im.padInodeMaps(); err != nil {
		return fmt.Errorf("pad inode bitmaps: %w", err)
	}
	if t.root.children["lost+found"] == nil {
		if err := im.dropLostFound(); err != nil {
			return fmt.Errorf("take out lost+found: %w", err)
		}
	}
	if t.multiXattr {
		if err := im.sortXattrs(); err != nil {
			return fmt.Errorf("sort extended attributes: %w", err)
		}
	}
	return nil
}

// firstExtent returns the physical block and the number of blocks of an inode
// whose data is one extent, as the two directories' first blocks are.
func firstExtent(ino []byte) (start, count uint32, err error) {
	b := ino[0x28:]
	if le.Uint16(b) != 0xf30a || le.Uint16(b[6:]) != 0 || le.Uint16(b[2:]) == 0 {
		return 0, 0, errors.New("unexpected extent tree")
	}
	return le.Uint32(b[leHeader+8:]), uint32(le.Uint16(b[leHeader+4:])), nil
}

// dropLostFound removes the directory entry, frees the inode and its block, and
// corrects the counts, so that fsck finds nothing to complain about.
func (im *image) dropLostFound() error {
	root, lpf := make([]byte, inodeBytes), make([]byte, inodeBytes)
	if _, err := im.f.ReadAt(root, im.inodeAt(inodeRoot)); err != nil {
		return err
	}
	if _, err := im.f.ReadAt(lpf, im.inodeAt(inodeLPF)); err != nil {
		return err
	}
	start, _, err := firstExtent(root)
	if err != nil {
		return err
	}
	data, blocks, err := firstExtent(lpf)
	if err != nil {
		return err
	}
	dir := make([]byte, block)
	if _, err := im.f.ReadAt(dir, int64(start)*block); err != nil {
		return err
	}
	dot := int(le.Uint16(dir[4:]))
	dotdot := int(le.Uint16(dir[dot+4:]))
	at := dot + dotdot
	if at+8 > block || le.Uint32(dir[at:]) != inodeLPF {
		return errors.New("unexpected root directory")
	}
	le.PutUint16(dir[dot+4:], uint16(dotdot+int(le.Uint16(dir[at+4:]))))
	clear(dir[at : at+int(le.Uint16(dir[at+4:]))])
	le.PutUint16(root[0x1a:], le.Uint16(root[0x1a:])-1)

	blockMap, inodeMap := make([]byte, block), make([]byte, block)
	const perGroup = block * 8
	blockGD := im.groupDesc[data/perGroup*32:][:32] // the inode is in the first group, its data anywhere
	blockMapAt, inodeMapAt := int64(le.Uint32(blockGD))*block, int64(le.Uint32(im.gd[4:]))*block
	if _, err := im.f.ReadAt(blockMap, blockMapAt); err != nil {
		return err
	}
	if _, err := im.f.ReadAt(inodeMap, inodeMapAt); err != nil {
		return err
	}
	inodeMap[(inodeLPF-1)/8] &^= 1 << ((inodeLPF - 1) % 8)
	if data%perGroup+blocks > perGroup {
		return errors.New("unexpected extent over two groups")
	}
	for b := data % perGroup; b < data%perGroup+blocks; b++ {
		blockMap[b/8] &^= 1 << (b % 8)
	}
	add16 := func(p []byte, n int) { le.PutUint16(p, uint16(int(le.Uint16(p))+n)) }
	add16(blockGD[12:], int(blocks))                           // free blocks
	add16(im.gd[14:], 1)                                       // free inodes
	add16(im.gd[16:], -1)                                      // directories
	le.PutUint32(im.sb[0x0c:], le.Uint32(im.sb[0x0c:])+blocks) // free blocks
	le.PutUint32(im.sb[0x10:], le.Uint32(im.sb[0x10:])+1)      // free inodes
	le.PutUint32(im.sb[0x268:], 0)                             // where lost+found is
	for _, w := range []struct {
		b  []byte
		at int64
	}{
		{dir, int64(start) * block}, {root, im.inodeAt(inodeRoot)}, {make([]byte, inodeBytes), im.inodeAt(inodeLPF)},
		{blockMap, blockMapAt}, {inodeMap, inodeMapAt}, {im.groupDesc, block}, {im.sb, 1024},
	} {
		if _, err := im.f.WriteAt(w.b, w.at); err != nil {
			return err
		}
	}
	return nil
}

// padInodeMaps marks the inodes that no group has as used.
func (im *image) padInodeMaps() error {
	b := make([]byte, block)
	for g := 0; g < len(im.groupDesc); g += 32 {
		at := int64(le.Uint32(im.groupDesc[g+4:])) * block
		if _, err := im.f.ReadAt(b, at); err != nil {
			return err
		}
		for i := im.perGroup; i < block*8; i++ {
			b[i/8] |= 1 << (i % 8)
		}
		if _, err := im.f.WriteAt(b, at); err != nil {
			return err
		}
	}
	return nil
}

// sortXattrs puts the entries of every attribute block in the kernel's order:
// by namespace, length of the name, name. Values stay where they are.
func (im *image) sortXattrs() error {
	groups := im.inodes / im.perGroup
	for g := range groups {
		table := io.NewSectionReader(im.f, im.inodeAt(g*im.perGroup+1), int64(im.perGroup)*inodeBytes)
		buf := make([]byte, 64*block)
		for {
			n, err := io.ReadFull(table, buf)
			for i := 0; i+inodeBytes <= n; i += inodeBytes {
				if b := le.Uint32(buf[i+0x68:]); b != 0 {
					if err := im.sortBlock(int64(b) * block); err != nil {
						return err
					}
				}
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (im *image) sortBlock(at int64) error {
	b := make([]byte, block)
	if _, err := im.f.ReadAt(b, at); err != nil {
		return err
	}
	var entries [][]byte
	const first = 32
	end := first
	for end+16 <= block && le.Uint32(b[end:]) != 0 {
		n := 16 + (int(b[end])+3)&^3
		if end+n > block {
			return errors.New("broken attribute block")
		}
		entries = append(entries, append([]byte(nil), b[end:end+n]...))
		end += n
	}
	sort.SliceStable(entries, func(i, j int) bool {
		x, y := entries[i], entries[j]
		if x[1] != y[1] {
			return x[1] < y[1]
		}
		if x[0] != y[0] {
			return x[0] < y[0]
		}
		return string(x[16:16+x[0]]) < string(y[16:16+y[0]])
	})
	pos := first
	for _, e := range entries {
		pos += copy(b[pos:], e)
	}
	_, err := im.f.WriteAt(b, at)
	return err
}
