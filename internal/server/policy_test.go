package server

import (
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func (b *bed) policy(r *v1.ChangePolicyRequest) (*v1.PolicyResponse, error) {
	b.t.Helper()
	res, err := b.system.ChangePolicy(ctxOf(b.t), connect.NewRequest(r))
	if err != nil {
		return nil, err
	}
	again, err := b.system.Policy(ctxOf(b.t), connect.NewRequest(&v1.PolicyRequest{}))
	if err != nil || len(again.Msg.Pools) != len(res.Msg.Pools) || len(again.Msg.Quotas) != len(res.Msg.Quotas) || again.Msg.Policy.HostLosses != res.Msg.Policy.HostLosses {
		b.t.Errorf("told %v on the change, then %v: %v", res.Msg, again, err)
	}
	return res.Msg, nil
}

// The guarantee needs hosts; then it is told of whom it speaks, and where each would go.
func TestPolicyGuarantee(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(pool(2))
	one, none := int32(1), int32(0)
	if _, err := b.policy(&v1.ChangePolicyRequest{HostLosses: &one}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "takes at least 2 hosts, and the cluster has 1") {
		t.Fatal("one host survives its own loss:", err)
	}
	b.join("h-2", nil)
	p, err := b.policy(&v1.ChangePolicyRequest{HostLosses: &one})
	if err != nil || p.Covered != 2 || p.ExposedCount != 0 {
		t.Fatal(p, err)
	}
	res, err := b.system.Explain(ctxOf(t), connect.NewRequest(&v1.ContainerRequest{Container: "pool-web-1"}))
	if err != nil || len(res.Msg.Standby) != 1 || !strings.Contains(res.Msg.Text, "it starts again on "+res.Msg.Standby[0]+": the room is kept") {
		t.Error(res, err)
	}
	if p, err = b.policy(&v1.ChangePolicyRequest{HostLosses: &none}); err != nil || p.Covered != 0 {
		t.Error(p, err)
	}
}

func TestPolicyPoolsAndQuotas(t *testing.T) {
	b := newBed(t, Options{})
	up := pool(3)
	up.Wait = false
	up.Services[0].Template.Pool = "/teams/web"
	p, err := b.policy(&v1.ChangePolicyRequest{Pools: []*v1.Pool{{Path: "/teams", Limit: &v1.Size{CpuMilli: 2000}}}, Quotas: []*v1.Quota{{Project: "pool", Machines: 3}}})
	if err != nil || len(p.Pools) != 1 {
		t.Fatal(p, err)
	}
	b.apply(up)
	b.until("two of three run, and the third says why it does not", func() bool {
		run, waits := 0, 0
		for _, c := range b.list(true) {
			if c.Assignment.GetHostId() != "" {
				run++
			} else if strings.Contains(c.GetStatus().GetMessage(), "pool /teams is limited to 2 CPU") {
				waits++
			}
		}
		return run == 2 && waits == 1
	})
	res, err := b.system.Policy(ctxOf(t), connect.NewRequest(&v1.PolicyRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	p = res.Msg
	if len(p.Pools) != 2 || p.Pools[0].Pool.Path != "/teams" || p.Pools[1].Pool.Path != "/teams/web" || p.Pools[0].Used.CpuMilli != 2000 || p.Pools[0].Containers != 2 {
		t.Error("pools:", p.Pools)
	}
	if q := p.Quotas[0]; q.Containers != 2 || q.Machines < 1 || q.Used.MemoryBytes != 2<<30 {
		t.Error("quota:", q)
	}
	huge := &v1.Size{MemoryBytes: 1 << 50}
	if _, err := b.policy(&v1.ChangePolicyRequest{Pools: []*v1.Pool{{Path: "/x", Reservation: huge}}}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "the hosts have") {
		t.Error("more reserved than there is:", err)
	}
	if _, err := b.policy(&v1.ChangePolicyRequest{Pools: []*v1.Pool{{Path: "x"}}}); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if _, err := b.policy(&v1.ChangePolicyRequest{RemovePools: []string{"/teams"}}); err != nil {
		t.Fatal(err)
	}
	b.until("without the limit all run", func() bool {
		for _, c := range b.list(true) {
			if c.Assignment.GetHostId() == "" {
				return false
			}
		}
		return true
	})
}

// Rules on company are checked whoever sends them.
func TestCompanyIsChecked(t *testing.T) {
	b := newBed(t, Options{})
	up := pool(1)
	up.Services[0].Company = []*v1.CompanyRule{{Service: "db", Layer: "rack"}}
	up.Services[0].Template.Pool = "nonsense"
	if _, err := b.tryApply(up); err == nil || !strings.Contains(err.Error(), "there are machine, host and zone") || !strings.Contains(err.Error(), "a path looks like") {
		t.Error(err)
	}
}
