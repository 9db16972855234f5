package simulate

// Place gives a container that is nowhere a machine. It starts at once if the
// machine is up and as large as it is to be, else as soon as it is.
func (w *World) Place(c *Container, m *Machine) {
	w.must(c.Machine == nil && !c.Done, "container %s is placed in %s, but is placed or done already", c.ID, m.ID)
	w.enter(c, m)
	w.log.line(Line{What: "place", Container: c.ID, Machine: m.ID, Host: m.Host.ID, CPU: c.Need.CPU, Memory: c.Need.Memory})
	w.tryStart(c)
}

func (w *World) enter(c *Container, m *Machine) {
	w.must(!m.Gone, "container %s goes to machine %s, which is gone", c.ID, m.ID)
	w.must(m.Project == w.Group(c), "container %s of project %q goes to machine %s of project %q", c.ID, c.Project, m.ID, m.Project)
	w.must(!(m.Own || w.Isolation == IsolationOwn) || len(m.Containers)+m.leaving == 0, "container %s goes to machine %s, which is another container's own", c.ID, m.ID)
	w.must(c.Need.fits(m.Free()), "container %s needs %s, but machine %s has %s left", c.ID, c.Need, m.ID, m.Free())
	c.Machine, c.pos = m, len(m.Containers)
	m.Containers = append(m.Containers, c)
	m.Host.entered++
	m.Used = m.Used.add(c.Need)
}

func (w *World) leave(c *Container) {
	m := c.Machine
	w.unqueue(c)
	last := len(m.Containers) - 1
	m.Containers[c.pos] = m.Containers[last]
	m.Containers[c.pos].pos = c.pos
	m.Containers[last] = nil
	m.Containers = m.Containers[:last]
	m.Used = m.Used.sub(c.Need)
	c.Machine = nil
}

// release frees the place from which a container moves away.
func (w *World) release(c *Container) {
	if m := c.from; m != nil {
		c.from = nil
		m.leaving--
		m.Used = m.Used.sub(c.Need)
	}
}

// tryStart starts a container if its machine is ready for it, or queues it there.
func (w *World) tryStart(c *Container) {
	m := c.Machine
	if w.ready(c) {
		w.start(c)
		return
	}
	c.queued = true
	m.waiting = append(m.waiting, c)
	m.pending = m.pending.add(c.Need)
}

// ready says whether c's machine is up, and has room by now for c beside what runs
// in it. c itself is not queued.
func (w *World) ready(c *Container) bool {
	m := c.Machine
	return m.Up && m.Used.sub(m.pending).fits(m.Live)
}

// unqueue forgets that c waits in its machine.
func (w *World) unqueue(c *Container) {
	if c.queued {
		c.queued = false
		c.Machine.pending = c.Machine.pending.sub(c.Need)
	}
}

func (w *World) start(c *Container) {
	moved := c.from != nil
	w.release(c)
	if moved {
		w.log.line(Line{What: "moved", Container: c.ID, Machine: c.Machine.ID, Host: c.Machine.Host.ID})
		return
	}
	c.Running = true
	w.log.line(Line{What: "start", Container: c.ID, Machine: c.Machine.ID, Host: c.Machine.Host.ID})
	if c.down {
		c.down = false
		w.meter.down(c, -1)
	}
	if !c.Started {
		c.Started = true
		w.waiting--
		w.meter.started(c, w.now)
		if !c.stays() {
			w.events.push(event{at: w.now + c.Life, kind: evDepart, container: c})
		}
	}
}

// startWaiting starts what waits in m and fits by now, in the order of placing.
func (w *World) startWaiting(m *Machine) {
	queue := m.waiting
	m.waiting = nil
	for _, c := range queue {
		if c.Machine != m || !c.queued {
			continue // it left meanwhile
		}
		w.unqueue(c)
		w.tryStart(c)
	}
}

// Move brings a container to another machine: it starts there, and then leaves
// where it was; until then it counts in both.
func (w *World) Move(c *Container, to *Machine) {
	w.must(c.Machine != nil && c.Machine != to && c.from == nil && !c.Done, "container %s moves to %s, but is nowhere, there already or on its way", c.ID, to.ID)
	from := c.Machine
	w.must(c.Running, "container %s moves to %s before it has started", c.ID, to.ID)
	w.leave(c)
	from.Used = from.Used.add(c.Need)
	from.leaving++
	c.from = from
	w.enter(c, to)
	w.meter.move(w.now)
	w.log.line(Line{What: "move", Container: c.ID, From: from.ID, Machine: to.ID, Host: to.Host.ID, CPU: c.Need.CPU, Memory: c.Need.Memory})
	w.tryStart(c)
}

