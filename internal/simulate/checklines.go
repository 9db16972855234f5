package simulate

import (
	"errors"
	"fmt"
	"slices"
)

func (k *checker) find(l *Line) (*Container, error) {
	c := k.containers[l.Container]
	if c == nil {
		return nil, fmt.Errorf("%s of container %q, which has not arrived", l.What, clip(l.Container))
	}
	if c.Done {
		return nil, fmt.Errorf("%s of container %s, which has left", l.What, c.ID)
	}
	return c, nil
}

func (k *checker) containerLine(l *Line) error {
	if l.What == "arrive" {
		return k.arrive(l)
	}
	c, err := k.find(l)
	if err != nil {
		return err
	}
	if (l.What == "place" || l.What == "move") && (l.CPU != c.Need.CPU || l.Memory != c.Need.Memory) {
		return fmt.Errorf("%s of %s with %s, but it arrived with %s", l.What, c.ID, Size{l.CPU, l.Memory}, c.Need)
	}
	switch l.What {
	case "place":
		if c.Machine != nil {
			return fmt.Errorf("%s is placed, but is in %s", c.ID, c.Machine.ID)
		}
		c.down = c.Started
		return k.enter(c, l)
	case "start":
		return k.start(c)
	case "depart":
		if !c.Started || c.stays() || k.now != c.began+c.Life {
			return fmt.Errorf("%s departs at %g s, which is not the end of its life", c.ID, k.now.Seconds())
		}
		k.leave(c)
		k.unmove(c)
		c.Done = true
	case "refuse":
		if c.Machine != nil {
			return fmt.Errorf("%s is refused, but is in %s", c.ID, c.Machine.ID)
		}
		c.Done = true
	case "evict":
		if c.Machine == nil || c.from != nil {
			return fmt.Errorf("%s is evicted, but is nowhere or on its way", c.ID)
		}
		k.leave(c)
		c.down, c.Running = c.Started, false
	case "move":
		from := c.Machine
		if from == nil || from.ID != l.From || !c.Running || c.from != nil {
			return fmt.Errorf("%s moves from %q, where it does not run", c.ID, clip(l.From))
		}
		k.leave(c)
		from.Used = from.Used.add(c.Need)
		from.leaving++
		c.from = from
		if k.measured() {
			k.sums.moves++
		}
		return k.enter(c, l)
	case "moved":
		if c.from == nil || c.Machine == nil || !c.Machine.Up {
			return fmt.Errorf("%s has moved, but was not on its way to a machine that is up", c.ID)
		}
		k.unmove(c)
		c.queued = false
		return k.live(c.Machine)
	case "move-failed":
		if c.Machine != nil || c.from == nil || c.from.ID != l.Machine {
			return fmt.Errorf("%s stays in %q, but did not come from there", c.ID, clip(l.Machine))
		}
		from := c.from
		k.unmove(c)
		if err := k.enter(c, &Line{What: l.What, Machine: from.ID, Host: l.Host}); err != nil {
			return err
		}
		c.queued = false
	case "lost":
		if !c.lost {
			return fmt.Errorf("%s is lost, but its host did not fail", c.ID)
		}
		c.lost = false
	}
	return nil
}

func (k *checker) arrive(l *Line) error {
	if l.Container == "" || k.containers[l.Container] != nil {
		return fmt.Errorf("container %q arrives without a name or twice", clip(l.Container))
	}
	q := Request{ID: l.Container, Arrive: k.now, Life: -1, Need: Size{l.CPU, l.Memory}, Project: l.Project, Service: l.Service, Class: l.Class}
	if l.CPU < 0 || l.Memory < 0 || l.CPU > maxCPU || l.Memory > maxMemory {
		return fmt.Errorf("container %s needs an amount out of range", l.Container)
	}
	if l.Life != nil {
		if !(*l.Life >= 0 && *l.Life <= maxTime.Seconds()) {
			return fmt.Errorf("container %s lives for %g s", l.Container, *l.Life)
		}
		q.Life = seconds(*l.Life)
	}
	k.trace.Requests = append(k.trace.Requests, q)
	k.containers[q.ID] = &Container{Request: &q}
	if q.Arrive >= k.warmup {
		k.sums.arrivals++
	}
	return nil
}

