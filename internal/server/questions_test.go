package server

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/planner"
)

// join connects a further host and waits until it is known.
func (b *bed) join(id string, size *v1.Size) *fakehost.Host {
	b.t.Helper()
	token, err := EnsureToken(b.state)
	if err != nil {
		b.t.Fatal(err)
	}
	h := fakehost.New(fakehost.Options{ID: id, Capacity: size})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); h.Connect(ctx, SocketPath(b.run), token) }()
	b.t.Cleanup(func() { cancel(); <-done })
	b.until("host "+id+" is connected", func() bool {
		res, err := b.system.Hosts(ctxOf(b.t), connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			b.t.Fatal(err)
		}
		for _, x := range res.Msg.Hosts {
			if x.Meta.Id == id && x.Connected {
				return true
			}
		}
		return false
	})
	return h
}

func (b *bed) until(what string, ok func() bool) {
	b.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			b.t.Fatal("not within a minute: " + what)
		}
	}
}

func (b *bed) ask(q *v1.AskRequest) (*v1.AskResponse, error) {
	res, err := b.system.Ask(ctxOf(b.t), connect.NewRequest(q))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}

func (b *bed) asked(q *v1.AskRequest) *v1.AskResponse {
	b.t.Helper()
	a, err := b.ask(q)
	if err != nil {
		b.t.Fatal(err)
	}
	return a
}

func lines(p *v1.Plan) string {
	var b strings.Builder
	for _, a := range p.Actions {
		fmt.Fprintf(&b, "%s: %s [%s]\n", a.Kind, a.Text, a.Reason.GetSummary())
	}
	for _, u := range p.Unplaced {
		fmt.Fprintf(&b, "unplaced %s: %s; %s\n", u.Container, u.Reason.GetSummary(), u.Remedy)
	}
	return b.String()
}

// pool is a project of one stateless service.
func pool(n int32) *v1.ApplyProjectRequest {
	return &v1.ApplyProjectRequest{Project: "pool", Wait: true, Services: []*v1.ServiceSpec{{Name: "web", Replicas: n,
		Template: &v1.ContainerSpec{Image: "httpd", Restart: &v1.RestartPolicy{Name: "unless-stopped"}, Resources: &v1.Resources{CpuMilliReservation: 1000, MemoryBytesReservation: 1 << 30}}}}}
}

var (
	rebalanceAll = &v1.AskRequest{Question: &v1.AskRequest_Rebalance{Rebalance: &v1.RebalanceQuestion{Budget: &v1.MoveBudget{Moves: -1, Migrations: -1, Bytes: -1}}}}
	lose         = func(hosts ...string) *v1.AskRequest {
		return &v1.AskRequest{Question: &v1.AskRequest_Lose{Lose: &v1.LoseQuestion{Hosts: hosts}}}
	}
	whatIf = func(w *v1.WhatIfQuestion) *v1.AskRequest {
		return &v1.AskRequest{Question: &v1.AskRequest_WhatIf{WhatIf: w}}
	}
)

