package planner_test

import (
	"fmt"
	"slices"

	"tandem/internal/planner"
)

// world is the checker's own picture: plain maps, brute force, no code shared
// with the planner.
type world struct {
	hosts      map[string]planner.Host
	machines   map[string]planner.Machine
	containers map[string]planner.Container
	volumes    map[string]string
	most       int          // containers of project q; 0: any number
	limit      planner.Size // of pool /a; 0: none
}

func newWorld() *world {
	return &world{hosts: map[string]planner.Host{}, machines: map[string]planner.Machine{}, containers: map[string]planner.Container{}, volumes: map[string]string{}}
}

func plus(a, b planner.Size) planner.Size {
	return planner.Size{CPU: a.CPU + b.CPU, Memory: a.Memory + b.Memory}
}
func within(a, b planner.Size) bool { return a.CPU <= b.CPU && a.Memory <= b.Memory }

func reserved(c planner.Container) planner.Size {
	if c.Request.Memory == 0 {
		c.Request.Memory = planner.DefaultMemory
	}
	return c.Request
}

func (w *world) copy() *world {
	n := newWorld()
	n.most, n.limit = w.most, w.limit
	for k, v := range w.hosts {
		n.hosts[k] = v
	}
	for k, v := range w.machines {
		n.machines[k] = v
	}
	for k, v := range w.containers {
		n.containers[k] = v
	}
	for k, v := range w.volumes {
		n.volumes[k] = v
	}
	return n
}

// apply carries out one action; it fails when the step itself is not allowed.
func (w *world) apply(a planner.Action) error {
	h, ok := w.hosts[a.Host]
	if !ok {
		return fmt.Errorf("%s on unknown host %q", a.Kind, a.Host)
	}
	open := !h.Down && !h.Cordoned && !h.Off
	m, known := w.machines[a.Machine]
	switch a.Kind {
	case planner.Boot:
		if known || !open {
			return fmt.Errorf("boot of %s on %s: exists %v, open %v", a.Machine, a.Host, known, open)
		}
		if !aligned(h, h.Base, a.To) {
			return fmt.Errorf("boot of %s in a size %v that is no step from %v", a.Machine, a.To, h.Base)
		}
		w.machines[a.Machine] = planner.Machine{ID: a.Machine, Host: a.Host, Project: a.Project, Isolation: a.Isolation, Size: a.To, Ceiling: a.Ceiling}
		return nil
	case planner.PowerOn:
		if !h.Off {
			return fmt.Errorf("power on of %s, which is on", h.ID)
		}
		h.Off = false
		w.hosts[h.ID] = h
		return nil
	case planner.PowerOff:
		for _, m := range w.machines {
			if m.Host == h.ID && !m.Stopping {
				return fmt.Errorf("power off of %s, which has %s", h.ID, m.ID)
			}
		}
		for _, c := range w.containers {
			if c.Host == h.ID {
				return fmt.Errorf("power off of %s, which runs %s", h.ID, c.ID)
			}
		}
		h.Off = true
		w.hosts[h.ID] = h
		return nil
	case planner.Evict:
		c := w.containers[a.Container]
		if c.Host != a.FromHost || c.Machine != a.FromMachine || c.Class != planner.Batch {
			return fmt.Errorf("eviction of %s from %s", a.Container, a.FromHost)
		}
		c.Host, c.Machine = "", ""
		w.containers[c.ID] = c
		return nil
	case planner.Migrate, planner.Restart:
		if !known || m.Host != a.FromHost || m.Size != a.From || !open {
			return fmt.Errorf("%s of %s from %s to %s", a.Kind, a.Machine, a.FromHost, a.Host)
		}
		if f := w.hosts[a.FromHost]; a.Kind == planner.Migrate && (f.Down || f.Capabilities.MoveSecondsGiB <= 0 || h.Capabilities.MoveSecondsGiB <= 0) {
			return fmt.Errorf("migration of %s, which the back end can't", m.ID)
		}
		m.Host, m.Size, m.Ceiling = h.ID, a.To, planner.Size{CPU: max(a.To.CPU, m.Ceiling.CPU), Memory: max(a.To.Memory, m.Ceiling.Memory)}
		w.machines[m.ID] = m
		for k, c := range w.containers {
			if c.Machine == m.ID {
				c.Host = h.ID
				w.containers[k] = c
			}
		}
		return nil
	case planner.Move:
		c := w.containers[a.Container]
		if c.Host == "" || c.Host != a.FromHost || c.Machine != a.FromMachine || c.Stateful || !open || a.Machine != "" && (!known || m.Host != a.Host || m.Stopping) {
			return fmt.Errorf("move of %s from %s to %s", a.Container, a.FromHost, a.Host)
		}
		c.Host, c.Machine = "", ""
		return w.put(c, h, a.Machine)
	case planner.PlaceM:
		c, ok := w.containers[a.Container]
		if a.FromHost != "" && c.Host == a.FromHost && w.hosts[c.Host].Down {
			c.Host, c.Machine = "", ""
		}
		if !ok || c.Host != "" || !open || !h.Capabilities.Metal || c.Isolation != planner.Metal {
			return fmt.Errorf("metal placement of %s on %s", a.Container, a.Host)
		}
		return w.put(c, h, "")
	}
	if !known || m.Host != a.Host {
		return fmt.Errorf("%s: no machine %q on %s", a.Kind, a.Machine, a.Host)
	}
	switch a.Kind {
	case planner.Grow:
		if !open || m.Stopping || !h.Capabilities.Grow || m.Size != a.From || !within(a.To, m.Ceiling) || !aligned(h, a.From, a.To) || !within(a.From, a.To) {
			return fmt.Errorf("growth of %s from %v to %v, ceiling %v", m.ID, a.From, a.To, m.Ceiling)
		}
		m.Size = a.To
	case planner.Shrink:
		if !h.Capabilities.Shrink || m.Size != a.From || !aligned(h, a.To, a.From) || !within(h.Base, a.To) || !within(m.Min, a.To) {
			return fmt.Errorf("shrinkage of %s from %v to %v", m.ID, a.From, a.To)
		}
		m.Size = a.To
	case planner.Stop:
		for _, c := range w.containers {
			if c.Machine == m.ID {
				return fmt.Errorf("stop of %s, which holds %s", m.ID, c.ID)
			}
		}
		if m.Pinned {
			return fmt.Errorf("stop of %s, which is pinned", m.ID)
		}
		m.Stopping = true
	case planner.Place:
		c, ok := w.containers[a.Container]
		if a.FromHost != "" && c.Host == a.FromHost && w.hosts[c.Host].Down {
			c.Host, c.Machine = "", ""
		}
		if !ok || c.Host != "" || !open || m.Stopping {
			return fmt.Errorf("placement of %s in %s", a.Container, m.ID)
		}
		return w.put(c, h, m.ID)
	default:
		return fmt.Errorf("unknown action %q", a.Kind)
	}
	w.machines[m.ID] = m
	return nil
}

