package endpoint

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// spareDelay is how long after a namespace was needed the next one is made ahead: not
// beside the start of the container that needed it, which takes half a second where
// machines are emulated.
const spareDelay = time.Second

// spares holds one namespace that is ready, after there was need of one. It is open
// in this process and mounted nowhere: it goes with the process.
type spares struct {
	mu     sync.Mutex
	ns     *os.File
	timer  *time.Timer // it was asked for, and is made when this fires
	closed bool
}

// take returns the namespace that is ready, or nil, and has the next one made. The
// caller closes it. A nil *spares never has one.
func (s *spares) take() *os.File {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ns := s.ns
	s.ns = nil
	if s.closed {
		return ns
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(spareDelay, s.fill)
	} else {
		s.timer.Reset(spareDelay)
	}
	return ns
}

func (s *spares) fill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.ns != nil {
		return
	}
	if ns, err := newNetns(); err == nil { // else whoever needs one finds out why
		s.ns = ns
	}
}

func (s *spares) close() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.ns != nil {
		s.ns.Close()
		s.ns = nil
	}
}

// newNetns makes a namespace, with its loopback up, that lives as long as the result
// is open or somebody is in it.
func newNetns() (ns *os.File, err error) {
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := insideNew(); err != nil {
			return err
		}
		ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return ns, err
}