func TestRebalanceIsPlannedAndRefusedWhenStale(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(4))
	b.join("h-2", nil)
	a := b.asked(rebalanceAll)
	text := lines(a.Plan)
	moves := 0
	for _, x := range a.Plan.Actions {
		if x.Kind == "move" {
			moves++
			if x.FromHost != "h-1" || x.Host != "h-2" || x.FromMachine == "" || x.Bytes != 1<<30 || !strings.Contains(x.Text, "from machine m-1 on h-1 into machine m-2 on h-2") {
				t.Error("a move without its ways:", x)
			}
		}
	}
	if tt := a.Plan.Totals; moves == 0 || tt.ContainerMoves != int32(moves) || tt.MoveBytes != int64(moves)<<30 || tt.Boots != 1 {
		t.Fatalf("%v\n%s", tt, text)
	}
	if strings.Contains(text, "new-1") {
		t.Error("a name of the planner's own:\n" + text)
	}
	few := b.asked(&v1.AskRequest{Question: &v1.AskRequest_Rebalance{Rebalance: &v1.RebalanceQuestion{Budget: &v1.MoveBudget{Moves: 1, Bytes: -1}}}})
	if few.Plan.Totals.ContainerMoves != 1 {
		t.Error("the budget does not count:", few.Plan.Totals)
	}
	carry := func(q *v1.AskRequest, rev uint64) error {
		_, err := b.system.CarryOut(ctxOf(t), connect.NewRequest(&v1.CarryOutRequest{Question: q, Revision: rev}))
		return err
	}
	// A container that dies and comes back changes nothing that the plan relies on.
	b.host.Exit("pool-web-1", 1)
	b.until("the container is seen to have started again", func() bool {
		for _, c := range b.list(true) {
			if c.Meta.Name == "pool-web-1" && c.Status.RestartCount == 1 {
				return true
			}
		}
		return false
	})
	for what, err := range map[string]error{
		"no revision":     carry(rebalanceAll, 0),
		"future revision": carry(rebalanceAll, 1<<40),
		"other question":  carry(lose("h-1"), a.Plan.Revision),
		"no question":     carry(nil, a.Plan.Revision),
	} {
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := carry(rebalanceAll, a.Plan.Revision); err != nil {
		t.Fatal(err)
	}
	b.until("what was planned has moved, and nothing else", func() bool {
		there := 0
		list := b.list(true)
		for _, c := range list {
			if c.Replaces != "" || c.ReplacedBy != "" || c.Status.State != v1.ContainerState_CONTAINER_STATE_RUNNING {
				return false
			}
			if c.Assignment.HostId == "h-2" {
				there++
			}
		}
		return len(list) == 4 && there == moves
	})
	a = b.asked(rebalanceAll)
	if a.Plan.Totals.ContainerMoves != 0 {
		t.Error("what is balanced is to move:\n" + lines(a.Plan))
	}
	b.apply(pool(3))
	err := carry(rebalanceAll, a.Plan.Revision)
	if !errdefs.IsConflict(err) && !errdefs.IsAborted(err) {
		t.Fatal("a stale plan was taken:", err)
	}
	if want := fmt.Sprintf("the state has changed since revision %d; ask again", a.Plan.Revision); !strings.Contains(err.Error(), want) {
		t.Error(err)
	}
}

func TestRehearsals(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(4))
	a := b.asked(lose("h-1"))
	if len(a.Plan.Unplaced) != 4 || a.Losses.Covered || a.Losses.Losses[0].Unplaced != 4 || a.Plan.Unplaced[0].Remedy == "" || a.Plan.Unplaced[0].Reason.Summary == "" {
		t.Fatalf("%v\n%s", a.Losses, lines(a.Plan))
	}
	b.join("h-2", nil)
	a = b.asked(lose("h-1"))
	if len(a.Plan.Unplaced) != 0 || !a.Losses.Covered || len(a.Losses.Losses) != 2 || a.Plan.Totals.Restarts != 1 ||
		!strings.Contains(lines(a.Plan), "restart: start machine m-1 of h-1 again on h-2 with") {
		t.Fatalf("%v\n%s", a.Losses, lines(a.Plan))
	}
	if a = b.asked(lose()); !a.Losses.Covered || len(a.Plan.Actions) != 0 || a.Losses.Losses[0].Containers != 4 {
		t.Error(a)
	}
	a = b.asked(&v1.AskRequest{Question: &v1.AskRequest_Empty{Empty: &v1.EmptyQuestion{Hosts: []string{"h-1"}}}})
	if a.Plan.Totals.ContainerMoves != 4 || a.Plan.Totals.Stops != 1 || len(a.Plan.Unplaced) != 0 {
		t.Error(lines(a.Plan))
	}
	a = b.asked(&v1.AskRequest{Question: &v1.AskRequest_Consolidate{Consolidate: &v1.ConsolidateQuestion{Budget: &v1.MoveBudget{Moves: -1}, PowerOff: true}}})
	if !strings.Contains(lines(a.Plan), "power-off: switch host h-2 off") || a.Plan.Totals.HostsOff != 1 {
		t.Error(lines(a.Plan))
	}
	for _, q := range []*v1.AskRequest{lose("nobody"), lose(""), {}, {Question: &v1.AskRequest_Empty{Empty: &v1.EmptyQuestion{}}},
		{Question: &v1.AskRequest_Consolidate{Consolidate: &v1.ConsolidateQuestion{Hosts: -1}}}} {
		if _, err := b.ask(q); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%v: %v", q, err)
		}
	}
	// What was asked has changed nothing.
	for _, c := range b.list(false) {
		if c.Assignment.HostId != "h-1" {
			t.Error(c.Meta.Name, c.Assignment.HostId)
		}
	}
}