// Migrate moves a running machine to another host, with all that runs in it; it
// counts on both until its memory is copied.
func (w *World) Migrate(m *Machine, to *Host) {
	w.must(m.Up && m.target == nil && m.Host != to, "machine %s migrates to %s, but is not up, there already or on its way", m.ID, to.ID)
	w.must(to.Up && m.Size.fits(to.Free()), "machine %s of %s migrates to %s, which has %s left", m.ID, m.Size, to.ID, to.Free())
	w.must(m.Live == m.Size, "machine %s migrates while it grows", m.ID)
	to.Used = to.Used.add(m.Size)
	to.arriving++
	m.target = to
	w.meter.migration(w.now, m.Size.Memory)
	w.log.line(Line{What: "migrate", Machine: m.ID, From: m.Host.ID, Host: to.ID, CPU: m.Size.CPU, Memory: m.Size.Memory})
	w.events.push(event{at: w.now + Time(m.Size.Memory*1000/w.migrateRate), kind: evMigrated, machine: m})
}

func (w *World) migrated(m *Machine) {
	from, to := m.Host, m.target
	last := len(from.Machines) - 1
	from.Machines[m.pos] = from.Machines[last]
	from.Machines[m.pos].pos = m.pos
	from.Machines = from.Machines[:last]
	from.Used = from.Used.sub(m.Size)
	m.Host, m.target, m.pos = to, nil, len(to.Machines)
	to.Machines = append(to.Machines, m)
	to.entered++
	to.arriving--
	w.log.line(Line{What: "migrated", Machine: m.ID, From: from.ID, Host: to.ID})
}

// Refuse says that a container will never run.
func (w *World) Refuse(c *Container, why string) {
	w.must(c.Machine == nil && !c.Done, "container %s is refused, but is placed or done", c.ID)
	c.Done = true
	if !c.Started {
		w.waiting--
	}
	w.log.line(Line{What: "refuse", Container: c.ID, Why: why})
}

// Evict stops a container that gives way to others; it wants a place again.
func (w *World) Evict(c *Container) {
	w.must(c.Machine != nil && c.from == nil && !c.Done, "container %s is evicted, but is nowhere or on its way", c.ID)
	m := c.Machine
	w.leave(c)
	w.stopped(c)
	w.log.line(Line{What: "evict", Container: c.ID, Machine: m.ID, Host: m.Host.ID})
}

// Wake asks for an event Tick at a time; only the earliest is kept, and a policy
// asks again at each.
func (w *World) Wake(at Time) {
	at = max(at, w.now+1)
	if w.wake >= 0 && w.wake <= at {
		return
	}
	w.wake = at
	w.events.push(event{at: at, kind: evTick})
}

// depart takes a container away whose life is over, also while it moves.
func (w *World) depart(c *Container) *Machine {
	m := c.Machine
	w.log.line(Line{What: "depart", Container: c.ID})
	c.Done, c.Running = true, false
	w.release(c)
	if m != nil {
		w.leave(c)
	}
	return m
}

// fail takes a host away with all that runs there.
func (w *World) fail(h *Host) (machines []*Machine, containers []*Container) {
	w.log.line(Line{What: "host-fail", Host: h.ID})
	for _, o := range w.hosts { // migrations under way end with either side
		for _, m := range o.Machines {
			if m.target == h {
				m.target = nil
				w.log.line(Line{What: "migration-failed", Machine: m.ID, From: o.ID, Host: h.ID})
			}
		}
	}
	for len(h.Machines) > 0 {
		m := h.Machines[0]
		if t := m.target; t != nil {
			t.Used = t.Used.sub(m.Size)
			t.arriving--
			m.target = nil
		}
		for _, c := range append([]*Container(nil), m.Containers...) {
			w.leave(c)
			if from := c.from; from != nil && from.Host != h { // it still runs where it came from
				w.release(c)
				c.Machine, c.pos = from, len(from.Containers)
				from.Containers = append(from.Containers, c)
				from.Host.entered++
				from.Used = from.Used.add(c.Need)
				w.log.line(Line{What: "move-failed", Container: c.ID, Machine: from.ID, Host: from.Host.ID})
				continue
			}
			w.release(c)
			w.stopped(c)
			c.lostFrom = m
			containers = append(containers, c)
			w.log.line(Line{What: "lost", Container: c.ID, Machine: m.ID, Host: h.ID})
		}
		w.removeMachine(m)
		machines = append(machines, m)
	}
	w.lostMovers(h)
	w.removeHost(h)
	return machines, containers
}

// stopped notes that a container does not run any more though its life goes on.
func (w *World) stopped(c *Container) {
	if c.Running {
		c.Running, c.down = false, true
		w.meter.down(c, 1)
	}
}

// lostMovers finds containers that were leaving a machine of h: they ran there,
// and start anew where they were going.
func (w *World) lostMovers(h *Host) {
	for _, o := range w.hosts {
		for _, m := range o.Machines {
			for _, c := range m.Containers {
				if c.from != nil && c.from.Host == h {
					w.release(c)
					w.stopped(c)
				}
			}
		}
	}
}
