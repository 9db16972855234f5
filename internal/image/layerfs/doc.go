// Package layerfs turns one image layer, a tar stream, into a read-only ext4
// block image that can be the lower layer of an overlay mount.
//
// It works in two passes over the same stream, so that memory grows with the
// number of entries and never with their size:
//
//	tree, err := layerfs.Scan(tarStream, limits)   // checks every entry, keeps only names and metadata
//	size, err := tree.Ext4(sameTarStream, file)    // writes the block image
//
// Scan refuses what a layer must not hold (see Scan) with an *EntryError, whose
// class is errdefs.ErrInvalidArgument and which names the entry. What it
// accepts it normalises, as an unpacking container engine would: the last entry
// of a name wins, missing parent directories are made (0755, root), parents that
// are symbolic links of the same layer are followed inside the layer, ".wh." files
// become overlay whiteouts and opaque directories.
//
// The output depends on nothing but the stream: the same layer gives the same
// bytes on every host.
package layerfs
