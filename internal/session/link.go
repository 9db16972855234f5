package session

import (
	"io"
	"sync"
	"time"
)

// link is the writing half of a raw stream: one goroutine writes whole frames,
// so that whoever reads never waits for the peer to read. Control frames are
// slots (the newest of a kind wins) and go before data.
type link struct {
	raw io.ReadWriteCloser
	out chan []byte // one DATA frame, handed over

	mu      sync.Mutex
	slots   [8][]byte // by frame type
	pad     bool      // write padding before the next frame
	closing bool      // close raw once the slots are written
	err     error

	kick chan struct{}
	dead chan struct{} // closed by fail
	done chan struct{} // closed when the writer has ended
}

func newLink(raw io.ReadWriteCloser) *link {
	l := &link{raw: raw, out: make(chan []byte), kick: make(chan struct{}, 1),
		dead: make(chan struct{}), done: make(chan struct{})}
	go l.write()
	return l
}

// control queues a control frame; it never waits.
func (l *link) control(f frame) {
	b := appendFrame(nil, f)
	l.mu.Lock()
	l.slots[f.typ] = b
	l.mu.Unlock()
	l.wake()
}

// begin queues padding before the next control frame: a frame of an earlier
// writer that was cut short must not swallow what comes now.
func (l *link) begin() {
	l.mu.Lock()
	l.pad = true
	l.mu.Unlock()
}

func (l *link) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// fail ends the link: raw is closed, the writer ends.
func (l *link) fail(err error) {
	l.mu.Lock()
	first := l.err == nil
	if first {
		l.err = err
		close(l.dead)
	}
	l.mu.Unlock()
	if first {
		l.raw.Close()
	}
}

// closeAfter writes what is queued and then ends the link with err, at the
// latest after grace.
func (l *link) closeAfter(err error, grace time.Duration) {
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.wake()
	t := time.AfterFunc(grace, func() { l.fail(err) })
	go func() {
		<-l.done
		t.Stop()
		l.fail(err)
	}()
}

func (l *link) write() {
	defer close(l.done)
	for {
		var data []byte
		select {
		case <-l.dead:
			return
		case <-l.kick:
		case data = <-l.out:
		}
		b, fin, closing := l.take()
		if data != nil {
			b = append(b, data...)
			putBuffer(data)
		}
		b = append(b, fin...) // data that was taken already goes before it
		if len(b) > 0 {
			if _, err := l.raw.Write(b); err != nil {
				l.fail(gone(err))
				return
			}
		}
		if closing {
			return
		}
	}
}

// take empties the slots.
func (l *link) take() (b, fin []byte, closing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pad {
		l.pad = false
		b = make([]byte, maxFrame, maxFrame+64)
	}
	fin, l.slots[typeFin] = l.slots[typeFin], nil
	for i, s := range l.slots {
		if s != nil {
			b = append(b, s...)
			l.slots[i] = nil
		}
	}
	return b, fin, l.closing
}

var buffers = sync.Pool{New: func() any { return make([]byte, 0, maxFrame) }}

func getBuffer() []byte { return buffers.Get().([]byte)[:0] }

//lint:ignore SA6002 one small slice header a frame is cheap
func putBuffer(b []byte) { buffers.Put(b) }
