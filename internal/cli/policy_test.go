package cli

import (
	"context"
	"strings"
	"testing"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
)

func (s system) Policy(context.Context, *connect.Request[v1.PolicyRequest]) (*connect.Response[v1.PolicyResponse], error) {
	p := &v1.Policy{HostLosses: 2,
		Pools:  []*v1.Pool{{Path: "/teams", Limit: &v1.Size{CpuMilli: 6000}, Shares: 2000}},
		Quotas: []*v1.Quota{{Project: "shop", Reserved: &v1.Size{CpuMilli: 4000, MemoryBytes: 8 << 30}, Containers: 9}}}
	return connect.NewResponse(&v1.PolicyResponse{Policy: p, Covered: 7, Exposed: []string{"shop/shop-web-1", "evil\x1b/x"}, ExposedCount: 12,
		Pools:  []*v1.PoolUse{{Pool: p.Pools[0], Used: &v1.Size{CpuMilli: 1500, MemoryBytes: 1 << 30}, Containers: 3}, {Pool: &v1.Pool{Path: "/teams/shop", Reservation: &v1.Size{MemoryBytes: 1 << 30}}, Used: &v1.Size{}}},
		Quotas: []*v1.QuotaUse{{Quota: p.Quotas[0], Used: &v1.Size{CpuMilli: 500, MemoryBytes: 1 << 28}, Containers: 2, Machines: 1}}}), nil
}

func (s system) ChangePolicy(ctx context.Context, r *connect.Request[v1.ChangePolicyRequest]) (*connect.Response[v1.PolicyResponse], error) {
	s.f.policy = r.Msg
	return s.Policy(ctx, nil)
}

func TestPolicy(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	pools := `POOL          RESERVED   LIMIT   SHARES   USED             CONTAINERS
/teams        -          6 CPU   2000     1.5 CPU, 1 GiB   3
/teams/shop   1 GiB      -       1000     0 CPU, 0         0
`
	quotas := `PROJECT   RESERVED           AT MOST        CONTAINERS   MACHINES
shop      0.5 CPU, 256 MiB   4 CPU, 8 GiB   2 of 9       1
`
	out, errs, code := tandem("", "policy")
	want := "Room is kept for the loss of any 2 hosts at the same time: 7 containers have a place then.\n" +
		"12 should have one and have none: shop/shop-web-1, evil /x and 10 more. Add a host, or see tandem rebalance --plan.\n\n" + pools + "\n" + quotas
	if out != want || code != 0 || f.policy != nil {
		t.Errorf("code %d: %s\n%s\nwant\n%s", code, errs, out, want)
	}
	if tandem("", "policy", "--host-losses", "1"); f.policy.GetHostLosses() != 1 || f.policy.HostLosses == nil {
		t.Error(f.policy)
	}
	if out, _, _ = tandem("", "pool", "ls"); out != pools {
		t.Error(out)
	}
	if tandem("", "pool", "set", "/a", "--reserve", "1c,2g", "--limit", "4g", "--shares", "5"); len(f.policy.GetPools()) != 1 {
		t.Fatal(f.policy)
	}
	if p := f.policy.Pools[0]; p.Path != "/a" || p.Reservation.GetCpuMilli() != 1000 || p.Limit.GetMemoryBytes() != 4<<30 || p.Limit.GetCpuMilli() != 0 || p.Shares != 5 {
		t.Error(p)
	}
	if tandem("", "pool", "rm", "/a", "/b"); len(f.policy.GetRemovePools()) != 2 {
		t.Error(f.policy)
	}
	if out, _, _ = tandem("", "quota", "set", "shop", "--reserved", "4c,8g", "--containers", "9"); out != quotas || f.policy.GetQuotas()[0].GetContainers() != 9 {
		t.Error(out, f.policy)
	}
	if tandem("", "quota", "rm", "shop"); f.policy.GetRemoveQuotas()[0] != "shop" {
		t.Error(f.policy)
	}
	if out, _, _ = tandem("", "--format", "json", "pool", "ls"); !strings.HasPrefix(out, "[") || !strings.Contains(out, `"path": "/teams/shop"`) {
		t.Error(out)
	}
	if out, _, _ = tandem("", "--format", "json", "policy"); !strings.Contains(out, `"host_losses": 2`) {
		t.Error(out)
	}
	for _, args := range [][]string{{"pool", "set"}, {"pool", "set", "/a", "--limit", "much"}, {"quota", "set", "a", "--reserved", "x"}, {"pool", "rm"}} {
		if _, errs, code := tandem("", args...); code != ExitUsage {
			t.Errorf("%v: code %d: %s", args, code, errs)
		}
	}
}