func TestWhatIf(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(2))
	up := func(n int32) *v1.ServiceReplicas {
		return &v1.ServiceReplicas{Project: "pool", Service: "web", Replicas: n}
	}
	a := b.asked(whatIf(&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(12)}}))
	if a.Plan.Totals.Unplaced == 0 || !strings.Contains(a.Plan.Unplaced[0].Remedy, "add a host") || a.Assumptions[0] != "service pool/web has 12 containers instead of 2" {
		t.Fatalf("%v\n%s", a.Assumptions, lines(a.Plan))
	}
	a = b.asked(whatIf(&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(12)}, AddHosts: []*v1.AddedHosts{{Size: &v1.Size{CpuMilli: 16000, MemoryBytes: 64 << 30}, Count: 2}}}))
	if a.Plan.Totals.Unplaced != 0 || a.Plan.Totals.Placed != 10 || !strings.Contains(lines(a.Plan), "on added-1 with") {
		t.Fatalf("%v\n%s", a.Assumptions, lines(a.Plan))
	}
	a = b.asked(whatIf(&v1.WhatIfQuestion{RemoveHosts: []string{"h-1"}}))
	if a.Plan.Totals.Unplaced != 2 || a.Assumptions[0] != "host h-1 is not there: its 2 containers need another place" {
		t.Errorf("%v\n%s", a.Assumptions, lines(a.Plan))
	}
	// A service without containers is asked about by its definition.
	b.apply(pool(0))
	b.until("the service has no container", func() bool { return len(b.list(true)) == 0 })
	if a = b.asked(whatIf(&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(3)}})); a.Plan.Totals.Placed != 3 {
		t.Error(lines(a.Plan))
	}
	size := &v1.Size{CpuMilli: 1000, MemoryBytes: 1 << 30}
	for _, x := range []struct {
		w   *v1.WhatIfQuestion
		is  func(error) bool
		say string
	}{
		{&v1.WhatIfQuestion{}, errdefs.IsInvalidArgument, "nothing to try"},
		{&v1.WhatIfQuestion{AddHosts: []*v1.AddedHosts{{Size: size, Count: 1001}}}, errdefs.IsInvalidArgument, "at most 1000"},
		{&v1.WhatIfQuestion{AddHosts: []*v1.AddedHosts{{Size: size, Count: -1}}}, errdefs.IsInvalidArgument, "at least 1"},
		{&v1.WhatIfQuestion{AddHosts: []*v1.AddedHosts{{Count: 1}}}, errdefs.IsInvalidArgument, "are possible"},
		{&v1.WhatIfQuestion{AddHosts: []*v1.AddedHosts{{Size: &v1.Size{CpuMilli: 1 << 62, MemoryBytes: 1 << 62}, Count: 1}}}, errdefs.IsInvalidArgument, "are possible"},
		{&v1.WhatIfQuestion{RemoveHosts: []string{"nobody"}}, errdefs.IsNotFound, "tandem host ls"},
		{&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{{Project: "pool", Service: "nobody", Replicas: 1}}}, errdefs.IsNotFound, "tandem ps"},
		{&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(-1)}}, errdefs.IsInvalidArgument, "0 to 10000"},
		{&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(1 << 30)}}, errdefs.IsInvalidArgument, "0 to 10000"},
		{&v1.WhatIfQuestion{Scale: []*v1.ServiceReplicas{up(1), up(2)}}, errdefs.IsInvalidArgument, "twice"},
	} {
		if _, err := b.ask(whatIf(x.w)); !x.is(err) || !strings.Contains(err.Error(), x.say) {
			t.Errorf("%v: %v", x.w, err)
		}
	}
}

func TestUpOfAStalePlanIsRefused(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(1))
	ask := pool(2)
	ask.PlanOnly = true
	rev := b.apply(ask).plan.Revision
	stale := pool(2)
	stale.Revision = rev
	b.apply(pool(3))
	if _, err := b.tryApply(stale); !(errdefs.IsConflict(err) || errdefs.IsAborted(err)) || !strings.Contains(err.Error(), "ask again") {
		t.Fatal("a stale plan was applied:", err)
	}
	ask = pool(4)
	ask.PlanOnly = true
	fresh := pool(4)
	fresh.Revision = b.apply(ask).plan.Revision
	if a := b.apply(fresh); len(a.result.Containers) != 4 {
		t.Error(a.result)
	}
}

