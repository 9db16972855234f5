package cli

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func (s system) Recommend(_ context.Context, r *connect.Request[v1.RecommendRequest]) (*connect.Response[v1.RecommendResponse], error) {
	s.f.recommended = r.Msg
	return connect.NewResponse(&v1.RecommendResponse{Recommendations: []*v1.Recommendation{
		{Project: "shop", Service: "api", Reserved: &v1.Size{}, Recommended: &v1.Size{}, Text: "nothing was seen of it yet"},
		{Project: "shop", Service: "web", Reserved: &v1.Size{CpuMilli: 1000, MemoryBytes: 1 << 30}, Recommended: &v1.Size{CpuMilli: 250, MemoryBytes: 115 << 20},
			Samples: 5000, Span: durationpb.New(48 * time.Hour), CpuP50Milli: 100, CpuP95Milli: 214, MemoryP99Bytes: 90 << 20, MemoryMaxBytes: 100 << 20, Enough: true, Applied: r.Msg.Apply, Undone: r.Msg.Undo, InForce: s.f.inForce, Text: "reserve 0.25 CPU"},
	}}), nil
}

func TestRecommend(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	out, errs, code := tandem("", "recommend")
	for _, want := range []string{"shop/web   1 CPU, 1 GiB   0.25 CPU, 115 MiB   0.1 CPU / 0.21 CPU   90 MiB / 100 MiB    5000      2 days", "shop/api   -              -", "too little seen", "shop/web: reserve 0.25 CPU"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s%s", want, out, errs)
		}
	}
	if code != 0 || f.recommended.Apply || f.recommended.Project != "" {
		t.Error(code, f.recommended)
	}
	out, _, _ = tandem("", "recommend", "-p", "shop", "web", "--apply", "--format", "json")
	var list []map[string]any
	if err := json.Unmarshal([]byte(out), &list); err != nil || list[1]["cpu_p95_milli"] != "214" || list[1]["applied"] != true || f.recommended.Project != "shop" || f.recommended.Services[0] != "web" {
		t.Error(err, out, f.recommended)
	}
	f.inForce = &v1.AppliedRecommendation{Requested: &v1.Resources{CpuMilliReservation: 2000, MemoryBytesLimit: 1 << 30}, At: timestamppb.New(time.Now().Add(-49 * time.Hour))}
	if out, _, _ = tandem("", "recommend"); !strings.Contains(out, "applied 2 days ago; the Compose file asks for 2 CPU, 1 GiB") {
		t.Error(out)
	}
	if out, _, _ = tandem("", "recommend", "-p", "shop", "web", "--undo"); !strings.Contains(out, "  undone") || !strings.Contains(out, "nothing was applied") || !f.recommended.Undo || f.recommended.Apply {
		t.Error(out, f.recommended)
	}
	for _, args := range [][]string{{"--apply"}, {"--undo"}, {"web"}} {
		if _, _, code := tandem("", append([]string{"recommend"}, args...)...); code != ExitUsage {
			t.Error(args, code)
		}
	}
}
