package server

import (
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func TestServiceThatScalesByItself(t *testing.T) {
	b := newBed(t, Options{})
	r := pool(2)
	r.Services[0].Scale = &v1.ScalePolicy{Min: 2, Max: 4, CpuTarget: 0.5}
	b.apply(r)
	res, err := b.containers.List(ctxOf(t), connect.NewRequest(&v1.ListContainersRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if s := res.Msg.Scales; len(s) != 1 || s[0].Service != "web" || s[0].Replicas != 2 || s[0].Policy.Max != 4 || s[0].Now == "" {
		t.Error(s)
	}
	ex, err := b.system.Explain(ctxOf(t), connect.NewRequest(&v1.ContainerRequest{Container: "pool-web-1"}))
	if err != nil || !strings.Contains(ex.Msg.Text, "Service web scales by itself and has 2 of 2 to 4 containers: ") {
		t.Error(err, ex)
	}
	scale := func(n int32) error {
		st, err := b.projects.Scale(ctxOf(t), connect.NewRequest(&v1.ScaleRequest{Project: "pool", Replicas: map[string]int32{"web": n}}))
		if err != nil {
			return err
		}
		defer st.Close()
		for st.Receive() {
		}
		return st.Err()
	}
	if err := scale(5); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "between 2 and 4") {
		t.Error(err)
	}
	if err := scale(3); err != nil {
		t.Error(err)
	}
	if a := b.apply(r); len(a.result.Containers) != 3 {
		t.Error("up has taken back what scaling did:", len(a.result.Containers))
	}
	r = pool(9)
	r.Services[0].Scale = &v1.ScalePolicy{Min: 1, Max: 4, MemoryTarget: 2}
	if _, err := b.tryApply(r); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "service web: scale: replicas (9) must lie between min (1) and max (4)") || !strings.Contains(err.Error(), "memory (2)") {
		t.Error(err)
	}
}