func TestEveryKindOfActionHasItsWords(t *testing.T) {
	n := &names{containers: map[string]string{"c-1": "web-1"}, machines: map[string]string{"m-a": "m-1", "m-b": "m-2"}, hosts: map[string]string{"h-1": "alpha", "h-2": "beta"},
		inside: map[string]int32{"m-a": 3}, replace: strings.NewReplacer()}
	z := planner.Size{CPU: 1500, Memory: 1 << 30}
	p := &planner.Plan{}
	for _, k := range []planner.Kind{planner.Place, planner.PlaceM, planner.Grow, planner.Shrink, planner.Boot, planner.Stop, planner.Move, planner.Migrate,
		planner.Restart, planner.Evict, planner.PowerOn, planner.PowerOff, "unheard-of"} {
		a := planner.Action{Kind: k, Container: "c-1", Machine: "m-b", Host: "h-2", To: z, From: z, Seconds: 1}
		switch k {
		case planner.PlaceM:
			a.Machine = ""
		case planner.Move, planner.Evict:
			a.FromMachine, a.FromHost, a.Bytes = "m-a", "h-1", 1<<30
		case planner.Migrate, planner.Restart:
			a.Machine, a.FromHost, a.Bytes = "m-a", "h-1", 1<<30
		}
		p.Actions = append(p.Actions, a)
	}
	p.Actions = append(p.Actions, planner.Action{Kind: planner.Place, Container: "c-1", Machine: "m-b", Host: "h-2", FromMachine: "m-a", FromHost: "h-1"},
		planner.Action{Kind: planner.Move, Container: "c-1", Host: "h-2", FromHost: "h-1", Bytes: 1 << 20},
		planner.Action{Kind: planner.Move, Container: "c-1", Machine: "m-b", Host: "h-1", FromMachine: "m-a", FromHost: "h-1", Bytes: 1 << 20})
	out := &v1.Plan{}
	n.add(out, p)
	want := []string{
		"put web-1 into machine m-2",
		"put web-1 onto host beta itself",
		"grow machine m-2 from 1.5 CPU, 1GiB to 1.5 CPU, 1GiB",
		"shrink machine m-2 from 1.5 CPU, 1GiB to 1.5 CPU, 1GiB",
		"start machine m-2 on beta with 1.5 CPU, 1GiB",
		"stop machine m-2 on beta, which is empty",
		"move web-1 (1GiB) from machine m-1 on alpha into machine m-2 on beta: it starts there before it stops here",
		"migrate machine m-1 (1GiB) from alpha to beta while it runs",
		"start machine m-1 of alpha again on beta with 1.5 CPU, 1GiB",
		"stop web-1 in machine m-1 on alpha: it gives way",
		"switch host beta on",
		"switch host beta off",
		"unheard-of web-1 m-2 beta",
		"start web-1 of alpha again: put it into machine m-2 on beta",
		"move web-1 (1MiB) from host alpha itself onto host beta itself: it starts there before it stops here",
		"move web-1 (1MiB) from machine m-1 into machine m-2: it starts there before it stops here",
	}
	for i, a := range out.Actions {
		if a.Text != want[i] {
			t.Errorf("%s\n%s, not\n%s", a.Kind, a.Text, want[i])
		}
	}
	if tt := out.Totals; tt.ContainerMoves != 6 || tt.MachineMoves != 1 || tt.MoveBytes != 2<<30+2<<20 || tt.Seconds != 13 || tt.Placed != 3 || tt.Boots != 1 ||
		tt.Grown != 1 || tt.Restarts != 1 || tt.Evicted != 1 || tt.Stops != 1 || tt.HostsOn != 1 || tt.HostsOff != 1 {
		t.Error(tt)
	}
}

// Questions come while things are decided: neither disturbs the other.
func TestQuestionsWhileThingsChange(t *testing.T) {
	b := newBed(t, Options{})
	b.join("h-2", nil)
	done := make(chan error, 1)
	go func() {
		for range 30 {
			if _, err := b.ask(lose()); err != nil {
				done <- err
				return
			}
			if _, err := b.ask(rebalanceAll); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for _, n := range []int32{1, 6, 2, 8, 3} {
		if a := b.apply(pool(n)); len(a.result.Containers) != int(n) {
			t.Error(n, len(a.result.Containers))
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
