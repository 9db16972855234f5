package server

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func TestRecommendationsAreAppliedWhenAsked(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(2))
	ask := func(r *v1.RecommendRequest) ([]*v1.Recommendation, error) {
		res, err := b.system.Recommend(ctxOf(t), connect.NewRequest(r))
		if err != nil {
			return nil, err
		}
		return res.Msg.Recommendations, nil
	}
	l, err := ask(&v1.RecommendRequest{})
	if err != nil || len(l) != 1 || l[0].Service != "web" || l[0].Enough || l[0].Reserved.CpuMilli != 1000 {
		t.Fatal(l, err)
	}
	if _, err := ask(&v1.RecommendRequest{Project: "pool", Services: []string{"web"}, Apply: true}); !errdefs.IsFailedPrecondition(err) {
		t.Error("applied without having seen anything:", err)
	}
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Apply: true}); err != nil || l[0].Applied {
		t.Error(l, err)
	}
	for _, x := range []struct {
		r  *v1.RecommendRequest
		is func(error) bool
	}{
		{&v1.RecommendRequest{Services: []string{"web"}}, errdefs.IsInvalidArgument}, {&v1.RecommendRequest{Apply: true}, errdefs.IsInvalidArgument},
		{&v1.RecommendRequest{Project: "pool", Services: []string{"nobody"}}, errdefs.IsNotFound}, {&v1.RecommendRequest{Project: "nobody"}, errdefs.IsNotFound},
		{&v1.RecommendRequest{Project: "../x"}, errdefs.IsInvalidArgument}, {&v1.RecommendRequest{Undo: true}, errdefs.IsInvalidArgument},
		{&v1.RecommendRequest{Project: "pool", Apply: true, Undo: true}, errdefs.IsInvalidArgument},
	} {
		if _, err := ask(x.r); !x.is(err) {
			t.Errorf("%v: %v", x.r, err)
		}
	}
	svc, err := b.projects.ListServices(ctxOf(t), connect.NewRequest(&v1.ListServicesRequest{Project: "pool"}))
	if err != nil {
		t.Fatal(err)
	}
	// What an earlier server has seen.
	b.stop()
	h := `{"project":"pool","service":"web","samples":5000,"begin":"2026-01-01T00:00:00Z","last":"2026-01-03T00:00:00Z",` +
		`"cpu":{"first":1,"ref":"2026-01-01T00:00:00Z","weights":{"100":90,"110":10}},"memory":{"first":1048576,"ref":"2026-01-01T00:00:00Z","weights":{"90":100}},"peaks":[{"day":20455,"bytes":104857600}]}`
	file := fmt.Sprintf(`{"format":1,"services":{%q:%s}}`, svc.Msg.Services[0].Meta.Id, h)
	if err := os.WriteFile(filepath.Join(b.state, "usage.json"), []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.until("the history is read", func() bool {
		l, err = ask(&v1.RecommendRequest{Project: "pool"})
		return err == nil && l[0].Enough
	})
	if r := l[0]; r.Recommended.CpuMilli != 250 || r.Recommended.MemoryBytes != 115<<20 || r.Applied || !strings.Contains(r.Text, "5000 samples over 48h0m0s") {
		t.Fatal(r)
	}
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Services: []string{"web"}, Apply: true}); err != nil || !l[0].Applied {
		t.Fatal(l, err)
	}
	b.until("the containers reserve that", func() bool {
		n := 0
		for _, c := range b.list(false) {
			if c.Spec.Resources.CpuMilliReservation == 250 && c.Spec.Resources.MemoryBytesReservation == 115<<20 && c.Status.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
				n++
			}
		}
		return n == 2
	})
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Apply: true}); err != nil || l[0].Applied {
		t.Error("applied twice:", l, err)
	}
	if f := l[0].InForce; f.GetReserved().GetCpuMilli() != 250 || f.GetRequested().GetCpuMilliReservation() != 1000 || f.At.AsTime().IsZero() {
		t.Error(f)
	}

	// It lasts: the same file changes nothing, neither does one that asks for the same
	// CPU and memory.
	ids := func() (out []string) {
		for _, c := range b.list(false) {
			out = append(out, c.Meta.Id)
		}
		slices.Sort(out)
		return out
	}
	same := ids()
	up := func(r *v1.ApplyProjectRequest, actions int, note string) {
		t.Helper()
		for range 2 { // the second finds nothing to do
			a := b.apply(r)
			if len(a.plan.Actions) != actions || note == "" && len(a.plan.Notes) > 0 || note != "" && (len(a.plan.Notes) != 1 || !strings.Contains(a.plan.Notes[0], note)) {
				t.Errorf("%d actions, notes %q; not %d and %q", len(a.plan.Actions), a.plan.Notes, actions, note)
			}
			if actions > 0 {
				return
			}
		}
	}
	reserve := func(milli int64) { // once old containers have made room
		t.Helper()
		b.until(fmt.Sprintf("both reserve %d and nothing else runs", milli), func() bool {
			l := b.list(false)
			return len(l) == 2 && !slices.ContainsFunc(l, func(c *v1.Container) bool {
				return c.Spec.Resources.CpuMilliReservation != milli || c.Status.State != v1.ContainerState_CONTAINER_STATE_RUNNING
			})
		})
	}
	up(pool(2), 0, "service web reserves 0.25 CPU, 115MiB, as was recommended and applied at ")
	b.stop()
	b.start()
	up(pool(2), 0, "; the file asks for 1 CPU, 1GiB (`tandem -p pool recommend --undo web` goes back to that)")
	if now := ids(); !slices.Equal(same, now) {
		t.Error("containers were replaced:", same, now)
	}
	more := pool(2)
	more.Services[0].Template.Resources.PidsLimit = 100
	b.apply(more)
	reserve(250)
	up(more, 0, "service web reserves 0.25 CPU")

	// The way back, to what the file says now.
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Services: []string{"web"}, Undo: true}); err != nil || !l[0].Undone || l[0].InForce != nil {
		t.Fatal(l, err)
	}
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Undo: true}); err != nil || l[0].Undone {
		t.Error("undone twice:", l, err)
	}
	reserve(1000)
	up(more, 0, "")

	// A file that asks for something else is the author's word.
	if l, err = ask(&v1.RecommendRequest{Project: "pool", Services: []string{"web"}, Apply: true}); err != nil || !l[0].Applied {
		t.Fatal(l, err)
	}
	b.apply(more)
	more.Services[0].Template.Resources.CpuMilliReservation = 500
	more.NoRecreate = true
	up(more, 0, "")
	reserve(250)
	more.NoRecreate, more.PlanOnly = false, true
	for range 2 { // asking drops nothing
		if a := b.apply(more); len(a.plan.Notes) != 1 || !strings.Contains(a.plan.Notes[0], "service web reserves what the file asks for, 0.5 CPU, 1GiB: that was changed since 0.25 CPU, 115MiB was recommended") {
			t.Error(a.plan.Notes)
		}
	}
	more.PlanOnly = false
	b.apply(more)
	reserve(500)
	up(more, 0, "")
}
