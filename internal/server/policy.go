package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"tandem/api/policy"
	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// maxExposed bounds the names in one answer.
const maxExposed = 1000

// Policy implements SystemService.
func (k *system) Policy(context.Context, *connect.Request[v1.PolicyRequest]) (*connect.Response[v1.PolicyResponse], error) {
	if err := k.s.policyReadable(); err != nil {
		return nil, err
	}
	return connect.NewResponse(k.s.policyState()), nil
}

// ChangePolicy implements SystemService.
func (k *system) ChangePolicy(ctx context.Context, req *connect.Request[v1.ChangePolicyRequest]) (*connect.Response[v1.PolicyResponse], error) {
	s := k.s
	if err := s.policyReadable(); err != nil {
		return nil, err
	}
	for {
		now, err := store.Get[*v1.Policy](s.store, store.PolicyKey)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		next, err := policy.Change(now, req.Msg)
		if err != nil {
			return nil, err
		}
		if err := s.affords(req.Msg, next); err != nil {
			return nil, err
		}
		tx := s.store.Txn()
		if now == nil {
			next.Meta = &v1.Meta{Id: "p-" + s.ctl.NewID(8), Name: store.PolicyKey.Name, CreatedAt: timestamppb.New(s.clock.Now()), Generation: 1}
			tx.Create(next)
		} else {
			next.Meta = &v1.Meta{Id: now.Meta.Id, Name: now.Meta.Name, CreatedAt: now.Meta.CreatedAt, Generation: now.Meta.Generation + 1, Revision: now.Meta.Revision}
			tx.Update(next)
		}
		_, err = tx.Commit(ctx)
		if errdefs.IsConflict(err) || errdefs.IsAlreadyExists(err) {
			continue // somebody else's change came first: this one is made to that
		}
		if err != nil {
			return nil, err
		}
		return connect.NewResponse(s.policyState()), nil
	}
}

// policyReadable: who can't be read is not written over.
func (s *Server) policyReadable() error {
	if s.store.Snapshot().Broken(store.PolicyKey) {
		return fmt.Errorf("%s can't be read; what it said last holds on: see `tandem state ls`, and restore a backup or purge it: %w", store.PolicyKey, errdefs.ErrDataLoss)
	}
	return nil
}

// affords is an error when the hosts that there are can't keep what is newly promised.
func (s *Server) affords(r *v1.ChangePolicyRequest, p *v1.Policy) error {
	hosts := 0
	var have resource.Size
	for _, h := range store.List[*v1.Host](s.store, "") {
		c := h.GetFacts().GetCapacity()
		have.CPU, have.Memory = have.CPU+c.GetCpuMilli(), have.Memory+c.GetMemoryBytes()
		if !h.Cordoned {
			hosts++
		}
	}
	if r.HostLosses != nil && hosts <= int(p.HostLosses) && p.HostLosses > 0 {
		return fmt.Errorf("room for the loss of %d takes at least %d hosts, and the cluster has %d: join more first: %w", p.HostLosses, p.HostLosses+1, hosts, errdefs.ErrFailedPrecondition)
	}
	if want := policy.Reserved(p); len(r.Pools) > 0 && (want.CPU > have.CPU || want.Memory > have.Memory) {
		return fmt.Errorf("pools would reserve %s together, and the hosts have %sc,%s: %w", want, resource.FormatCPU(have.CPU), resource.RoundMemory(have.Memory), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// policyState is the policy and what uses it.
func (s *Server) policyState() *v1.PolicyResponse {
	snap := s.store.Snapshot()
	p, _ := store.Get[*v1.Policy](s.store, store.PolicyKey)
	if p == nil {
		p = &v1.Policy{}
	}
	out := &v1.PolicyResponse{Policy: p}
	pools, quotas := map[string]*v1.PoolUse{}, map[string]*v1.QuotaUse{}
	pool := func(path string) *v1.PoolUse {
		u := pools[path]
		if u == nil {
			u = &v1.PoolUse{Pool: &v1.Pool{Path: path}, Used: &v1.Size{}}
			pools[path] = u
		}
		return u
	}
	for _, x := range p.Pools {
		pool(x.Path).Pool = x
	}
	for _, x := range p.Quotas {
		quotas[x.Project] = &v1.QuotaUse{Quota: x, Used: &v1.Size{}}
	}
	names := map[string]string{}
	for _, c := range snap.Containers {
		names[c.Meta.Id] = c.Meta.Project + "/" + c.Meta.Name
		placed, need := c.GetAssignment().GetHostId() != "", control.Request(c.GetSpec().GetResources())
		for path := c.GetSpec().GetPool(); path != ""; path = path[:max(0, strings.LastIndexByte(path, '/'))] {
			if u := pool(path); placed {
				add(u.Used, need)
				u.Containers++
			}
		}
		if u := quotas[c.Meta.Project]; u != nil && placed {
			add(u.Used, need)
			u.Containers++
		}
	}
	for _, m := range snap.Machines {
		if u := quotas[m.Meta.Project]; u != nil && m.Isolation != v1.Isolation_ISOLATION_SHARED {
			u.Machines++
		}
	}
	for _, u := range pools {
		out.Pools = append(out.Pools, u)
	}
	for _, u := range quotas {
		out.Quotas = append(out.Quotas, u)
	}
	slices.SortFunc(out.Pools, func(a, b *v1.PoolUse) int { return cmp.Compare(a.Pool.Path, b.Pool.Path) })
	slices.SortFunc(out.Quotas, func(a, b *v1.QuotaUse) int { return cmp.Compare(a.Quota.Project, b.Quota.Project) })
	if p.HostLosses > 0 {
		g := s.ctl.Guarantee()
		out.Covered, out.ExposedCount = int32(g.Covered), int32(len(g.Exposed))
		for _, id := range g.Exposed[:min(len(g.Exposed), maxExposed)] {
			out.Exposed = append(out.Exposed, cmp.Or(names[id], id))
		}
	}
	return out
}

func add(to, s *v1.Size) {
	to.CpuMilli, to.MemoryBytes = to.CpuMilli+s.GetCpuMilli(), to.MemoryBytes+s.GetMemoryBytes()
}
