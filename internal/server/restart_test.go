package server

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
)

// TestRestartedServerWaitsForItsAgents: a server that was just started knows of no
// connection, says so, and gives agents a moment before a call fails.
func TestRestartedServerWaitsForItsAgents(t *testing.T) {
	b := newBed(t, Options{})
	token, err := EnsureToken(b.state)
	if err != nil {
		t.Fatal(err)
	}
	other := fakehost.New(fakehost.Options{ID: "h-2"})
	var leave func()
	join := func() {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); other.Connect(ctx, SocketPath(b.run), token) }()
		leave = func() { cancel(); <-done }
	}
	join()
	defer func() { leave() }()
	connected := func() bool {
		res, err := b.system.Hosts(ctxOf(t), connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range res.Msg.Hosts {
			if h.Meta.Id == "h-2" {
				return h.Connected
			}
		}
		return false
	}
	eventually(t, "h-2 is there", connected)
	r := simple("q", "web", "x", 1)
	r.Services[0].Template.HostAffinity = []string{"h-2"}
	b.apply(r)

	b.stop()
	leave()
	b.start()
	began := time.Now()
	eventually(t, "no host is said to be connected that this server has not seen", func() bool { return !connected() })
	if d := time.Since(began); d > 2*time.Second { // it is no matter of the grace time of 3 s
		t.Error("that was noticed only after", d)
	}
	kill := func() error {
		_, err := b.containers.Kill(ctxOf(t), connect.NewRequest(&v1.KillContainersRequest{Selector: pick("q-web-1"), Signal: "USR1"}))
		return err
	}
	begin := time.Now()
	if err := kill(); err == nil || !strings.Contains(err.Error(), "not connected") || time.Since(begin) < hostPatience-time.Second {
		t.Errorf("a host that stays away: %v after %v", err, time.Since(begin))
	}
	eventually(t, "what nobody sees is unknown", func() bool {
		return b.inspect("q-web-1").Status.State == v1.ContainerState_CONTAINER_STATE_UNKNOWN
	})
	joined := make(chan struct{})
	time.AfterFunc(time.Second, func() { defer close(joined); join() })
	err = kill()
	<-joined // leave is of the new one
	if err != nil {
		t.Error("a host that comes in time:", err)
	}
	if out, code := b.exec("q-web-1", "echo", "hello"); code != 0 {
		t.Error(out, code)
	}
	eventually(t, "h-2 is there again", connected)
}
