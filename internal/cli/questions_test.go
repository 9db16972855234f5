package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
)

func movePlan() *v1.Plan {
	return &v1.Plan{Revision: 42,
		Actions: []*v1.PlanAction{{Kind: "move", Container: "shop-web-1", FromHost: "alpha", Host: "beta", Bytes: 1 << 30,
			Text: "move shop-web-1 (1GiB) from machine m-1 on alpha into machine m-2 on beta", Reason: &v1.Reason{Summary: "to spread web"}}},
		Totals: &v1.PlanTotals{ContainerMoves: 1, MoveBytes: 1 << 30, Seconds: 0.6}}
}

func (s system) Ask(_ context.Context, r *connect.Request[v1.AskRequest]) (*connect.Response[v1.AskResponse], error) {
	s.f.asked = r.Msg
	out := &v1.AskResponse{Plan: movePlan()}
	switch q := r.Msg.Question.(type) {
	case *v1.AskRequest_Lose:
		if len(q.Lose.Hosts) == 0 {
			out.Plan = &v1.Plan{Revision: 42}
		}
		out.Losses = &v1.LossCoverage{Losses: []*v1.HostLoss{{Host: "alpha", Containers: 3, Unplaced: 2}, {Host: "beta", Covered: true}}}
	case *v1.AskRequest_WhatIf:
		out.Assumptions = []string{"3 more hosts"}
		out.Plan.Unplaced = []*v1.Unplaced{{Container: "web-9", Reason: &v1.Reason{Summary: "1.2 CPU short"}, Remedy: "add a host"}}
	}
	return connect.NewResponse(out), nil
}

func (s system) CarryOut(_ context.Context, r *connect.Request[v1.CarryOutRequest]) (*connect.Response[v1.CarryOutResponse], error) {
	s.f.carried = r.Msg
	if r.Msg.Revision != 42 {
		return nil, fmt.Errorf("the plan is stale: the state has changed since revision %d; ask again: %w", r.Msg.Revision, errdefs.ErrAborted)
	}
	return connect.NewResponse(&v1.CarryOutResponse{Plan: movePlan()}), nil
}

func TestRebalance(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	out, errs, code := tandem("", "rebalance", "--plan", "--moves", "5", "--bytes", "8g")
	want := `  1. move shop-web-1 (1GiB) from machine m-1 on alpha into machine m-2 on beta
     because: to spread web
In all: 1 container moves, 1 GiB of memory to move, 0.6 s one after the other.
As of revision 42.
`
	if out != want || code != 0 {
		t.Errorf("code %d: %s\n%s", code, errs, out)
	}
	if b := f.asked.GetRebalance().GetBudget(); b.GetMoves() != 5 || b.GetBytes() != 8<<30 || b.GetMigrations() != -1 || f.carried != nil {
		t.Error(b, f.carried)
	}
	if _, _, code := tandem("", "rebalance", "--plan", "--detailed-exitcode"); code != ExitChanges {
		t.Error(code)
	}
	if out, _, code = tandem("", "rebalance"); code != 0 || f.carried.GetRevision() != 42 || !strings.Contains(out, "move shop-web-1") {
		t.Error(code, out, f.carried)
	}
	if _, errs, code = tandem("", "rebalance", "--revision", "41"); code != ExitFailed || !strings.Contains(errs, "changed since revision 41; ask again") {
		t.Error(code, errs)
	}
	for _, args := range [][]string{{"--bytes", "x"}, {"--plan", "--revision", "1"}, {"--moves", "x"}, {"--moves", "99999999999"}} {
		if _, errs, code := tandem("", append([]string{"rebalance"}, args...)...); code != ExitUsage {
			t.Error(args, code, errs)
		}
	}
	out, _, _ = tandem("", "consolidate", "--plan", "--hosts", "2", "--power-off", "--format", "json")
	var m map[string]any
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatal(err, out)
	}
	plan := m["plan"].(map[string]any)
	if plan["totals"].(map[string]any)["container_moves"] != 1.0 || plan["actions"].([]any)[0].(map[string]any)["from_host"] != "alpha" || plan["revision"] != "42" {
		t.Error(out)
	}
	if c := f.asked.GetConsolidate(); c.GetHosts() != 2 || !c.GetPowerOff() || c.GetBudget().GetMoves() != 20 {
		t.Error(c)
	}
}

func TestRehearseAndWhatIf(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	out, _, code := tandem("", "rehearse", "lose", "alpha")
	for _, want := range []string{"1. move", "LOSS OF   CONTAINERS   COVERED", "alpha     3            no: 2 without a place", "beta      0            yes", "Not every loss is covered."} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
	if code != 0 || f.asked.GetLose().GetHosts()[0] != "alpha" {
		t.Error(code, f.asked)
	}
	if out, _, code = tandem("", "rehearse", "lose", "--detailed-exitcode"); code != ExitChanges || strings.Contains(out, "Nothing to change") {
		t.Error(code, out)
	}
	out, _, _ = tandem("", "what-if", "--add-host", "96c,256g*3", "--add-host", "8c,32g", "--remove-host", "alpha", "--scale", "shop/web=4")
	for _, want := range []string{"What if: 3 more hosts", "web-9 has no place: 1.2 CPU short", "remedy: add a host"} {
		if !strings.Contains(out, want) {
			t.Errorf("lacks %q:\n%s", want, out)
		}
	}
	w := f.asked.GetWhatIf()
	if len(w.GetAddHosts()) != 2 || w.AddHosts[0].Count != 3 || w.AddHosts[0].Size.CpuMilli != 96000 || w.AddHosts[0].Size.MemoryBytes != 256<<30 || w.AddHosts[1].Count != 1 ||
		w.RemoveHosts[0] != "alpha" || w.Scale[0].Project != "shop" || w.Scale[0].Service != "web" || w.Scale[0].Replicas != 4 {
		t.Error(w)
	}
	if tandem("", "-p", "pool", "what-if", "--scale", "api=2"); f.asked.GetWhatIf().GetScale()[0].Project != "pool" {
		t.Error(f.asked)
	}
	for _, args := range [][]string{{}, {"--add-host", "96c"}, {"--add-host", "x"}, {"--add-host", "1c,1g*0"}, {"--add-host", "1c,1g*x"}, {"--scale", "web"}, {"--scale", "web=-1"}, {"--scale", "web=2"}} {
		if _, errs, code := tandem("", append([]string{"what-if"}, args...)...); code != ExitUsage {
			t.Error(args, code, errs)
		}
	}
}

func TestHostsAreCompleted(t *testing.T) {
	tandem := start(t, &fakeServer{})
	for _, args := range [][]string{{"rehearse", "lose", "al"}, {"rehearse", "empty", ""}, {"what-if", "--remove-host", ""}} {
		if out, errs, _ := tandem("", append([]string{"__complete"}, args...)...); !strings.HasPrefix(out, "alpha\n:4\n") {
			t.Errorf("%v: %q %s", args, out, errs)
		}
	}
}
