package server

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
)

// down removes a project, waits for it, and returns how the stream ended.
func (b *bed) down(r *v1.RemoveProjectRequest) error {
	b.t.Helper()
	r.Wait = true
	st, err := b.projects.Remove(ctxOf(b.t), connect.NewRequest(r))
	if err != nil {
		return err
	}
	defer st.Close()
	for st.Receive() {
	}
	return st.Err()
}

// TestGraceOfDown: the time that `down -t` gives reaches the host though its
// containers leave the intent in the same moment, and who says it again with less
// is heard while they end.
func TestGraceOfDown(t *testing.T) {
	b := newBed(t, Options{})
	b.host.Script("stubborn", fakehost.Script{StopsAfter: time.Hour})
	patient := simple("p", "s", "stubborn", 3)
	patient.Services[0].Template.StopGracePeriod = durationpb.New(time.Hour)
	for _, again := range []bool{false, true} {
		b.apply(patient)
		if again {
			_, err := b.containers.Remove(ctxOf(t), connect.NewRequest(&v1.RemoveContainersRequest{Selector: &v1.Selector{Containers: []string{"p-s-1"}}, Force: true}))
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the first is going", func() bool { return len(b.host.Spec().GetContainers()) == 2 })
		}
		if err := b.down(&v1.RemoveProjectRequest{Project: "p", Timeout: durationpb.New(10 * time.Millisecond)}); err != nil {
			t.Fatal(err)
		}
		if _, c, _ := b.host.Left(); c != 0 {
			t.Errorf("%d containers are left", c)
		}
	}
}

// TestGraceIsForOneStop: what a restart gave does not count for what comes later.
func TestGraceIsForOneStop(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(simple("p", "s", "x", 1))
	grace := func() *durationpb.Duration { return b.host.Spec().GetContainers()[0].StopTimeout }
	sel := &v1.Selector{Containers: []string{"p-s-1"}}
	for _, given := range []*durationpb.Duration{durationpb.New(0), nil} {
		if _, err := b.containers.Restart(ctxOf(t), connect.NewRequest(&v1.StopContainersRequest{Selector: sel, Timeout: given, Wait: true})); err != nil {
			t.Fatal(err)
		}
		if g := grace(); (g == nil) != (given == nil) {
			t.Errorf("restart with %v: the host has %v", given, g)
		}
	}
}

// TestDownOfWhatIsGone: there is a class of error for it, and volumes that stayed
// can still be removed.
func TestDownOfWhatIsGone(t *testing.T) {
	b := newBed(t, Options{})
	if err := b.down(&v1.RemoveProjectRequest{Project: "shop"}); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	b.apply(shop())
	b.remove("shop", false)
	if err := b.down(&v1.RemoveProjectRequest{Project: "shop"}); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if _, _, v := b.host.Left(); v != 1 {
		t.Fatalf("%d volumes stayed", v)
	}
	if err := b.down(&v1.RemoveProjectRequest{Project: "shop", Volumes: true}); err != nil {
		t.Fatal(err)
	}
	if _, _, v := b.host.Left(); v != 0 {
		t.Errorf("%d volumes are left", v)
	}
	if err := b.down(&v1.RemoveProjectRequest{Project: "shop", Volumes: true}); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
}
