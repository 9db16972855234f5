package simulate

import (
	"fmt"
	"slices"
)

// Host is a server that is switched on, or coming up.
type Host struct {
	ID       string
	Zone     string
	Size     Size
	Used     Size // sizes of its machines, and of those that are on their way here
	Machines []*Machine
	Up       bool // false: still starting
	Gone     bool // switched off or failed
	pool     int
	number   int    // in its pool
	pos      int    // in World.hosts
	arriving int    // machines on their way here
	entered  uint64 // how often a container, or a machine with some, came here
	proof    proof  // of survival without it
}

// Free is what no machine has.
func (h *Host) Free() Size { return h.Size.sub(h.Used) }

// Machine is a VM. Its size includes the overhead.
type Machine struct {
	ID         string
	Host       *Host
	Project    string // of its containers; "" with isolation shared
	Own        bool   // for a single container
	Size       Size   // reserved on its host
	Live       Size   // what it has already; less than Size while it grows
	Used       Size   // overhead and containers, also those still waiting to start in it
	Containers []*Container
	Up         bool
	Gone       bool
	booting    bool
	target     *Host // it is migrating there
	pos        int   // in Host.Machines
	seq        int   // the how manieth that booted
	waiting    []*Container
	pending    Size // needs of what waits
	leaving    int  // containers that start elsewhere before they stop here
}

// Free is what its containers leave.
func (m *Machine) Free() Size { return m.Size.sub(m.Used) }

// Container is a request under way.
type Container struct {
	*Request
	Machine  *Machine // where it runs or will start
	Running  bool
	Started  bool // it ran once; its life counts from then
	Done     bool // left, or refused
	from     *Machine
	down     bool     // ran, was lost with its host, and does not run again yet
	lostFrom *Machine // it was in, when the host failed
	lost     bool     // its host failed (when checking a transcript)
	began    Time     // first start (when checking a transcript)
	queued   bool     // waits for Machine to be ready
	pos      int
}

// Group is whom a container shares a machine with, as a machine's Project: its
// project, or "" when all share.
func (w *World) Group(c *Container) string {
	if w.Isolation == IsolationShared {
		return ""
	}
	return c.Project
}

// Isolations of all containers of a run.
const (
	IsolationProject = "project"
	IsolationShared  = "shared"
	IsolationOwn     = "own"
)

// World is the truth of a simulation: what a policy sees and acts upon. Methods
// that change something panic when a rule is broken; Run turns that into an error
// that names policy, rule and time.
type World struct {
	Overhead  Size // of each machine, taken from its size
	Isolation string
	// Resizable says that machines can grow while they run.
	Resizable bool

	boot, grow, hostBoot Time
	migrateRate          int64 // bytes a second

	now      Time
	hosts    []*Host // switched on, in the order of that
	pools    []poolState
	nMachine int
	events   queue
	wake     Time // of the pending tick; -1: none
	meter    *meter
	log      *transcript
	waiting  int // containers that have arrived and not started yet
}

// poolState is a pool with the numbers of its hosts that are off.
type poolState struct {
	Pool
	off  []int // switched off again, ascending
	next int   // never switched on yet; from 1
}

// peek lists up to n hosts of the pool that are off, the lowest numbers first.
func (p *poolState) peek(n int) []int {
	list := slices.Clone(p.off[:min(n, len(p.off))])
	for k := p.next; len(list) < n && (p.Count == 0 || k <= p.Count); k++ {
		list = append(list, k)
	}
	return list
}

func (p *poolState) take(number int) bool {
	if i, ok := slices.BinarySearch(p.off, number); ok {
		p.off = slices.Delete(p.off, i, i+1)
		return true
	}
	if number < p.next || p.Count > 0 && number > p.Count {
		return false
	}
	for ; p.next < number; p.next++ {
		p.off = append(p.off, p.next)
	}
	p.next++
	return true
}

// hostID names the n-th host of pool i.
func (w *World) hostID(i, n int) string {
	switch {
	case w.pools[i].ID != "":
		return w.pools[i].ID
	case i == 0:
		return fmt.Sprintf("h-%04d", n)
	}
	return fmt.Sprintf("h%d-%04d", i+1, n)
}

// Offer is a host that is off and can be switched on.
type Offer struct {
	ID, Zone string
	Size     Size

	pool, number int
}

// Offers lists hosts that are off: up to n of each pool.
func (w *World) Offers(n int) []Offer {
	var list []Offer
	for i := range w.pools {
		p := &w.pools[i]
		for _, k := range p.peek(n) {
			list = append(list, Offer{ID: w.hostID(i, k), Zone: p.Zone, Size: p.Size, pool: i, number: k})
		}
	}
	return list
}

// broken is a rule that a policy broke.
type broken struct{ err error }

func (w *World) must(ok bool, format string, a ...any) {
	if !ok {
		panic(broken{fmt.Errorf("at %.3f s: "+format, append([]any{w.now.Seconds()}, a...)...)})
	}
}

// Now is the simulated time.
func (w *World) Now() Time { return w.now }

// Measuring says whether the warm-up is over.
func (w *World) Measuring() bool { return w.now >= w.meter.warmup }

// Hosts are those switched on, in the order of that. The caller must not change
// the list, nor keep it beyond its next act.
func (w *World) Hosts() []*Host { return w.hosts }

// Largest is the largest size of CPU and of memory that one host has.
func (w *World) Largest() Size {
	var s Size
	for _, p := range w.pools {
		s = s.max(p.Size)
	}
	return s
}

// CanEver says whether some host could hold a machine for c alone.
func (w *World) CanEver(c *Container) bool {
	for _, p := range w.pools {
		if c.Need.add(w.Overhead).fits(p.Size) {
			return true
		}
	}
	return false
}

