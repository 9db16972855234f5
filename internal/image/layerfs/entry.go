package layerfs

import (
	"archive/tar"
	"encoding/binary"
	"errors"
	"strings"
	"time"
)

const (
	paxXattr    = "SCHILY.xattr."
	xattrOpaque = "trusted.overlay.opaque"
)

// harmless devices, as every container gets them in /dev: major, minor.
var harmless = map[[2]int64]bool{
	{1, 3}: true, {1, 5}: true, {1, 7}: true, {1, 8}: true, {1, 9}: true, // null zero full random urandom
	{5, 0}: true, {5, 1}: true, {5, 2}: true, // tty console ptmx
}

// inode checks an entry that is neither link nor whiteout.
func (s *scanner) inode(hdr *tar.Header, index int) (*inode, error) {
	m, err := s.meta(hdr)
	if err != nil {
		return nil, err
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return &inode{kind: kindDir, entry: index, dir: m}, nil
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return &inode{kind: kindFile, entry: index}, s.size(hdr)
	case tar.TypeSymlink:
		if n := len(hdr.Linkname); n == 0 || n > s.lim.MaxPath {
			return nil, refuse(hdr.Name, "symbolic link with a target of %d bytes", n)
		}
		if strings.IndexByte(hdr.Linkname, 0) >= 0 {
			return nil, refuse(hdr.Name, "symbolic link with a zero byte in its target")
		}
		return &inode{kind: kindSymlink, entry: index, target: hdr.Linkname}, nil
	case tar.TypeFifo:
		return &inode{kind: kindFifo, entry: index}, nil
	case tar.TypeChar:
		if !harmless[[2]int64{hdr.Devmajor, hdr.Devminor}] {
			return nil, refuse(hdr.Name, "character device %d:%d: images must not bring devices", hdr.Devmajor, hdr.Devminor)
		}
		return &inode{kind: kindDevice, entry: index}, nil
	case tar.TypeBlock:
		return nil, refuse(hdr.Name, "block device %d:%d: images must not bring devices", hdr.Devmajor, hdr.Devminor)
	default:
		return nil, refuse(hdr.Name, "unknown entry type %q", hdr.Typeflag)
	}
}

func (s *scanner) size(hdr *tar.Header) error {
	if hdr.Size < 0 || hdr.Size > s.lim.MaxFileBytes {
		return refuse(hdr.Name, "size of %d bytes, more than %d", hdr.Size, s.lim.MaxFileBytes)
	}
	if s.tree.bytes += hdr.Size; s.tree.bytes > s.lim.MaxBytes {
		return refuse(hdr.Name, "with it the layer has %d bytes, more than %d", s.tree.bytes, s.lim.MaxBytes)
	}
	return nil
}

// meta checks owner and attributes.
func (s *scanner) meta(hdr *tar.Header) (*meta, error) {
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return nil, refuse(hdr.Name, "owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	xattrs, err := s.xattrs(hdr)
	if err != nil {
		return nil, err
	}
	if len(xattrs) > 1 {
		s.tree.multiXattr = true
	}
	return &meta{mode: hdr.Mode & 07777, uid: hdr.Uid, gid: hdr.Gid, mtime: hdr.ModTime, xattrs: xattrs}, nil
}

// xattrs returns what of the extended attributes goes into the block image:
// user.*, trusted.*, security.* and ACLs; not overlay's own, which would let a
// layer steer the mount, and not those that ext4 can't hold.
func (s *scanner) xattrs(hdr *tar.Header) (map[string]string, error) {
	var out map[string]string
	total := 0
	for k, v := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		switch {
		case name == "system.posix_acl_access" || name == "system.posix_acl_default":
			acl, err := aclToDisk(v)
			if err != nil {
				return nil, refuse(hdr.Name, "attribute %s: %v", name, err)
			}
			v = acl
		case hasNamespace(name):
			if len(name) > maxXattrName {
				return nil, refuse(hdr.Name, "attribute with a name of %d bytes, more than %d", len(name), maxXattrName)
			}
		default:
			continue
		}
		if total += len(name) + len(v) + 20; total > s.lim.MaxXattrs {
			return nil, refuse(hdr.Name, "extended attributes of more than %d bytes", s.lim.MaxXattrs)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = v
	}
	return out, nil
}

func hasNamespace(name string) bool {
	for _, p := range []string{"user.", "trusted.", "security."} {
		if len(name) > len(p) && strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// aclToDisk converts a POSIX ACL from the form of system calls (version 2, 8
// bytes an entry) to ext4's (version 1, 4 or 8 bytes an entry).
func aclToDisk(v string) (string, error) {
	b := []byte(v)
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != 2 {
		return "", errors.New("not a POSIX ACL")
	}
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for b = b[4:]; len(b) > 0; b = b[8:] {
		tag := binary.LittleEndian.Uint16(b)
		out = append(out, b[:4]...) // tag, permissions
		switch tag {
		case 0x02, 0x08: // a user, a group
			out = append(out, b[4:8]...)
		case 0x01, 0x04, 0x10, 0x20: // owner, owning group, mask, others
		default:
			return "", errors.New("not a POSIX ACL: unknown tag")
		}
	}
	return string(out), nil
}

// diskTime maps a time so that the ext4 writer, which stores its low 34 bits
// and the kernel's reading of them (32 signed bits plus an epoch) come out
// right for 1901 to 2446. Times outside are clamped.
func diskTime(t time.Time) time.Time {
	s := t.Unix()
	const first, last = -1 << 31, 1<<31 + 3<<32 - 1
	s = min(max(s, first), last)
	low := int64(int32(s)) // what the kernel adds the epoch to
	epoch := (s - low) >> 32
	return time.Unix(epoch<<32|s&0xffffffff, int64(t.Nanosecond()))
}
