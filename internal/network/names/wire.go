package names

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A request is a byte that says what, the payload's length (4 bytes, big endian)
// and the payload; an answer is a length and a JSON object.
const (
	askHello = 'h' // who are you? No payload
	askSet   = 's' // a v1.HostSpec, of which networks and names count
	askQuit  = 'q' // end. No payload

	maxState    = 8 << 20  // bytes of a state: some 100,000 names
	maxAnswer   = 64 << 10 // bytes
	maxClients  = 8
	callTimeout = 10 * time.Second // of one request, once it began
)

// answer is what the process says to each request.
type answer struct {
	Identity string `json:"identity"`
	PID      int    `json:"pid"`
	Port     uint16 `json:"port,omitempty"`
	Error    string `json:"error,omitempty"` // why it does not serve, or not what was set
}

func (a answer) err() error {
	if a.Error == "" {
		return nil
	}
	return fmt.Errorf("%s: %w", a.Error, errdefs.ErrUnavailable)
}

func writeRequest(w io.Writer, kind byte, p []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(p))), p...))
	return err
}

func readRequest(c net.Conn) (kind byte, p []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(c, head[:1]); err != nil { // may take for ever
		return 0, nil, err
	}
	if err := c.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return 0, nil, err
	}
	if _, err := io.ReadFull(c, head[1:]); err != nil {
		return 0, nil, err
	}
	limit := uint32(0)
	switch head[0] {
	case askSet:
		limit = maxState
	case askHello, askQuit:
	default:
		return 0, nil, fmt.Errorf("unknown request %q: %w", head[0], errdefs.ErrInvalidArgument)
	}
	p, err = readSized(c, binary.BigEndian.Uint32(head[1:]), limit)
	return head[0], p, err
}

// readSized takes no more memory than what really comes.
func readSized(r io.Reader, n, limit uint32) ([]byte, error) {
	if n > limit {
		return nil, fmt.Errorf("%d bytes: at most %d are allowed: %w", n, limit, errdefs.ErrInvalidArgument)
	}
	p, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err == nil && len(p) < int(n) {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}

func writeAnswer(w io.Writer, a answer) error {
	if len(a.Error) > 4096 {
		a.Error = strings.ToValidUTF8(a.Error[:4096], "") + "…"
	}
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}

func readAnswer(r io.Reader) (a answer, err error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return a, err
	}
	b, err := readSized(r, binary.BigEndian.Uint32(head[:]), maxAnswer)
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(b, &a)
}

// ask opens a connection for one request.
func ask(socket string, kind byte, timeout time.Duration) (answer, error) {
	c, err := net.DialTimeout("unix", socket, timeout)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(timeout))
	if err := writeRequest(c, kind, nil); err != nil {
		return answer{}, err
	}
	return readAnswer(c)
}

// lockOf is the file whose lock a process holds as long as it lives; its content
// is the process's id.
func lockOf(socket string) string { return socket + ".lock" }

func openLock(socket string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(socket), 0o711); err != nil {
		return nil, err
	}
	return os.OpenFile(lockOf(socket), os.O_RDWR|os.O_CREATE, 0o600)
}

// tryLock takes the lock if no process has it.
func tryLock(f *os.File) bool {
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil
}

// waitLock takes the lock when its process ends, and gives up after d.
func waitLock(f *os.File, d time.Duration) bool {
	for deadline := time.Now().Add(d); ; time.Sleep(2 * time.Millisecond) {
		if tryLock(f) {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// waitExit waits until a process has ended that was there a moment ago, at most d.
func waitExit(pid int, d time.Duration) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil || pid == os.Getpid() {
		return
	}
	defer unix.Close(fd)
	for deadline := time.Now().Add(d); ; {
		left := time.Until(deadline)
		if left <= 0 {
			return
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// killHolder ends a process that holds the lock and does not listen to reason.
func killHolder(f *os.File) error {
	b := make([]byte, 20)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid < 2 || pid == os.Getpid() {
		return fmt.Errorf("%s does not say which process has it: %w", f.Name(), errdefs.ErrFailedPrecondition)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if tryLock(f) { // it ended meanwhile; the id may be another's now
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("end process %d: %w", pid, err)
	}
	return nil
}
