package qmp

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// MaxMessage is the longest message in bytes that is accepted. The longest
// honest one lists the block nodes of a machine with a thousand disks, 2 MiB.
const MaxMessage = 16 << 20

// ErrTooLong is returned for a message longer than the bound.
var ErrTooLong = errors.New("QMP message too long")

// Error is QEMU's refusal of a command.
type Error struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("QMP %s: %s", e.Command, e.Desc) }

// IsNotFound says whether QEMU refused because a device does not exist.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == "DeviceNotFound"
}

// IsRefused says whether QEMU itself refused the command; other errors mean
// that it is not known what became of it.
func IsRefused(err error) bool {
	var e *Error
	return errors.As(err, &e)
}

// Event is something that happened in QEMU.
type Event struct {
	Name string
	Data json.RawMessage // may be nil
	Time time.Time       // by QEMU's clock
}

// Decode decodes the event's data into out.
func (e Event) Decode(out any) error {
	if len(e.Data) == 0 {
		return nil
	}
	if err := json.Unmarshal(e.Data, out); err != nil {
		return fmt.Errorf("QMP event %s: %w", e.Name, err)
	}
	return nil
}

// Message is one line of the protocol, of any kind.
type Message struct {
	Greeting *struct {
		Version struct {
			QEMU struct {
				Major int `json:"major"`
				Minor int `json:"minor"`
				Micro int `json:"micro"`
			} `json:"qemu"`
			Package string `json:"package"`
		} `json:"version"`
	} `json:"QMP"`
	ID        string          `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Parse decodes one message. Anything that is not a JSON object is an error.
func Parse(line []byte) (Message, error) {
	var m Message
	if err := json.Unmarshal(line, &m); err != nil {
		return Message{}, fmt.Errorf("QMP message %.60q: %w", line, err)
	}
	return m, nil
}

func (m Message) event() Event {
	return Event{Name: m.Event, Data: m.Data, Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)}
}

func (m Message) result(command string, out any) error {
	if m.Error != nil {
		m.Error.Command = command
		return m.Error
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fmt.Errorf("QMP %s: decode answer: %w", command, err)
	}
	return nil
}

// ReadMessage reads one line, without its end, of at most max bytes. Empty
// lines are skipped. A stream that ends within a line is io.ErrUnexpectedEOF.
func ReadMessage(r *bufio.Reader, max int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > max+2 {
			return nil, ErrTooLong
		}
		line = append(line, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, io.ErrUnexpectedEOF
		case err != nil:
			return nil, err
		}
		for len(line) > 0 && (line[len(line)-1] == '\n' || line[len(line)-1] == '\r') {
			line = line[:len(line)-1]
		}
		if len(line) > max {
			return nil, ErrTooLong
		}
		if len(line) > 0 {
			return line, nil
		}
	}
}
