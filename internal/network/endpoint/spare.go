package endpoint

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// spareDelay is how long after a namespace was needed the next one is made ahead: not
// beside the start of the container that needed it.
const spareDelay = 300 * time.Millisecond

// spares holds one namespace that is ready, with a link in it, after there was need
// of one. It is open in this process and mounted nowhere: it goes with the process,
// and the link with it.
type spares struct {
	m      *Manager
	mu     sync.Mutex
	ns     *os.File
	link   string // name of this kernel's end; empty: there is none
	made   int
	timer  *time.Timer // it was asked for, and is made when this fires
	closed bool
}

// take returns the namespace that is ready, or nil, and the name of its link, and has
// the next one made. The caller closes it. A nil *spares never has one.
func (s *spares) take() (ns *os.File, link string) {
	if s == nil {
		return nil, ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	ns, link = s.ns, s.link
	s.ns, s.link = nil, ""
	if s.closed {
		return ns, link
	}
	if s.timer == nil {
		s.timer = time.AfterFunc(spareDelay, s.fill)
	} else {
		s.timer.Reset(spareDelay)
	}
	return ns, link
}

func (s *spares) fill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.ns != nil {
		return
	}
	ns, err := newNetns()
	if err != nil {
		return // whoever needs one finds out why
	}
	s.ns = ns
	s.made++
	name := Name(s.m.prefix, 's', fmt.Sprint(os.Getpid(), " ", s.made))
	if s.m.nl.LinkAdd(veth(name, DefaultMTU, nil, ns)) == nil {
		s.link = name
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
		s.ns, s.link = nil, ""
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
