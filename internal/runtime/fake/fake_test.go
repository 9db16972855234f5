package fake_test

import (
	"context"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime/fake"
	"tandem/internal/runtime/runtimetest"
)

func open(t *testing.T) *fake.Runtime {
	rt := fake.New()
	if _, err := rt.Mount(context.Background(), &v1.MountDiskRequest{Id: "layer", Path: "/x"}); err != nil {
		t.Fatal(err)
	}
	return rt
}

func TestSuite(t *testing.T) {
	runtimetest.Run(t, runtimetest.Target{RT: open(t), Layer: "layer"})
}

func TestInjection(t *testing.T) {
	ctx := context.Background()
	rt := open(t)
	s := runtimetest.Spec("layer", "server")
	rt.Fail("create", s.Id, errdefs.ErrUnavailable)
	if err := rt.Create(ctx, s); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	if err := rt.Create(ctx, s); err != nil {
		t.Fatal(err)
	}
	rt.Delay("start", "", 20*time.Millisecond)
	begin := time.Now()
	if err := rt.Start(ctx, s.Id); err != nil || time.Since(begin) < 20*time.Millisecond {
		t.Fatal(err, time.Since(begin))
	}
	rt.Print(s.Id, "stderr", "oops\n")
	rt.Exit(s.Id, 137, true)
	st, err := rt.Reopen().Wait(ctx, s.Id)
	if err != nil || st.ExitCode != 137 || !st.OomKilled {
		t.Fatal(st, err)
	}
	rt.Down(errdefs.ErrUnavailable)
	if _, err := rt.List(ctx); !errdefs.IsUnavailable(err) {
		t.Fatal(err)
	}
	rt.Down(nil)
	if _, err := rt.List(ctx); err != nil {
		t.Fatal(err)
	}
}