// PowerOn switches on a host with room for a machine of that size, or nil when
// there is none left: the first that fits in the order of the pools.
func (w *World) PowerOn(size Size) *Host {
	for _, o := range w.Offers(1) {
		if size.fits(o.Size) {
			return w.Accept(o)
		}
	}
	return nil
}

// Accept switches on a host that was offered.
func (w *World) Accept(o Offer) *Host {
	w.must(o.pool < len(w.pools) && w.pools[o.pool].take(o.number), "host %s is switched on, but is on already or gone", o.ID)
	h := &Host{ID: o.ID, Zone: o.Zone, Size: o.Size, pool: o.pool, number: o.number, pos: len(w.hosts)}
	w.hosts = append(w.hosts, h)
	w.meter.hosts++
	w.log.line(Line{What: "host-on", Host: h.ID, CPU: h.Size.CPU, Memory: h.Size.Memory})
	if w.hostBoot == 0 {
		h.Up = true
		w.log.line(Line{What: "host-up", Host: h.ID})
	} else {
		w.events.push(event{at: w.now + w.hostBoot, kind: evHostUp, host: h})
	}
	return h
}

// PowerOff switches off a host without machines.
func (w *World) PowerOff(h *Host) {
	w.must(!h.Gone && len(h.Machines) == 0 && h.arriving == 0, "host %s is switched off, but has machines or is off already", h.ID)
	p := &w.pools[h.pool]
	i, _ := slices.BinarySearch(p.off, h.number)
	p.off = slices.Insert(p.off, i, h.number)
	w.removeHost(h)
	w.log.line(Line{What: "host-off", Host: h.ID})
}

func (w *World) removeHost(h *Host) {
	h.Gone, h.Up = true, false
	copy(w.hosts[h.pos:], w.hosts[h.pos+1:])
	w.hosts = w.hosts[:len(w.hosts)-1]
	for i := h.pos; i < len(w.hosts); i++ {
		w.hosts[i].pos = i
	}
	w.meter.hosts--
}

// Boot starts a machine of a size for a group of containers (see Group) on a
// host; own makes it one for a single container. It is ready after the boot time,
// and after its host is.
func (w *World) Boot(h *Host, group string, own bool, size Size) *Machine {
	w.must(!h.Gone, "a machine boots on host %s, which is gone", h.ID)
	w.must(size.fits(h.Free()), "a machine of %s boots on host %s, which has %s left", size, h.ID, h.Free())
	w.must(w.Overhead.fits(size), "a machine of %s boots on host %s: less than its overhead", size, h.ID)
	w.nMachine++
	m := &Machine{ID: fmt.Sprintf("m-%d", w.nMachine), Host: h, Project: group, Own: own, Size: size, Live: size, Used: w.Overhead, pos: len(h.Machines), seq: w.nMachine}
	h.Machines = append(h.Machines, m)
	h.Used = h.Used.add(size)
	w.meter.machines++
	w.log.line(Line{What: "boot", Machine: m.ID, Host: h.ID, Project: group, Own: own, CPU: size.CPU, Memory: size.Memory})
	if h.Up {
		w.startBoot(m)
	}
	return m
}

func (w *World) startBoot(m *Machine) {
	m.booting = true
	w.events.push(event{at: w.now + w.boot, kind: evBooted, machine: m})
}

// Stop stops a machine without containers; its place is free at once.
func (w *World) Stop(m *Machine) {
	w.must(!m.Gone && len(m.Containers) == 0 && m.leaving == 0, "machine %s is stopped, but has containers or is gone", m.ID)
	w.must(m.target == nil, "machine %s is stopped while it migrates", m.ID)
	w.removeMachine(m)
	w.log.line(Line{What: "stop", Machine: m.ID, Host: m.Host.ID})
}

func (w *World) removeMachine(m *Machine) {
	h := m.Host
	m.Gone, m.Up = true, false
	last := len(h.Machines) - 1
	h.Machines[m.pos] = h.Machines[last]
	h.Machines[m.pos].pos = m.pos
	h.Machines = h.Machines[:last]
	h.Used = h.Used.sub(m.Size)
	w.meter.machines--
}

// Resize makes a machine larger (the new part is there after the grow time) or
// smaller (at once).
func (w *World) Resize(m *Machine, to Size) {
	w.must(w.Resizable, "machine %s is resized, but machines can't be", m.ID)
	w.must(!m.Gone && m.target == nil, "machine %s is resized while it is gone or migrates", m.ID)
	w.must(m.Used.fits(to), "machine %s shrinks to %s, but uses %s", m.ID, to, m.Used)
	grown := to.sub(m.Size)
	w.must(grown.max(Size{}).fits(m.Host.Free().max(Size{})), "machine %s grows by %s, but host %s has %s left", m.ID, grown, m.Host.ID, m.Host.Free())
	if to == m.Size {
		return
	}
	what := "shrink"
	if grown.CPU > 0 || grown.Memory > 0 {
		what = "grow"
	}
	m.Host.Used = m.Host.Used.add(grown)
	m.Size = to
	w.log.line(Line{What: what, Machine: m.ID, Host: m.Host.ID, CPU: to.CPU, Memory: to.Memory})
	switch {
	case what == "shrink":
		m.Live = Size{min(m.Live.CPU, to.CPU), min(m.Live.Memory, to.Memory)}
	case !m.Up:
		m.Live = to // it starts in that size
	default:
		m.Live = Size{min(m.Live.CPU, to.CPU), min(m.Live.Memory, to.Memory)}
		w.events.push(event{at: w.now + w.grow, kind: evGrown, machine: m, size: to})
	}
}
