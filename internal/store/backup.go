package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

// A backup file is
//
//	TANDEM-STATE-BACKUP\n   20 bytes
//	length of the header    4 bytes, little-endian
//	header                  JSON, see BackupHeader
//	data base               as many bytes as the header says
//	sum                     32 bytes, SHA-256 of all before
const (
	backupMagic  = "TANDEM-STATE-BACKUP\n"
	backupFormat = 1
	maxHeader    = 64 << 10
	maxBackupDB  = 16 << 30
)

// BackupHeader is what a backup file says of itself.
type BackupHeader struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster"`
	// Revision that the state had at least.
	Revision uint64    `json:"revision"`
	Version  string    `json:"version"` // of the Tandem that made it
	Time     time.Time `json:"time"`
	DBBytes  int64     `json:"db_bytes"`
	// SecretKey opens the secrets in the state: the file is as secret as they are.
	SecretKey []byte `json:"secret_key"`
}

// Backup writes all of the state at one moment, with the key of its secrets, while
// it is used. Version is noted in it.
func (s *Store) Backup(ctx context.Context, w io.Writer, version string) error {
	if s.member == nil {
		return fmt.Errorf("the state is in an etcd of its own: back that up with its tools, and keep %s: %w", filepath.Join(s.opts.Dir, "secret.key"), errdefs.ErrFailedPrecondition)
	}
	if err := s.Err(); err != nil {
		return err
	}
	key, err := os.ReadFile(filepath.Join(s.opts.Dir, "secret.key"))
	if err != nil {
		return fmt.Errorf("the key of the secrets: %w", err)
	}
	rev := s.Revision()
	snap := s.member.etcd.Server.Backend().Snapshot()
	defer snap.Close()
	h := BackupHeader{Format: backupFormat, Cluster: s.cluster, Revision: rev, Version: version, Time: time.Now().UTC().Truncate(time.Second), DBBytes: snap.Size(), SecretKey: key}
	return writeBackup(w, h, func(w io.Writer) (int64, error) { return snap.WriteTo(&contextWriter{ctx, s.ctx, w}) })
}

// contextWriter ends a long writing.
type contextWriter struct {
	ctx, store context.Context
	w          io.Writer
}

func (c *contextWriter) Write(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	if err := c.store.Err(); err != nil {
		return 0, err
	}
	return c.w.Write(b)
}

func writeBackup(w io.Writer, h BackupHeader, db func(io.Writer) (int64, error)) error {
	head, err := json.Marshal(h)
	if err != nil {
		return err
	}
	sum := sha256.New()
	out := io.MultiWriter(w, sum)
	begin := binary.LittleEndian.AppendUint32([]byte(backupMagic), uint32(len(head)))
	if _, err := out.Write(append(begin, head...)); err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	n, err := db(out)
	if err == nil && n != h.DBBytes {
		err = fmt.Errorf("%d bytes of the data base instead of %d: %w", n, h.DBBytes, errdefs.ErrInternal)
	}
	if err == nil {
		_, err = w.Write(sum.Sum(nil))
	}
	if err != nil {
		return fmt.Errorf("writing the backup: %w", err)
	}
	return nil
}

// readBackup reads a backup file to its end and writes the data base to db. What it
// wrote is worth nothing unless it returns without an error: the sum comes last.
func readBackup(r io.Reader, db io.Writer) (*BackupHeader, error) {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("this is no whole backup of Tandem's state: %s: %w", fmt.Sprintf(format, a...), errdefs.ErrDataLoss)
	}
	sum := sha256.New()
	in := io.TeeReader(r, sum)
	begin := make([]byte, len(backupMagic)+4)
	if _, err := io.ReadFull(in, begin); err != nil || string(begin[:len(backupMagic)]) != backupMagic {
		return nil, bad("it does not begin as one")
	}
	n := binary.LittleEndian.Uint32(begin[len(backupMagic):])
	if n > maxHeader {
		return nil, bad("its header is said to have %d bytes", n)
	}
	head := make([]byte, n)
	if _, err := io.ReadFull(in, head); err != nil {
		return nil, bad("it ends in its header")
	}
	h := &BackupHeader{}
	if err := json.NewDecoder(bytes.NewReader(head)).Decode(h); err != nil {
		return nil, bad("its header can't be read: %v", err)
	}
	if h.Format != backupFormat {
		return nil, fmt.Errorf("this backup has format %d, made by Tandem %.40q; this one knows %d: use that version: %w", h.Format, h.Version, backupFormat, errdefs.ErrFailedPrecondition)
	}
	if h.DBBytes <= 0 || h.DBBytes > maxBackupDB || len(h.SecretKey) != 32 || h.Cluster == "" {
		return nil, bad("its header says what can't be")
	}
	if got, err := io.CopyN(db, in, h.DBBytes); err != nil {
		if got < h.DBBytes && err != io.EOF {
			return nil, fmt.Errorf("reading the backup: %w: %w", err, diskClass(err))
		}
		return nil, bad("it is cut off after %d of %d bytes of the data base", got, h.DBBytes)
	}
	want := sum.Sum(nil)
	have := make([]byte, len(want))
	if _, err := io.ReadFull(r, have); err != nil {
		return nil, bad("it is cut off at its end")
	}
	if !bytes.Equal(have, want) {
		return nil, bad("its sum is wrong")
	}
	if n, _ := io.ReadFull(r, have[:1]); n > 0 {
		return nil, bad("something follows its end")
	}
	return h, nil
}
