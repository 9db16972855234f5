package monitor

import (
	"bytes"
	"sync"
)

// queueLimit is how far a client may fall behind, in bytes, before it holds up
// the container it watches.
const queueLimit = 1 << 20

type frame struct {
	kind byte
	p    []byte
}

// client is one attached connection with frames on their way to it.
type client struct {
	c *conn

	mu   sync.Mutex
	q    []frame
	size int
	last bool // nothing comes after what is queued

	wake, space chan struct{} // capacity 1
	gone        chan struct{}
	once        sync.Once
}

func newClient(c *conn) *client {
	cl := &client{c: c, wake: make(chan struct{}, 1), space: make(chan struct{}, 1), gone: make(chan struct{})}
	go cl.deliver()
	return cl
}

// drop ends the connection and whoever waits for it.
func (cl *client) drop() {
	cl.once.Do(func() { close(cl.gone); cl.c.Close() })
}

// push queues a copy of p. It waits for space until ending is closed, from then
// on what comes is bounded by what was in the pipes. False: the client went.
func (cl *client) push(kind byte, p []byte, ending <-chan struct{}) bool {
	for {
		cl.mu.Lock()
		full := cl.size >= queueLimit
		select {
		case <-ending:
			full = false
		default:
		}
		if !full {
			cl.q = append(cl.q, frame{kind, bytes.Clone(p)})
			cl.size += len(p) + 64
			cl.mu.Unlock()
			notify(cl.wake)
			select {
			case <-cl.gone:
				return false
			default:
				return true
			}
		}
		cl.mu.Unlock()
		select {
		case <-cl.space:
		case <-ending:
		case <-cl.gone:
			return false
		}
	}
}

// finish closes the connection once all that is queued was sent.
func (cl *client) finish() {
	cl.mu.Lock()
	cl.last = true
	cl.mu.Unlock()
	notify(cl.wake)
}

func (cl *client) deliver() {
	defer cl.drop()
	for {
		cl.mu.Lock()
		q, last := cl.q, cl.last
		cl.q, cl.size = nil, 0
		cl.mu.Unlock()
		notify(cl.space)
		for _, f := range q {
			if cl.c.send(f.kind, f.p) != nil {
				return
			}
		}
		if len(q) > 0 {
			continue
		}
		if last {
			return
		}
		select {
		case <-cl.wake:
		case <-cl.gone:
			return
		}
	}
}

func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}
