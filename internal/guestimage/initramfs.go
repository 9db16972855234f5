package guestimage

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"

	"tandem/internal/guest/layout"
)

var directories = []string{
	"bin", "dev", "etc", "home", "lib", "lib/modules", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin",
	"var", "var/lib", "var/lib/tandem",
}

// writeInitramfs writes the archive: sorted, without times, so that the same
// inputs give the same bytes.
func writeInitramfs(path string, o Options, release string, mods *moduleSet) error {
	guest, err := static(o.GuestBinary, "tandem-guest")
	if err != nil {
		return err
	}
	runc, err := static(o.RuncBinary, "runc")
	if err != nil {
		return err
	}
	var recs []cpio.Record
	for _, d := range directories {
		mode := uint64(0o755)
		if d == "tmp" {
			mode = 0o1777
		}
		recs = append(recs, cpio.Directory(d, mode))
	}
	file := func(name string, data []byte, mode uint64) {
		recs = append(recs, cpio.StaticFile(strings.TrimPrefix(name, "/"), string(data), mode))
	}
	recs = append(recs,
		cpio.CharDev("dev/console", 0o600, 5, 1), // standard streams of /init
		cpio.CharDev("dev/null", 0o666, 1, 3),
		cpio.Symlink(strings.TrimPrefix(layout.Modprobe, "/"), layout.Init),
	)
	file(layout.Init, guest, 0o755)
	file("etc/passwd", []byte("root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"), 0o644)
	file("etc/group", []byte("root:x:0:\nnogroup:x:65534:\n"), 0o644)
	file("etc/hosts", []byte("127.0.0.1 localhost\n::1 localhost\n"), 0o644)
	file("etc/os-release", []byte("ID=tandem-guest\nNAME=\"Tandem guest\"\n"), 0o644)
	var index, aliases []string
	for _, m := range mods.order {
		data := m.data
		if !o.KeepSignatures {
			data = stripSignature(data)
		}
		file(layout.ModuleDir+"/"+m.name+".ko", data, 0o644)
		index = append(index, strings.TrimRight(m.name+" "+strings.Join(m.depends, " "), " "))
		for _, a := range m.aliases {
			if !strings.ContainsAny(a, " \n") {
				aliases = append(aliases, "alias "+a+" "+m.name)
			}
		}
	}
	file(layout.BootList, lines(mods.boot), 0o644)
	file(layout.LateList, lines(mods.late), 0o644)
	file(layout.ModuleIndex, append(lines(index), lines(aliases)...), 0o644)
	file(layout.ModuleDir+"/release", []byte(release+"\n"), 0o644)
	file(layout.Runc, runc, 0o755)

	var buf bytes.Buffer
	w := cpio.Newc.Writer(&buf)
	for i := range recs {
		rec := cpio.MakeReproducible(recs[i])
		rec.Ino = uint64(i + 1)
		if err := w.WriteRecord(rec); err != nil {
			return fmt.Errorf("guest image: initramfs: %s: %w", rec.Name, err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return fmt.Errorf("guest image: initramfs: %w", err)
	}
	for buf.Len()%512 != 0 {
		buf.WriteByte(0)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := compress(f, buf.Bytes(), o.Compression); err != nil {
		return fmt.Errorf("guest image: initramfs: %w", err)
	}
	return f.Close()
}

// compress writes b as one of the formats that the kernel unpacks.
func compress(w io.Writer, b []byte, how string) error {
	switch how {
	case "none":
		_, err := w.Write(b)
		return err
	case "", "lz4":
		z := lz4.NewWriter(w)
		if err := z.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9), lz4.ConcurrencyOption(1)); err != nil {
			return err
		}
		if _, err := z.Write(b); err != nil {
			return err
		}
		return z.Close()
	case "zstd":
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderConcurrency(1),
			zstd.WithWindowSize(1<<22))
		if err != nil {
			return err
		}
		if _, err := z.Write(b); err != nil {
			return err
		}
		return z.Close()
	}
	return fmt.Errorf("compression %q is not known; take lz4, zstd or none: %w", how, errdefs.ErrInvalidArgument)
}