func (w *world) put(c planner.Container, h planner.Host, machine string) error {
	if len(c.Hosts) > 0 && !slices.Contains(c.Hosts, h.ID) {
		return fmt.Errorf("%s on %s, not on %v", c.ID, h.ID, c.Hosts)
	}
	c.Host, c.Machine = h.ID, machine
	w.containers[c.ID] = c
	for _, v := range c.Volumes {
		if w.volumes[v] == "" {
			w.volumes[v] = h.ID
		}
	}
	return nil
}

func aligned(h planner.Host, from, to planner.Size) bool {
	cpu, mem := h.Capabilities.CPUStep, h.Capabilities.MemoryStep
	if cpu == 0 {
		cpu = 1000
	}
	if mem == 0 {
		mem = 1
	}
	return (to.CPU-from.CPU)%cpu == 0 && (to.Memory-from.Memory)%mem == 0
}

// bounds looks at quotas and pools.
func (w *world) bounds() error {
	placed, pool := 0, planner.Size{}
	for _, c := range w.containers {
		if c.Host != "" && c.Project == "q" {
			placed++
		}
		if c.Host != "" && c.Pool != "" {
			pool = plus(pool, reserved(c))
		}
	}
	if w.most > 0 && placed > w.most {
		return fmt.Errorf("project q has %d containers, its quota is %d", placed, w.most)
	}
	if w.limit.CPU > 0 && pool.CPU > w.limit.CPU {
		return fmt.Errorf("pool /a reserves %v, its limit is %v", pool, w.limit)
	}
	return nil
}

