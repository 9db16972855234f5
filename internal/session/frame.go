package session

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"io"
)

// A frame is a header of 32 bytes, big endian, and a payload:
//
//	 0 magic    uint32
//	 4 type     uint8
//	 5 version  uint8, of the frame format
//	 6 zero     uint16
//	 8 session  uint64
//	16 seq      uint32   DATA, FIN: number of DATA frames sent before
//	20 length   uint32   of the payload
//	24 payload CRC32C uint32
//	28 header CRC32C  uint32, of the 28 bytes before
const (
	magic       = 0x9A7A4D5E
	headerSize  = 32
	frameFormat = 1
	maxFrame    = headerSize + MaxPayload
)

type frameType uint8

const (
	typeSync   frameType = 1 // host: begins session; payload syncPayload
	typeAck    frameType = 2 // guest: takes session; payload ackPayload
	typeHello  frameType = 3 // guest: listener began, or refuses `session`; payload listener id
	typeData   frameType = 4
	typeWindow frameType = 5 // total bytes that the receiver allows in this session
	typeFin    frameType = 6 // no more data; seq = DATA frames sent
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	magicBytes = binary.BigEndian.AppendUint32(nil, magic)
)

type frame struct {
	typ     frameType
	session uint64
	seq     uint32
	payload []byte // valid until the next call of decoder.next
}

// appendFrame appends the encoded frame to b.
func appendFrame(b []byte, f frame) []byte {
	var h [headerSize]byte
	binary.BigEndian.PutUint32(h[0:], magic)
	h[4] = byte(f.typ)
	h[5] = frameFormat
	binary.BigEndian.PutUint64(h[8:], f.session)
	binary.BigEndian.PutUint32(h[16:], f.seq)
	binary.BigEndian.PutUint32(h[20:], uint32(len(f.payload)))
	binary.BigEndian.PutUint32(h[24:], crc32.Checksum(f.payload, castagnoli))
	binary.BigEndian.PutUint32(h[28:], crc32.Checksum(h[:28], castagnoli))
	return append(append(b, h[:]...), f.payload...)
}

// decoder finds frames in a stream that may hold anything between them.
type decoder struct {
	r       *bufio.Reader
	pending int // bytes of the frame returned last
	// rubbish counts bytes that belonged to no frame since it was last reset.
	rubbish int64
	// limit is how much rubbish is borne before next fails.
	limit int64
}

func newDecoder(r io.Reader) *decoder {
	return &decoder{r: bufio.NewReaderSize(r, 2*maxFrame), limit: maxRubbish}
}

// next returns the next intact frame. Its payload is valid until the call after.
// It fails with the reader's error, or with DataLoss after too much rubbish.
func (d *decoder) next() (frame, error) {
	if d.pending > 0 {
		if _, err := d.r.Discard(d.pending); err != nil {
			return frame{}, err
		}
		d.pending = 0
	}
	for {
		if d.rubbish > d.limit {
			return frame{}, dataLoss("%d bytes of rubbish on the agent channel", d.rubbish)
		}
		h, err := d.r.Peek(headerSize)
		if err != nil {
			return frame{}, err
		}
		if !bytes.Equal(h[:4], magicBytes) {
			d.hunt(0)
			continue
		}
		n := binary.BigEndian.Uint32(h[20:])
		if h[5] != frameFormat || n > MaxPayload || crc32.Checksum(h[:28], castagnoli) != binary.BigEndian.Uint32(h[28:]) {
			d.hunt(1)
			continue
		}
		b, err := d.r.Peek(headerSize + int(n))
		if err != nil {
			return frame{}, err
		}
		if crc32.Checksum(b[headerSize:], castagnoli) != binary.BigEndian.Uint32(b[24:]) {
			// A frame that a restart cut short swallowed newer bytes: look inside.
			d.hunt(1)
			continue
		}
		d.pending = len(b)
		return frame{
			typ:     frameType(b[4]),
			session: binary.BigEndian.Uint64(b[8:]),
			seq:     binary.BigEndian.Uint32(b[16:]),
			payload: b[headerSize:],
		}, nil
	}
}

// hunt throws away `at least` bytes and then all up to what could be a magic.
func (d *decoder) hunt(least int) {
	b, _ := d.r.Peek(d.r.Buffered())
	n := bytes.IndexByte(b[least:], magicBytes[0])
	if n < 0 {
		n = len(b)
	} else {
		n += least
	}
	if n == 0 { // the first byte fits, the magic does not
		n = 1
	}
	d.r.Discard(n)
	d.rubbish += int64(n)
}

// syncPayload is what the host offers.
type syncPayload struct {
	minVersion, maxVersion uint8
	window                 uint32
}

func (p syncPayload) encode() []byte {
	return binary.BigEndian.AppendUint32([]byte{p.minVersion, p.maxVersion, 0, 0}, p.window)
}

func decodeSync(b []byte) (p syncPayload, ok bool) {
	if len(b) < 8 { // longer: of a newer version, the rest is not ours
		return p, false
	}
	return syncPayload{b[0], b[1], binary.BigEndian.Uint32(b[4:])}, true
}

// ackPayload is what the guest takes: version 0 means that none fits.
type ackPayload struct {
	version                uint8
	minVersion, maxVersion uint8
	window                 uint32
	listener               uint64
}

func (p ackPayload) encode() []byte {
	b := binary.BigEndian.AppendUint32([]byte{p.version, p.minVersion, p.maxVersion, 0}, p.window)
	return binary.BigEndian.AppendUint64(b, p.listener)
}

func decodeAck(b []byte) (p ackPayload, ok bool) {
	if len(b) < 16 {
		return p, false
	}
	return ackPayload{b[0], b[1], b[2], binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])}, true
}

func encodeU64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func decodeU64(b []byte) (uint64, bool) {
	if len(b) < 8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(b), true
}
