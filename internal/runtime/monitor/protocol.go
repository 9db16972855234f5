package monitor

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// StartRequest runs a prepared bundle. It is kept on disk beside the container's
// pipes, so that a new monitor can take the container over.
type StartRequest struct {
	ID     string `json:"id"`
	Run    uint64 `json:"run"`    // counts the starts of this container
	Runc   string `json:"runc"`   // path of the OCI runtime
	Root   string `json:"root"`   // its state directory (--root)
	Bundle string `json:"bundle"` // directory of config.json
	Cgroup string `json:"cgroup"` // as in config.json: absolute below the mount points

	LogPath     string `json:"log_path"`
	LogMaxSize  int64  `json:"log_max_size"`
	LogMaxFiles int    `json:"log_max_files"`

	TTY       bool `json:"tty"`
	Stdin     bool `json:"stdin"`
	StdinOnce bool `json:"stdin_once"` // the first client's EOF closes standard input
}

// States of a container as the monitor sees it.
const (
	Starting = "starting"
	Running  = "running"
	Exited   = "exited"
	Gone     = "gone" // only in Watch: the monitor forgot it
)

// ExitUnknown is the exit code of a container that ended while no monitor was its parent.
const ExitUnknown = 255

// Status is what the monitor knows of a container's latest start.
type Status struct {
	ID         string    `json:"id"`
	Run        uint64    `json:"run"`
	State      string    `json:"state"`
	PID        int       `json:"pid,omitempty"`
	ExitCode   int       `json:"exit_code"`
	OOMKills   uint64    `json:"oom_kills,omitempty"`
	StartedAt  time.Time `json:"started_at"`
	FinishedAt time.Time `json:"finished_at"`
	Message    string    `json:"message,omitempty"`
	Failed     bool      `json:"failed,omitempty"` // it never ran
}

// ExecRequest runs a further process in a running container.
type ExecRequest struct {
	ID      string          `json:"id"`
	Process json.RawMessage `json:"process"` // OCI process object
	TTY     bool            `json:"tty"`
	Stdin   bool            `json:"stdin"`
	Detach  bool            `json:"detach"`  // goes on when the client goes
	Timeout time.Duration   `json:"timeout"` // 0 = none; then SIGKILL
}

// AttachRequest connects to a container's first process.
type AttachRequest struct {
	ID    string `json:"id"`
	Stdin bool   `json:"stdin"`
	Logs  bool   `json:"logs"` // replay the log first, without gap or repeat
}

// request is the first frame of a connection; exactly one field is set.
type request struct {
	Ping   bool           `json:"ping,omitempty"`
	Start  *StartRequest  `json:"start,omitempty"`
	Exec   *ExecRequest   `json:"exec,omitempty"`
	Attach *AttachRequest `json:"attach,omitempty"`
	Watch  bool           `json:"watch,omitempty"`
	Forget string         `json:"forget,omitempty"`
}

// response answers it.
type response struct {
	Error   string   `json:"error,omitempty"`
	Class   string   `json:"class,omitempty"`
	Status  *Status  `json:"status,omitempty"`
	PID     int      `json:"pid,omitempty"` // the monitor's, answering Ping
	Exit    int      `json:"exit"`
	Synced  bool     `json:"synced,omitempty"` // Watch: all that was there has been told
	Started bool     `json:"started,omitempty"`
	Ended   bool     `json:"ended,omitempty"`
	List    []Status `json:"list,omitempty"`
}

// Frames: one byte kind, four bytes length, payload.
const (
	frameJSON       = 'J'
	frameStdin      = 'i'
	frameCloseStdin = 'c'
	frameResize     = 'r' // rows, columns: two uint16
	frameSignal     = 's' // one byte
	frameStdout     = 'o'
	frameStderr     = 'e'

	maxFrame = 1 << 20
	chunk    = 32 << 10
)

// conn is one connection with frames in both directions.
type conn struct {
	net.Conn
	wmu sync.Mutex
}

func (c *conn) send(kind byte, p []byte) error {
	if len(p) > maxFrame {
		return fmt.Errorf("monitor message of %d bytes is too large: %w", len(p), errdefs.ErrInvalidArgument)
	}
	var h [5]byte
	h[0] = kind
	binary.BigEndian.PutUint32(h[1:], uint32(len(p)))
	c.wmu.Lock()
	defer c.wmu.Unlock()
	bufs := net.Buffers{h[:], p}
	_, err := bufs.WriteTo(c.Conn)
	return err
}

// left says that the other side has hung up; what it sent may still be unread.
func (c *conn) left() bool {
	uc, ok := c.Conn.(*net.UnixConn)
	if !ok {
		return false
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return true
	}
	hup := false
	err = rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		hup = err == nil && n > 0
	})
	return hup || err != nil
}

func (c *conn) sendJSON(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.send(frameJSON, b)
}

// recv reads one frame into buf, which grows as needed.
func (c *conn) recv(buf []byte) (kind byte, p []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(c.Conn, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("monitor message of %d bytes: %w", n, errdefs.ErrInvalidArgument)
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	_, err = io.ReadFull(c.Conn, buf[:n])
	return h[0], buf[:n], err
}

var classes = map[string]error{
	"not_found":           errdefs.ErrNotFound,
	"invalid_argument":    errdefs.ErrInvalidArgument,
	"already_exists":      errdefs.ErrAlreadyExists,
	"failed_precondition": errdefs.ErrFailedPrecondition,
	"conflict":            errdefs.ErrConflict,
	"unavailable":         errdefs.ErrUnavailable,
	"permission_denied":   errdefs.ErrPermissionDenied,
	"resource_exhausted":  errdefs.ErrResourceExhausted,
	"deadline_exceeded":   context.DeadlineExceeded,
	"internal":            errdefs.ErrInternal,
}

func failure(err error) response {
	r := response{Error: err.Error(), Class: "internal"}
	if len(r.Error) > 4096 {
		r.Error = r.Error[:4096]
	}
	for name, c := range classes {
		if errors.Is(err, c) {
			r.Class = name
		}
	}
	return r
}

// remoteError carries the text as sent and the class.
type remoteError struct {
	msg   string
	class error
}

func (e *remoteError) Error() string { return e.msg }
func (e *remoteError) Unwrap() error { return e.class }

func (r *response) err() error {
	if r.Error == "" {
		return nil
	}
	c := classes[r.Class]
	if c == nil {
		c = errdefs.ErrInternal
	}
	return &remoteError{r.Error, c}
}
