package planner

import (
	"cmp"
	"maps"
	"slices"
)

// rebalance mends what is broken first: containers without a standby host, rules
// that what runs breaks; then it spreads replicas, as far as the budget goes.
func (s *State) rebalance(limit Budget) (*Plan, error) {
	d := s.decision()
	defer d.back()
	b := &budget{Budget: limit}
	d.coverAll()
	for _, c := range d.broken() {
		d.improve(c, b, "its rules are broken where it is", true)
	}
	d.noPower = true
	for _, c := range d.crowded() {
		d.improve(c, b, "to spread "+c.Service, false)
	}
	return d.plan(), nil
}

// coverAll switches hosts on until everything covered has its standby hosts.
func (d *decision) coverAll() {
	s := d.s
	s.healAll(&d.undo)
	for _, c := range s.exposedList() {
		if s.secure(c, &d.undo) {
			continue
		}
		for range s.policy.HostLosses {
			h := d.spare(c, true)
			if h == nil {
				break
			}
			k := d.mark()
			d.power1(h, false)
			d.actions = append(d.actions, Action{Kind: PowerOn, Host: h.ID, Seconds: h.Capabilities.PowerOnSeconds, Cost: WeightPowerOn,
				Reason: Reason{Summary: "switched " + h.ID + " on: " + c.ID + " has nowhere to go when its host is lost"}})
			before := s.exposed.n
			if s.secure(c, &d.undo) {
				break
			}
			if s.exposed.n >= before && s.policy.HostLosses == 1 {
				d.reset(k)
				break
			}
		}
	}
}

// broken is the containers, by id, that may not be where they are.
func (d *decision) broken() []*container {
	s := d.s
	var out []*container
	for _, c := range s.sortedContainers() {
		if c.host == nil || !c.ruled() && len(c.Zones) == 0 && len(c.Hosts) == 0 && len(c.Near) == 0 {
			continue
		}
		h := c.host
		if !h.takes() {
			continue // emptying a host is another question
		}
		m, k := c.machine, d.mark()
		d.remove(c) // it is no company of its own
		bad := !s.hostRules(c, h).ok()
		if m != nil {
			bad = bad || !antiRule(c, &m.in, "machine").ok() || !s.nearRule(c, &m.in, "", "machine").ok()
		}
		d.reset(k)
		if bad {
			out = append(out, c)
		}
	}
	return out
}

// crowded is a container of each host that has two or more of a service while
// another host has none of it, by service.
func (d *decision) crowded() []*container {
	s := d.s
	keys := slices.SortedFunc(maps.Keys(s.services), func(a, b serviceKey) int {
		return cmp.Or(cmp.Compare(a.project, b.project), cmp.Compare(a.service, b.service))
	})
	var out []*container
	for _, k := range keys {
		on := s.services[k]
		if len(on) >= s.open.n {
			continue
		}
		hosts := slices.SortedFunc(maps.Keys(on), func(a, b *host) int {
			return cmp.Or(cmp.Compare(on[b], on[a]), cmp.Compare(a.ID, b.ID))
		})
		for _, h := range hosts {
			if on[h] < 2 {
				break
			}
			left := on[h] - 1
			for _, c := range h.all.byID() {
				if left > 0 && c.service() == k {
					out, left = append(out, c), left-1
				}
			}
		}
	}
	return out
}

// improve moves c if the budget and its nature allow and it comes to stand better:
// on a host with fewer of its service, or, when it must go, anywhere.
func (d *decision) improve(c *container, b *budget, why string, must bool) {
	if c.host == nil || c.Stateful || len(c.Volumes) > 0 || !b.allows(1, 0, 0) {
		return
	}
	before := c.host.all.count(c.service())
	from, machine := c.host, c.machine
	k := d.mark()
	ok := d.move(c, why)
	if ok && c.host == from && c.machine == machine {
		ok = false // back where it was
	}
	if ok && !must && c.host.all.count(c.service()) >= before {
		ok = false
	}
	if !ok {
		d.reset(k)
		return
	}
	b.spend(1, 0, 0)
}
