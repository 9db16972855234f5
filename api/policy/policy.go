// Package policy checks what a whole cluster and its services are asked to keep to:
// pools, quotas, the guarantee for host losses, and rules on company. It is pure, and
// shared by those who read Compose files and by the server that checks requests.
//
//	next, err := policy.Change(now, request) // ChangePolicy; now may be nil
//	for _, text := range policy.Company(services)["web"] { ... }
//
// Errors are of class InvalidArgument, but for a pool that others are inside
// (FailedPrecondition).
package policy

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

// What one policy may hold at most.
const (
	MaxPools  = 10_000
	MaxQuotas = 10_000
	maxPath   = 255
	maxShares = 1_000_000_000
	maxCount  = 1_000_000
	maxCPU    = 1_000_000_000 // thousandths of a core
	maxMemory = 1 << 60
)

var (
	poolPath    = regexp.MustCompile(`^(/[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62})+$`)
	serviceName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}$`)
	projectName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)
)

// PoolPath is an error when a pool can't have this path.
func PoolPath(path string) error {
	if len(path) > maxPath || !poolPath.MatchString(path) {
		return fmt.Errorf("pool %.80q: a path looks like /teams/shop, at most %d long: %w", path, maxPath, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Change is the policy after a request; neither argument is changed.
func Change(now *v1.Policy, r *v1.ChangePolicyRequest) (*v1.Policy, error) {
	p := &v1.Policy{Meta: now.GetMeta(), HostLosses: now.GetHostLosses()}
	if r.HostLosses != nil {
		p.HostLosses = *r.HostLosses
	}
	pools := map[string]*v1.Pool{}
	for _, x := range now.GetPools() {
		pools[x.Path] = x
	}
	for _, x := range r.GetPools() {
		pools[x.GetPath()] = x
	}
	for _, path := range r.GetRemovePools() {
		delete(pools, path)
		for other := range pools {
			if strings.HasPrefix(other, path+"/") {
				return nil, fmt.Errorf("pool %.80s has %s inside: remove that first: %w", path, other, errdefs.ErrFailedPrecondition)
			}
		}
	}
	quotas := map[string]*v1.Quota{}
	for _, x := range now.GetQuotas() {
		quotas[x.Project] = x
	}
	for _, x := range r.GetQuotas() {
		quotas[x.GetProject()] = x
	}
	for _, project := range r.GetRemoveQuotas() {
		delete(quotas, project)
	}
	for _, x := range pools {
		p.Pools = append(p.Pools, x)
	}
	for _, x := range quotas {
		p.Quotas = append(p.Quotas, x)
	}
	slices.SortFunc(p.Pools, func(a, b *v1.Pool) int { return cmp.Compare(a.Path, b.Path) })
	slices.SortFunc(p.Quotas, func(a, b *v1.Quota) int { return cmp.Compare(a.Project, b.Project) })
	return p, check(p, pools)
}

func check(p *v1.Policy, pools map[string]*v1.Pool) error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	if p.HostLosses < 0 || p.HostLosses > 2 {
		return invalid("a guarantee for %d host losses: there are 0, 1 and 2", p.HostLosses)
	}
	if len(p.Pools) > MaxPools || len(p.Quotas) > MaxQuotas {
		return invalid("%d pools and %d quotas, at most %d and %d", len(p.Pools), len(p.Quotas), MaxPools, MaxQuotas)
	}
	inside := map[string]resource.Size{} // what the pools directly inside reserve
	for _, x := range p.Pools {
		if err := PoolPath(x.Path); err != nil {
			return err
		}
		r, l := size(x.Reservation), size(x.Limit)
		if !valid(r) || !valid(l) || x.Shares < 0 || x.Shares > maxShares {
			return invalid("pool %s: reservation, limit or shares are out of range", x.Path)
		}
		if over(r, l) {
			return invalid("pool %s reserves %s, more than its limit of %s", x.Path, r, l)
		}
		if up := enclosing(pools, x.Path); up != nil {
			sum := inside[up.Path]
			inside[up.Path] = resource.Size{CPU: sum.CPU + r.CPU, Memory: sum.Memory + r.Memory}
		}
	}
	for _, x := range p.Pools {
		sum := inside[x.Path]
		if over(sum, size(x.Limit)) {
			return invalid("the pools inside %s reserve %s together, more than its limit of %s", x.Path, sum, size(x.Limit))
		}
		if own := size(x.Reservation); own != (resource.Size{}) && (sum.CPU > own.CPU || sum.Memory > own.Memory) {
			return invalid("the pools inside %s reserve %s together, more than the %s that it reserves", x.Path, sum, own)
		}
	}
	for _, q := range p.Quotas {
		switch {
		case !projectName.MatchString(q.Project):
			return invalid("quota of project %.80q: that is no name of a project", q.Project)
		case !valid(size(q.Reserved)) || q.Containers < 0 || q.Containers > maxCount || q.Machines < 0 || q.Machines > maxCount:
			return invalid("quota of project %s is out of range", q.Project)
		case size(q.Reserved) == resource.Size{} && q.Containers == 0 && q.Machines == 0:
			return invalid("quota of project %s bounds nothing: give at least one bound, or remove the quota", q.Project)
		}
	}
	return nil
}

// Reserved is what the pools that are in no other reserve together: what the hosts
// must have.
func Reserved(p *v1.Policy) resource.Size {
	pools := map[string]*v1.Pool{}
	for _, x := range p.GetPools() {
		pools[x.Path] = x
	}
	var sum resource.Size
	for _, x := range p.GetPools() {
		covered := false
		for up := enclosing(pools, x.Path); up != nil && !covered; up = enclosing(pools, up.Path) {
			covered = size(up.Reservation) != resource.Size{}
		}
		if r := size(x.Reservation); !covered {
			sum = resource.Size{CPU: sum.CPU + r.CPU, Memory: sum.Memory + r.Memory}
		}
	}
	return sum
}

// enclosing is the nearest pool around a path that is there.
func enclosing(pools map[string]*v1.Pool, path string) *v1.Pool {
	for i := strings.LastIndexByte(path, '/'); i > 0; i = strings.LastIndexByte(path, '/') {
		path = path[:i]
		if p := pools[path]; p != nil {
			return p
		}
	}
	return nil
}

func size(s *v1.Size) resource.Size {
	return resource.Size{CPU: s.GetCpuMilli(), Memory: s.GetMemoryBytes()}
}

func valid(s resource.Size) bool {
	return s.CPU >= 0 && s.CPU <= maxCPU && s.Memory >= 0 && s.Memory <= maxMemory
}

// over says whether a is above b; a dimension of 0 of b bounds nothing.
func over(a, b resource.Size) bool {
	return b.CPU > 0 && a.CPU > b.CPU || b.Memory > 0 && a.Memory > b.Memory
}
