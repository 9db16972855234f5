package planner

import "slices"

// switchable says whether hosts can be, or just were, switched on and off.
func (d *decision) switchable() bool { return d.powered || len(d.s.off) > 0 }

// tooCrowded says whether even the best option is worse than switching a host on.
func (d *decision) tooCrowded(f *finder) bool {
	return !d.noPower && len(d.s.off) > 0 && len(f.found) > 0 && f.found[f.best()].cost > WeightPowerOn
}

// power switches hosts on until one of the options works out.
func (d *decision) power(f *finder) bool {
	s := d.s
	start, acts := len(d.undo), len(d.actions)
	before := slices.Clone(f.found)
	for range s.policy.HostLosses + 2 {
		h := d.spare(f.c, len(f.found) > 0)
		if h == nil {
			break
		}
		d.powerOn(h, f.c)
		g := &finder{d: d, c: f.c}
		if f.c.Isolation == Metal {
			g.hosts(PlaceM)
		} else {
			g.machines()
			g.hosts(Boot)
		}
		f.found = append(f.found[:0], g.found...)
		if d.settle(f) {
			return true
		}
	}
	s.rollback(&d.undo, start)
	d.actions = d.actions[:acts]
	f.found = append(f.found[:0], before...)
	return false
}

// spare is the host to switch on: the smallest that would hold c; with any, the
// largest will do as a standby when none holds it.
func (d *decision) spare(c *container, anyway bool) *host {
	var best *host
	for i, h := range d.s.off {
		if i >= maxExplained {
			break
		}
		if h == d.not || h.Cordoned || d.only != nil && d.only != h {
			continue
		}
		h.Off = false
		ok := d.s.bootRules(c, h).ok()
		if c.Isolation == Metal {
			ok = d.s.metalRules(c, h).ok()
		}
		h.Off = true
		if !ok && !anyway {
			continue
		}
		if best == nil || h.Capacity.fits(best.Capacity) && h.Capacity != best.Capacity {
			best = h
		}
	}
	return best
}

func (d *decision) powerOn(h *host, c *container) {
	d.power1(h, false)
	d.powered = true
	d.actions = append(d.actions, Action{Kind: PowerOn, Host: h.ID, Seconds: h.Capabilities.PowerOnSeconds, Cost: WeightPowerOn,
		Reason: Reason{Summary: "switched " + h.ID + " on: nothing that is on has room for " + c.ID + " and keeps the guarantee"}})
}

// power1 switches h off or on in the tentative state.
func (d *decision) power1(h *host, off bool) {
	set := func(v bool) {
		d.s.unindexHost(h)
		h.Off = v
		d.s.indexHost(h)
	}
	was := h.Off
	set(off)
	d.undo.note(func() { set(off) }, func() { set(was) })
}
