package control

import (
	"strings"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// What is decided is said: an event for each change, the reason in the record, what is
// measured now in memory; and a new server starts without hurry.
func TestScalingIsSaidAndSurvivesARestart(t *testing.T) {
	x := &script{world: newWorld(t)}
	play := func(lines ...string) {
		for _, l := range lines {
			x.do(l)
		}
		x.settle()
	}
	service := func() *v1.Service {
		s, err := store.Get[*v1.Service](x.st, store.Key{Kind: store.Services, Project: "p", Name: "web"})
		must(t, err)
		return s
	}
	play("host alpha cpu=8 memory=4GiB boot=600ms", "project p", "load web cpu=900", "service p web image=web cpu=500 memory=64MiB min=1 max=4 target=50", "pass 2m")
	s := service()
	if s.Replicas != 4 || s.ScaleStatus.GetFrom() != 1 || s.ScaleStatus.To != 4 || !strings.Contains(s.ScaleStatus.Reason, "cpu 180 %") {
		t.Fatal(s.Replicas, s.ScaleStatus)
	}
	var scaled []*v1.Event
	evs, _, _ := x.ctl.Events.From(0)
	for _, e := range evs {
		if e.Kind == "service" {
			scaled = append(scaled, e)
		}
	}
	if len(scaled) != 1 || scaled[0].Action != "scale" || scaled[0].Project != "p" || scaled[0].Attributes["from"] != "1" || scaled[0].Attributes["to"] != "4" || scaled[0].Attributes["reason"] == "" {
		t.Fatal(scaled)
	}
	if v := x.ctl.Scale(s); v.Replicas != 4 || !strings.HasPrefix(v.Now, "cpu 45 %") {
		t.Error(v)
	}
	// A restart while nothing is to do: no fewer for five minutes, though the load is gone.
	play("load web cpu=0", "pass 1m", "restart", "connect alpha", "pass 4m")
	if s := service(); s.Replicas != 4 {
		t.Error("a new server was in a hurry:", s.ScaleStatus)
	}
	play("pass 2m")
	if s := service(); s.Replicas != 1 {
		t.Error(s.Replicas, x.ctl.Scale(s).Now)
	}
	// Switched off is switched off.
	play("scale p web 0", "load web cpu=900", "pass 5m")
	if s := service(); s.Replicas != 0 || !strings.Contains(x.ctl.Scale(s).Now, "switched off") {
		t.Error(s.Replicas, x.ctl.Scale(s))
	}
	// No service scales: nobody is asked.
	change(x, store.KeyOf(service()), func(s *v1.Service) { s.Scale, s.Replicas = nil, 1 })
	if d, err := x.ctl.scaleServices(x.ctx); d != 0 || err != nil || x.ctl.scaler.services != nil {
		t.Error(d, err)
	}
}

func TestScaledReplicas(t *testing.T) {
	p := &v1.ScalePolicy{Min: 2, Max: 5}
	for _, x := range []struct {
		asked int32
		scale *v1.ScalePolicy
		old   *v1.Service
		want  int32
	}{
		{2, p, nil, 2}, {2, p, &v1.Service{Replicas: 4}, 2}, {2, p, &v1.Service{Replicas: 4, Scale: p}, 4}, {2, p, &v1.Service{Replicas: 9, Scale: p}, 5},
		{3, p, &v1.Service{Replicas: 1, Scale: p}, 2}, {3, p, &v1.Service{Scale: p}, 3}, {1, nil, &v1.Service{Replicas: 4, Scale: p}, 1},
	} {
		if n, _ := ScaledReplicas(&v1.ServiceSpec{Replicas: x.asked, Scale: x.scale}, x.old); n != x.want {
			t.Errorf("%v: %d", x, n)
		}
	}
}

func TestRate(t *testing.T) {
	u := func(s float64, cpu time.Duration) *v1.Usage {
		return &v1.Usage{At: stamp(time.Unix(1000, 0).Add(time.Duration(s * float64(time.Second)))), CpuUsageNs: uint64(cpu)}
	}
	if m, ok := rate(u(0, time.Second), u(10, 6*time.Second)); !ok || m != 500 {
		t.Error(m, ok)
	}
	for _, b := range []*v1.Usage{nil, {}, u(10, 0), u(0.5, 2*time.Second), u(-10, 2*time.Second)} {
		if _, ok := rate(u(0, time.Second), b); ok {
			t.Error(b)
		}
	}
	if _, ok := rate(nil, u(10, 1)); ok {
		t.Error("from nothing")
	}
}
