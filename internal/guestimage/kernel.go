package guestimage

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// maxKernel bounds an unpacked kernel, bytes.
const maxKernel = 256 << 20

// extractKernel takes the uncompressed kernel out of a bzImage: an ELF that QEMU
// starts directly (PVH), without the unpacker's two seconds under emulation.
func extractKernel(bz []byte) ([]byte, error) {
	const setupSects, bootFlag, header, payloadOffset, payloadLength = 0x1f1, 0x1fe, 0x202, 0x248, 0x24c
	if len(bz) < 0x260 || binary.LittleEndian.Uint16(bz[bootFlag:]) != 0xAA55 || string(bz[header:header+4]) != "HdrS" {
		return nil, fmt.Errorf("vmlinuz is not a bzImage: %w", errdefs.ErrInvalidArgument)
	}
	sects := int(bz[setupSects])
	if sects == 0 {
		sects = 4
	}
	begin := (sects+1)*512 + int(binary.LittleEndian.Uint32(bz[payloadOffset:]))
	end := begin + int(binary.LittleEndian.Uint32(bz[payloadLength:]))
	if begin < 0 || end > len(bz) || end-begin < 16 {
		return nil, fmt.Errorf("vmlinuz: its payload lies outside of it: %w", errdefs.ErrInvalidArgument)
	}
	k, err := unpack(bz[begin:end])
	if err != nil {
		return nil, fmt.Errorf("vmlinuz: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err := checkPVH(k); err != nil {
		return nil, fmt.Errorf("vmlinuz: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return k, nil
}

func unpack(p []byte) ([]byte, error) {
	switch {
	case bytes.HasPrefix(p, []byte{0x02, 0x21, 0x4c, 0x18}):
		return unpackLZ4(p[4:])
	case bytes.HasPrefix(p, []byte{0x1f, 0x8b}):
		r, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return readAll(r)
	case bytes.HasPrefix(p, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		r, err := zstd.NewReader(bytes.NewReader(p[:len(p)-4]), zstd.WithDecoderMaxMemory(maxKernel))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return readAll(r)
	case bytes.HasPrefix(p, []byte("\x7fELF")):
		return p, nil
	}
	return nil, fmt.Errorf("packed in a way that is not known here (%x); lz4, gzip and zstd are", p[:4])
}

// unpackLZ4 reads the legacy frame format: blocks of up to 8 MiB.
func unpackLZ4(p []byte) ([]byte, error) {
	const block = 8 << 20
	var out []byte
	buf := make([]byte, block)
	for len(p) > 4 {
		n := int(binary.LittleEndian.Uint32(p))
		if n <= 0 || n > len(p)-4 {
			break // the size of the whole, that ends a payload
		}
		m, err := lz4.UncompressBlock(p[4:4+n], buf)
		if err != nil {
			return nil, err
		}
		if out = append(out, buf[:m]...); len(out) > maxKernel {
			return nil, errors.New("too large")
		}
		p = p[4+n:]
		if m < block {
			break
		}
	}
	return out, nil
}

func readAll(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxKernel+1))
	if err == nil && len(b) > maxKernel {
		err = errors.New("too large")
	}
	return b, err
}

// checkPVH makes sure that QEMU can start the kernel: an ELF with Xen's note
// PHYS32_ENTRY (18).
func checkPVH(k []byte) error {
	f, err := elf.NewFile(bytes.NewReader(k))
	if err != nil {
		return err
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return err
		}
		for len(b) >= 12 {
			name, desc, typ := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:]), binary.LittleEndian.Uint32(b[8:])
			b = b[12:]
			n, d := int(name+3)&^3, int(desc+3)&^3
			if n < 0 || d < 0 || n+d > len(b) {
				break
			}
			if typ == 18 && bytes.HasPrefix(b[:n], []byte("Xen\x00")) {
				return nil
			}
			b = b[n+d:]
		}
	}
	return errors.New("the kernel has no PVH entry (CONFIG_PVH)")
}

// checkStatic makes sure that a program runs in a root without libraries.
func checkStatic(b []byte) error {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return err
	}
	if f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("is for %s, not for x86-64", f.Machine)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not a static program")
		}
	}
	return nil
}
