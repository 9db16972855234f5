package planner

import (
	"errors"
	"fmt"
	"math"
	"strings"
)

// pool is a Pool with what its containers, and those of the pools inside, reserve.
type pool struct {
	Pool
	used   Size
	parent *pool
	kids   []*pool // by path
}

// quota is a project's bounds and what it has.
type quota struct {
	Quota
	used       Size
	containers int
	machines   int
}

type zoneKey struct {
	service serviceKey
	zone    string
}

// SetPool inserts or replaces a pool. Pools above it come into being without bounds.
func (s *State) SetPool(p Pool) error {
	if !validPath(p.Path) {
		return fmt.Errorf("pool %q: a path looks like /a/b", p.Path)
	}
	if !p.Reservation.valid() || !p.Limit.valid() || p.Shares < 0 || p.Shares > 1e9 {
		return fmt.Errorf("pool %s: reservation, limit or shares are out of range", p.Path)
	}
	if l := p.Limit; l.CPU > 0 && p.Reservation.CPU > l.CPU || l.Memory > 0 && p.Reservation.Memory > l.Memory {
		return fmt.Errorf("pool %s: reserves %s, more than its limit of %s", p.Path, p.Reservation, p.Limit)
	}
	s.rev++
	s.setPool(p)
	return nil
}

func (s *State) setPool(p Pool) { s.pool(p.Path).Pool = p }

// RemovePool takes a pool's bounds away. It is an error while pools are inside it.
func (s *State) RemovePool(path string) error {
	p := s.pools[path]
	if p == nil {
		return nil
	}
	if len(p.kids) > 0 {
		return errors.New("pool " + path + " has pools inside; remove those first")
	}
	s.rev++
	p.Pool = Pool{Path: path}
	return nil
}

// pool returns the pool of a path, made with all above it when it is new; nil for "".
func (s *State) pool(path string) *pool {
	if path == "" {
		return nil
	}
	p := s.pools[path]
	if p == nil {
		p = &pool{Pool: Pool{Path: path}}
		s.pools[path] = p
		if i := strings.LastIndexByte(path, '/'); i > 0 {
			p.parent = s.pool(path[:i])
			p.parent.kids = insertByID(p.parent.kids, p)
		}
	}
	return p
}

func (p *pool) id() string { return p.Path }

// SetQuota bounds a project; the zero Quota takes the bounds away.
func (s *State) SetQuota(project string, q Quota) error {
	if !q.Request.valid() || q.Containers < 0 || q.Machines < 0 {
		return fmt.Errorf("quota of project %s is out of range", project)
	}
	s.rev++
	s.quota(project).Quota = q
	return nil
}

func (s *State) quota(project string) *quota {
	q := s.quotas[project]
	if q == nil {
		q = &quota{}
		s.quotas[project] = q
	}
	return q
}

// charge books a container that comes to a host (by 1) or leaves (-1).
func (s *State) charge(c *container, by int64) {
	q := c.quota
	q.used = q.used.add(c.need.times(by))
	q.containers += int(by)
	for p := s.pool(c.Pool); p != nil; p = p.parent {
		p.used = p.used.add(c.need.times(by))
	}
}

func (s *State) chargeMachine(m *machine, by int) {
	if m.Isolation != Shared {
		s.quota(m.Project).machines += by
	}
}

// admission checks what bounds c wherever it goes.
func (s *State) admission(c *container) miss {
	if q := c.quota; q.Quota != (Quota{}) {
		if q.Containers > 0 && q.containers >= q.Containers {
			return miss{rule: RuleQuota, detail: fmt.Sprintf("project %s may have %d containers, and has them", c.Project, q.Containers)}
		}
		if short := over(q.used.add(c.need), q.Request); !short.zero() {
			return miss{rule: RuleQuota, short: short, detail: fmt.Sprintf("project %s may reserve %s: %s too little", c.Project, q.Request, short)}
		}
	}
	if len(s.pools) == 0 {
		return miss{}
	}
	for p := s.pools[c.Pool]; p != nil; p = p.parent {
		if short := over(p.used.add(c.need), p.Limit); !short.zero() {
			return miss{rule: RulePool, short: short, detail: fmt.Sprintf("pool %s is limited to %s: %s too little", p.Path, p.Limit, short)}
		}
	}
	// What pools have reserved and do not use yet is not for others.
	kept := s.keptFrom(c)
	if kept.zero() {
		return miss{}
	}
	if short := c.need.shortOf(s.total.sub(s.taken).sub(kept)); !short.zero() {
		return miss{rule: RulePool, short: short, detail: fmt.Sprintf("%s are kept for pools that reserved them: %s too little", kept, short)}
	}
	return miss{}
}

// over is by how much used is above limit; a zero dimension of limit bounds nothing.
func over(used, limit Size) Size {
	var out Size
	if limit.CPU > 0 {
		out.CPU = max(0, used.CPU-limit.CPU)
	}
	if limit.Memory > 0 {
		out.Memory = max(0, used.Memory-limit.Memory)
	}
	return out
}

// keptFrom sums what pools that c is not in keep unused.
func (s *State) keptFrom(c *container) Size {
	var kept Size
	for path, p := range s.pools { // a sum: order does not matter
		inside := within(c.Pool, path)
		if inside || p.parent != nil && p.parent.reserves() && !within(c.Pool, p.parent.Path) {
			continue // its parent's reservation stands for it
		}
		kept = kept.add(p.Reservation.sub(p.used).positive())
	}
	return kept
}

// within says whether a pool is path or inside it.
func within(pool, path string) bool {
	return strings.HasPrefix(pool, path) && (len(pool) == len(path) || pool[len(path)] == '/')
}

func validPath(p string) bool {
	return strings.HasPrefix(p, "/") && !strings.HasSuffix(p, "/") && !strings.Contains(p, "//")
}

func (p *pool) reserves() bool {
	return !p.Reservation.zero() || p.parent != nil && p.parent.reserves()
}

// due says how well served a container's pools are against their shares, with what
// stands ahead of it in its own: who has least of what is his comes first when not
// all fits.
func (s *State) due(c *container, ahead float64) float64 {
	worst := 0.0
	for p := s.pools[c.Pool]; p != nil; p = p.parent {
		shares := p.Shares
		if shares == 0 {
			shares = 1000
		}
		part := math.Max(share(p.used.CPU, s.total.CPU), share(p.used.Memory, s.total.Memory)) + ahead
		worst = math.Max(worst, part/float64(shares))
	}
	return worst
}

// machineQuota checks whether c's project may have another machine.
func (s *State) machineQuota(c *container, kind Kind) miss {
	if kind != Boot || c.Isolation == Shared {
		return miss{}
	}
	if q := c.quota; q.Machines > 0 && q.machines >= q.Machines {
		return miss{rule: RuleQuota, detail: fmt.Sprintf("project %s may have %d machines, and has them", c.Project, q.Machines)}
	}
	return miss{}
}
