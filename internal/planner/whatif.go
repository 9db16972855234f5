package planner

import (
	"fmt"
	"slices"
)

// whatIf makes the changes on a copy, and places there what has no place then.
func (s *State) whatIf(q *WhatIf) (*Plan, error) {
	n := s.Clone()
	for _, h := range q.AddHosts {
		if n.hosts[h.ID] != nil {
			return nil, fmt.Errorf("what if host %s were added: it is there already", h.ID)
		}
		if err := n.SetHost(h); err != nil {
			return nil, fmt.Errorf("what if a host were added: %w", err)
		}
	}
	for _, id := range q.RemoveHosts {
		if n.hosts[id] == nil {
			return nil, fmt.Errorf("what if host %s were removed: it is not known", id)
		}
		n.RemoveHost(id)
	}
	for _, x := range q.Scale {
		if err := n.scale(x); err != nil {
			return nil, err
		}
	}
	var ids []string
	for _, c := range n.sortedContainers() {
		if c.host == nil {
			ids = append(ids, c.ID)
		}
	}
	p, err := n.placeAll(ids)
	if p != nil {
		p.Revision = s.rev
	}
	return p, err
}

const maxReplicas = 100_000

func (s *State) scale(x Scale) error {
	if x.Replicas < 0 || x.Replicas > maxReplicas {
		return fmt.Errorf("what if service %s had %d replicas: between 0 and %d are possible", x.Service, x.Replicas, maxReplicas)
	}
	var list []*container
	for _, c := range s.sortedContainers() {
		if c.Project == x.Project && c.Service == x.Service && c.Service != "" {
			list = append(list, c)
		}
	}
	if len(list) == 0 {
		return fmt.Errorf("what if service %s of project %s were scaled: it has no container to take as a pattern", x.Service, x.Project)
	}
	for len(list) > x.Replicas {
		last := list[len(list)-1]
		list = list[:len(list)-1]
		s.RemoveContainer(last.ID)
	}
	pattern := Container{}
	if len(list) > 0 {
		pattern = list[0].unplaced()
	}
	pattern.Volumes = slices.Clone(pattern.Volumes)
	for i := 1; len(list) < x.Replicas; i++ {
		pattern.ID = fmt.Sprintf("%s-what-if-%d", x.Service, i)
		if s.containers[pattern.ID] != nil {
			continue
		}
		if err := s.SetContainer(pattern); err != nil {
			return err
		}
		list = append(list, s.containers[pattern.ID])
	}
	return nil
}