// check looks at every rule that must hold for what runs.
func (w *world) check() error {
	if err := w.bounds(); err != nil {
		return err
	}
	for _, h := range w.hosts {
		var used planner.Size
		for _, m := range w.machines {
			if m.Host != h.ID {
				continue
			}
			used = plus(used, plus(m.Size, h.MachineExtra))
			inside := h.GuestExtra
			n := 0
			for _, c := range w.containers {
				if c.Machine != m.ID {
					continue
				}
				n++
				inside = plus(inside, reserved(c))
				if c.Isolation != m.Isolation || c.Isolation != planner.Shared && c.Project != m.Project {
					return fmt.Errorf("%s (%d, %s) is in %s (%d, %s)", c.ID, c.Isolation, c.Project, m.ID, m.Isolation, m.Project)
				}
				if c.Host != h.ID {
					return fmt.Errorf("%s says %s, its machine is on %s", c.ID, c.Host, h.ID)
				}
			}
			if n > 0 && !within(inside, m.Size) {
				return fmt.Errorf("%s holds %v, more than its %v", m.ID, inside, m.Size)
			}
			if m.Isolation == planner.Own && n > 1 {
				return fmt.Errorf("%s holds %d, not one", m.ID, n)
			}
		}
		for _, c := range w.containers {
			if c.Host == h.ID && c.Machine == "" {
				used = plus(used, reserved(c))
			}
		}
		if h.Off && used != (planner.Size{}) {
			return fmt.Errorf("%s is off and gives %v", h.ID, used)
		}
		if !within(used, h.Capacity) {
			return fmt.Errorf("%s gives %v, more than its %v", h.ID, used, h.Capacity)
		}
	}
	for _, a := range w.containers {
		if a.Host == "" {
			continue
		}
		for _, v := range a.Volumes {
			if at := w.volumes[v]; at != a.Host {
				return fmt.Errorf("%s on %s has volume %s on %q", a.ID, a.Host, v, at)
			}
		}
		for _, b := range w.containers {
			if a.ID == b.ID || b.Host == "" {
				continue
			}
			if err := pair(a, b); err != nil {
				return err
			}
		}
		for _, r := range a.Anti {
			n := 0
			for _, b := range w.containers {
				near := b.Host == a.Host
				if r.Layer == "machine" {
					near = near && b.Machine == a.Machine
				}
				if r.Layer == "zone" {
					near = b.Host != "" && w.hosts[b.Host].Zone == w.hosts[a.Host].Zone
				}
				if b.ID != a.ID && b.Host != "" && b.Project == a.Project && b.Service == r.Service && near {
					n++
				}
			}
			if n > r.Max {
				return fmt.Errorf("%s has %d of %s beside it (%s), at most %d may be", a.ID, n, r.Service, r.Layer, r.Max)
			}
		}
	}
	return nil
}

func pair(a, b planner.Container) error {
	if a.Host == b.Host && (a.Service == "" || a.Service != b.Service || a.Project != b.Project) {
		for _, p := range a.Ports {
			for _, q := range b.Ports {
				any := p.IP == "" || q.IP == "" || p.IP == "0.0.0.0" || q.IP == "0.0.0.0" || p.IP == q.IP
				if p.Port == q.Port && p.Port != 0 && p.Protocol == q.Protocol && any {
					return fmt.Errorf("%s and %s both publish %v on %s", a.ID, b.ID, p, a.Host)
				}
			}
		}
	}
	for _, v := range a.Volumes {
		if slices.Contains(b.Volumes, v) && (a.Host != b.Host || a.Machine != b.Machine) {
			return fmt.Errorf("%s and %s use %s in two places", a.ID, b.ID, v)
		}
	}
	return nil
}

// possible says by trying every place whether c fits anywhere.
func (w *world) possible(id string) string {
	c := w.containers[id]
	try := func(what string, actions ...planner.Action) string {
		n := w.copy()
		for _, a := range actions {
			if n.apply(a) != nil {
				return ""
			}
		}
		if n.check() != nil {
			return ""
		}
		return what
	}
	for _, h := range w.hosts {
		if c.Isolation == planner.Metal {
			if s := try("metal on "+h.ID, planner.Action{Kind: planner.PlaceM, Container: id, Host: h.ID}); s != "" {
				return s
			}
			continue
		}
		for _, m := range w.machines {
			if m.Host != h.ID {
				continue
			}
			place := planner.Action{Kind: planner.Place, Container: id, Machine: m.ID, Host: h.ID}
			if s := try("place in "+m.ID, place); s != "" {
				return s
			}
			inside := plus(h.GuestExtra, reserved(c))
			for _, o := range w.containers {
				if o.Machine == m.ID {
					inside = plus(inside, reserved(o))
				}
			}
			to := up(h, m.Size, inside)
			if s := try("grow "+m.ID, planner.Action{Kind: planner.Grow, Machine: m.ID, Host: h.ID, From: m.Size, To: to}, place); s != "" {
				return s
			}
		}
		to := up(h, h.Base, plus(h.GuestExtra, reserved(c)))
		if top := h.Capabilities.MaxMachine; top.CPU != 0 && to.CPU > top.CPU || top.Memory != 0 && to.Memory > top.Memory {
			continue
		}
		project := c.Project
		if c.Isolation == planner.Shared {
			project = ""
		}
		if s := try("boot on "+h.ID,
			planner.Action{Kind: planner.Boot, Machine: "probe", Host: h.ID, To: to, Ceiling: to, Project: project, Isolation: c.Isolation},
			planner.Action{Kind: planner.Place, Container: id, Machine: "probe", Host: h.ID}); s != "" {
			return s
		}
	}
	return ""
}

// up is the least size in steps from one to hold another.
func up(h planner.Host, from, want planner.Size) planner.Size {
	cpu, mem := max(h.Capabilities.CPUStep, 1), max(h.Capabilities.MemoryStep, 1)
	if h.Capabilities.CPUStep == 0 {
		cpu = 1000
	}
	for from.CPU < want.CPU {
		from.CPU += cpu
	}
	if from.Memory < want.Memory {
		from.Memory += (want.Memory - from.Memory + mem - 1) / mem * mem
	}
	return from
}
