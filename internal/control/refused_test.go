package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

// fullHost is a host whose agent has no space to write down what it is told.
type fullHost struct {
	tandemv1connect.AgentServiceClient
	full chan bool
	now  bool
	n    int
}

func (h *fullHost) Apply(ctx context.Context, req *connect.Request[v1.ApplyHostRequest]) (*connect.Response[v1.ApplyHostResponse], error) {
	select {
	case h.now = <-h.full:
	default:
	}
	if h.now {
		h.n++ // as the names of temporary files differ
		return nil, fmt.Errorf("write /x/spec.%d: no space left on device: %w", h.n, errors.ErrUnsupported)
	}
	return h.AgentServiceClient.Apply(ctx, req)
}

// TestContainersSayThatTheirHostTakesNothing: what an agent can't be told it can't
// complain of; the container's message says it, once, and no longer than it is so.
func TestContainersSayThatTheirHostTakesNothing(t *testing.T) {
	l := newLab(t, Options{})
	h := fakehost.New(fakehost.Options{})
	full := &fullHost{full: make(chan bool, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	full.AgentServiceClient = h.Client(ctx)
	done := make(chan struct{})
	go func() { defer close(done); l.ctl.Serve(ctx, h.ID(), full) }()
	defer func() { cancel(); <-done }()
	l.create(project("p")...)
	l.create(service("p", "a", 1, &v1.ContainerSpec{Image: "x"}))
	l.until("it runs", running(1))
	full.full <- true
	l.create(service("p", "b", 1, &v1.ContainerSpec{Image: "x"}))
	find := func(s *store.Snapshot, service string) *v1.Container {
		for _, c := range s.Containers {
			if c.Service == service {
				return c
			}
		}
		return &v1.Container{}
	}
	s := l.until("the new one says why it waits", func(s *store.Snapshot) bool {
		m := find(s, "b").GetStatus().GetMessage()
		return strings.HasPrefix(m, notTaken) && strings.Contains(m, "no space left")
	})
	if a := find(s, "a"); !Ready(a) || a.Status.Message != "" {
		t.Errorf("who has nothing to wait for is %v", a.Status)
	}
	rev := find(s, "b").Meta.Revision
	full.full <- false
	s = l.until("it runs when there is space", running(2))
	if b := find(s, "b"); b.Meta.Revision == rev || strings.HasPrefix(b.Status.Message, notTaken) {
		t.Errorf("it still says %q", b.Status.Message)
	}
}
