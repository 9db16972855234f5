package planner_test

import (
	"fmt"
	"slices"

	"tandem/internal/planner"
)

// survives carries out every loss of that many hosts by what the planner says of
// standby hosts: everything covered starts at the first of its standby hosts that is
// left, machines with their overheads, and then every rule is checked as ever.
func (w *world) survives(losses int, standby func(string) []string) error {
	var up []string
	for id, h := range w.hosts {
		if !h.Down && !h.Cordoned && !h.Off {
			up = append(up, id)
		}
	}
	slices.Sort(up)
	lose := func(lost ...string) error {
		n := w.copy()
		for _, id := range lost {
			h := n.hosts[id]
			h.Down = true
			n.hosts[id] = h
		}
		for id, c := range w.containers {
			if !slices.Contains(lost, c.Host) {
				continue
			}
			if !w.covered(c) {
				c.Host, c.Machine, c.Volumes = "", "", nil
				n.containers[id] = c
				continue
			}
			to := ""
			for _, g := range standby(id) {
				if !slices.Contains(lost, g) && !n.hosts[g].Down {
					to = g
					break
				}
			}
			if to == "" {
				return fmt.Errorf("loss of %v: %s has nowhere to go (%v)", lost, id, standby(id))
			}
			h := n.hosts[to]
			if len(c.Hosts) > 0 && !slices.Contains(c.Hosts, to) || len(c.Zones) > 0 && !slices.Contains(c.Zones, h.Zone) {
				return fmt.Errorf("loss of %v: %s would go to %s, where it may not be", lost, id, to)
			}
			if c.Machine != "" { // a machine of that name there for all that come from it
				old := c.Machine
				c.Machine = old + "@" + to
				m, ok := n.machines[c.Machine]
				if !ok {
					m = w.machines[old]
					m.ID, m.Host, m.Size = c.Machine, to, h.Base
				}
				inside := plus(h.GuestExtra, reserved(c))
				for _, o := range n.containers {
					if o.Machine == m.ID {
						inside = plus(inside, reserved(o))
					}
				}
				m.Size = up2(h, inside)
				n.machines[m.ID] = m
			} else if !h.Capabilities.Metal {
				return fmt.Errorf("loss of %v: %s would go to %s, which runs nothing on metal", lost, id, to)
			}
			c.Host = to
			n.containers[id] = c
		}
		for id, m := range n.machines {
			if slices.Contains(lost, m.Host) {
				delete(n.machines, id)
			}
		}
		for _, c := range n.containers {
			if slices.Contains(lost, c.Host) {
				return fmt.Errorf("checker left %s on %s", c.ID, c.Host)
			}
		}
		if err := n.check(); err != nil {
			return fmt.Errorf("after the loss of %v: %w", lost, err)
		}
		return nil
	}
	for i, a := range up {
		if losses >= 1 {
			if err := lose(a); err != nil {
				return err
			}
		}
		for _, b := range up[i+1:] {
			if losses >= 2 {
				if err := lose(a, b); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func up2(h planner.Host, want planner.Size) planner.Size { return up(h, h.Base, want) }

func (w *world) covered(c planner.Container) bool {
	for _, v := range c.Volumes {
		if w.volumes[v] != "" {
			return false
		}
	}
	return !c.Uncovered && len(c.Hosts) != 1 && len(c.Near) == 0
}