// enter puts c into the machine that l names, and checks the machine's rules.
func (k *checker) enter(c *Container, l *Line) error {
	m := k.machines[l.Machine]
	if m == nil || m.Host.ID != l.Host && (m.target == nil || m.target.ID != l.Host) {
		return fmt.Errorf("%s goes to machine %q on %q, which is not there", c.ID, clip(l.Machine), clip(l.Host))
	}
	if k.run.Isolation != IsolationShared && m.Project != c.Project {
		return fmt.Errorf("%s of project %q goes to %s of project %q", c.ID, c.Project, m.ID, m.Project)
	}
	if (m.Own || k.run.Isolation == IsolationOwn) && len(m.Containers)+m.leaving > 0 {
		return fmt.Errorf("%s goes to %s, which is another container's own", c.ID, m.ID)
	}
	c.Machine, c.pos, c.queued = m, len(m.Containers), true
	m.Containers = append(m.Containers, c)
	m.Host.entered++
	m.Used = m.Used.add(c.Need)
	if !m.Used.fits(m.Size) {
		return fmt.Errorf("%s is overfull: %s of %s", m.ID, m.Used, m.Size)
	}
	return nil
}

func (k *checker) leave(c *Container) {
	if m := c.Machine; m != nil {
		m.Containers = slices.DeleteFunc(m.Containers, func(o *Container) bool { return o == c })
		m.Used = m.Used.sub(c.Need)
		c.Machine = nil
	}
}

// unmove ends a move: the place it came from is free.
func (k *checker) unmove(c *Container) {
	if m := c.from; m != nil {
		m.leaving--
		m.Used = m.Used.sub(c.Need)
		c.from = nil
	}
}

func (k *checker) start(c *Container) error {
	m := c.Machine
	if m == nil || !m.Up || !m.Host.Up || c.Running || c.from != nil {
		return fmt.Errorf("%s starts, but runs already or has no machine that is up", c.ID)
	}
	c.Running, c.down, c.queued = true, false, false
	if !c.Started {
		c.Started, c.began = true, k.now
		if c.Arrive >= k.warmup {
			k.sums.waits = append(k.sums.waits, k.now-c.Arrive)
		}
	}
	return k.live(m)
}

// live checks that what runs in m fits what m has by now.
func (k *checker) live(m *Machine) error {
	used := m.Used
	for _, c := range m.Containers {
		if c.queued {
			used = used.sub(c.Need)
		}
	}
	if !used.fits(m.Live) {
		return fmt.Errorf("what runs in %s needs %s, but it has %s by now", m.ID, used, m.Live)
	}
	return nil
}

func (k *checker) hostLine(l *Line) error {
	h := k.hosts[l.Host]
	if l.What == "host-on" {
		size := Size{l.CPU, l.Memory}
		if h != nil || l.Host == "" || !slices.ContainsFunc(k.pools, func(p Pool) bool { return p.Size == size }) {
			return fmt.Errorf("host %q is switched on, but is on already or none of the run's", clip(l.Host))
		}
		h = &Host{ID: l.Host, Size: size}
		k.hosts[h.ID] = h
		k.order = append(k.order, h)
		return nil
	}
	if h == nil {
		return fmt.Errorf("%s of host %q, which is off", l.What, clip(l.Host))
	}
	switch l.What {
	case "host-up":
		if h.Up {
			return fmt.Errorf("host %s comes up, but is up already", h.ID)
		}
		h.Up = true
	case "host-off":
		if len(h.Machines) > 0 || h.arriving > 0 {
			return fmt.Errorf("host %s is switched off, but has machines", h.ID)
		}
		k.drop(h)
	case "host-fail":
		k.fail(h)
	}
	return nil
}

func (k *checker) drop(h *Host) {
	delete(k.hosts, h.ID)
	k.order = slices.DeleteFunc(k.order, func(o *Host) bool { return o == h })
	h.Gone, h.Up = true, false
}

