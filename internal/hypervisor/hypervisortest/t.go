package hypervisortest

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"tandem/internal/hypervisor"
)

// T is one running test.
type T struct {
	*testing.T
	Env
	ctx context.Context
}

func (t *T) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := t.Driver.List(ctx)
	if err != nil {
		t.Errorf("list: %v", err)
	}
	for _, m := range list {
		if err := t.Driver.Delete(ctx, m.Spec.ID); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if list, err := t.Driver.List(ctx); err != nil || len(list) > 0 {
		t.Errorf("left over: %v, %v", list, err)
	}
	_ = t.Driver.Close()
}

func (t *T) must(err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (t *T) want(is func(error) bool, err error) {
	t.Helper()
	if !is(err) {
		t.Errorf("wrong class of error: %v", err)
	}
}

func (t *T) inspect(id string) hypervisor.Status {
	t.Helper()
	st, err := t.Driver.Inspect(t.ctx, id)
	t.must(err)
	return st
}

// up creates and starts a machine and waits for its guest.
func (t *T) up(id string) {
	t.Helper()
	t.must(t.Driver.Create(t.ctx, t.Spec(id)))
	t.must(t.Driver.Start(t.ctx, id, hypervisor.StartOptions{Template: t.Template}))
	t.ready(id)
}

func (t *T) ready(id string) {
	t.Helper()
	if t.Ready == nil {
		return
	}
	if err := t.Ready(t.ctx, t.Driver, id); err != nil {
		log, _ := t.Driver.ConsoleLog(t.ctx, id, 2000)
		t.Fatalf("guest of %s: %v\n%s", id, err, log)
	}
}

// eventually polls until ok, and fails after a while.
func (t *T) eventually(what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// awaitEvent returns the next event of a kind for a machine.
func (t *T) awaitEvent(events <-chan hypervisor.Event, id string, kind hypervisor.EventKind) hypervisor.Event {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		select {
		case e, ok := <-events:
			if !ok {
				t.Fatalf("watch ended before event %s of %s", kind, id)
			}
			if e.Machine == id && e.Kind == kind {
				return e
			}
		case <-timeout:
			t.Fatalf("no event %s of %s", kind, id)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func contains(list []string, s string) bool {
	for _, e := range list {
		if e == s {
			return true
		}
	}
	return false
}
