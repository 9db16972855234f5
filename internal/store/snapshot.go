package store

import (
	"slices"

	v1 "tandem/api/tandem/v1"
)

// Snapshot is all records at one revision. Do not modify them.
type Snapshot struct {
	Revision   uint64
	Projects   []*v1.Project
	Networks   []*v1.Network
	Services   []*v1.Service
	Containers []*v1.Container
	Machines   []*v1.Machine
	Volumes    []*v1.Volume
	Hosts      []*v1.Host
	// Corrupt are the keys of records that could not be decoded: what they stand
	// for is there, though no list has it.
	Corrupt []Key
	// Last are the last readable copies of those, as far as there are any: good for
	// what they hold (addresses, ports) and for nothing else.
	Last []Record
}

// Unreadable says whether a record of one of these kinds could not be decoded, so
// that nothing may be concluded from the absence of one.
func (s *Snapshot) Unreadable(kinds ...Kind) bool {
	return slices.ContainsFunc(s.Corrupt, func(k Key) bool { return slices.Contains(kinds, k.Kind) })
}

// Broken says whether this very record could not be decoded.
func (s *Snapshot) Broken(k Key) bool { return slices.Contains(s.Corrupt, k) }

// Snapshot reads everything at one moment, each list ordered by project and name.
func (s *Store) Snapshot() *Snapshot {
	c := &s.cache
	c.mu.RLock()
	defer c.mu.RUnlock()
	return &Snapshot{
		Revision:   c.rev,
		Projects:   list[*v1.Project](c, Projects, ""),
		Networks:   list[*v1.Network](c, Networks, ""),
		Services:   list[*v1.Service](c, Services, ""),
		Containers: list[*v1.Container](c, Containers, ""),
		Machines:   list[*v1.Machine](c, Machines, ""),
		Volumes:    list[*v1.Volume](c, Volumes, ""),
		Hosts:      list[*v1.Host](c, Hosts, ""),
		Corrupt:    c.corruptKeys(),
		Last:       c.lost(),
	}
}