func (k *checker) fail(h *Host) {
	for _, m := range h.Machines {
		if m.target != nil {
			m.target.Used = m.target.Used.sub(m.Size)
			m.target.arriving--
		}
		for _, c := range slices.Clone(m.Containers) {
			k.leave(c)
			if c.from != nil && c.from.Host != h {
				continue // a line "move-failed" follows
			}
			k.unmove(c)
			c.lost, c.down, c.Running = true, c.Started, false
		}
		m.Gone = true
		delete(k.machines, m.ID)
	}
	for _, c := range k.containers {
		if c.from != nil && c.from.Host == h {
			k.unmove(c)
			c.down, c.Running = c.Started, false
		}
	}
	k.drop(h)
}

func (k *checker) machineLine(l *Line) error {
	if l.What == "boot" {
		return k.boot(l)
	}
	m := k.machines[l.Machine]
	if m == nil {
		return fmt.Errorf("%s of machine %q, which is not there", l.What, clip(l.Machine))
	}
	to := Size{l.CPU, l.Memory}
	switch l.What {
	case "booted":
		if !m.Host.Up || m.Up {
			return fmt.Errorf("%s has booted, but its host is not up, or it is up already", m.ID)
		}
		m.Up, m.Live = true, m.Size
	case "grow", "shrink":
		if !k.run.Resizable || m.target != nil {
			return fmt.Errorf("%s is resized, but can't be", m.ID)
		}
		m.Host.Used = m.Host.Used.sub(m.Size).add(to)
		m.Size = to
		if m.Live = (Size{min(m.Live.CPU, to.CPU), min(m.Live.Memory, to.Memory)}); !m.Up {
			m.Live = to
		}
		if !m.Used.fits(to) {
			return fmt.Errorf("%s is resized to %s, but uses %s", m.ID, to, m.Used)
		}
		return k.capacity(m.Host)
	case "grown":
		if !to.fits(m.Size) {
			return fmt.Errorf("%s has grown to %s, but was to be %s", m.ID, to, m.Size)
		}
		m.Live = to
	case "stop":
		if len(m.Containers) > 0 || m.leaving > 0 || m.target != nil {
			return fmt.Errorf("%s is stopped, but has containers or migrates", m.ID)
		}
		k.takeFrom(m.Host, m)
		m.Gone = true
		delete(k.machines, m.ID)
	case "migrate":
		h := k.hosts[l.Host]
		if h == nil || !h.Up || !m.Up || m.target != nil {
			return fmt.Errorf("%s migrates to %q, which is not up, or is on its way", m.ID, clip(l.Host))
		}
		m.target = h
		h.arriving++
		h.Used = h.Used.add(m.Size)
		if k.measured() {
			k.sums.migrations++
			k.sums.bytes += m.Size.Memory
		}
		return k.capacity(h)
	case "migrated", "migration-failed":
		h := m.target
		if l.What == "migration-failed" && (h == nil || h.Gone) {
			m.target = nil
			return nil
		}
		if h == nil {
			return fmt.Errorf("%s has migrated, but was not on its way", m.ID)
		}
		k.takeFrom(m.Host, m)
		m.Host, m.target = h, nil
		h.arriving--
		h.Machines = append(h.Machines, m)
		h.entered++
	}
	return nil
}

func (k *checker) takeFrom(h *Host, m *Machine) {
	h.Machines = slices.DeleteFunc(h.Machines, func(o *Machine) bool { return o == m })
	h.Used = h.Used.sub(m.Size)
}

func (k *checker) boot(l *Line) error {
	h := k.hosts[l.Host]
	size := Size{l.CPU, l.Memory}
	if h == nil || l.Machine == "" || k.machines[l.Machine] != nil {
		return fmt.Errorf("machine %q boots on %q, which is off, or exists already", clip(l.Machine), clip(l.Host))
	}
	if size.CPU < 0 || size.Memory < 0 || !k.overhead.fits(size) {
		return errors.New("a machine smaller than its overhead")
	}
	k.seq++
	m := &Machine{ID: l.Machine, Host: h, Project: l.Project, Own: l.Own, Size: size, Live: size, Used: k.overhead, seq: k.seq}
	k.machines[m.ID] = m
	h.Machines = append(h.Machines, m)
	h.Used = h.Used.add(size)
	return k.capacity(h)
}

func (k *checker) capacity(h *Host) error {
	if !h.Used.fits(h.Size) {
		return fmt.Errorf("host %s is overfull: %s of %s", h.ID, h.Used, h.Size)
	}
	return nil
}
