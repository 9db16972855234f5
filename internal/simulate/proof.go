package simulate

// proof is where what was on a host would go if the host were lost: so much of the
// free part of other hosts, so much of the free part of running machines. It names
// room, not who goes there, so it holds when someone leaves the host, and whenever
// the room is there; it ends when a container or a machine comes to the host.
type proof struct {
	made     bool
	entered  uint64 // Host.entered when it was made
	hosts    []hostRoom
	machines []machineRoom // need may be nothing: the machine grows by what comes
}

type hostRoom struct {
	host *Host
	need Size
}

type machineRoom struct {
	machine *Machine
	host    *Host
	need    Size
}

// clear begins a new proof for h.
func (p *proof) clear(h *Host) {
	p.reset()
	p.made, p.entered = true, h.entered
}

// reset begins another attempt.
func (p *proof) reset() {
	p.hosts, p.machines = p.hosts[:0], p.machines[:0]
}

// on takes room of a host.
func (p *proof) on(h *Host, need Size) {
	for i := range p.hosts {
		if p.hosts[i].host == h {
			p.hosts[i].need = p.hosts[i].need.add(need)
			return
		}
	}
	p.hosts = append(p.hosts, hostRoom{h, need})
}

// in takes a free slot of a running machine.
func (p *proof) in(m *Machine, need Size) {
	for i := range p.machines {
		if p.machines[i].machine == m {
			p.machines[i].need = p.machines[i].need.add(need)
			return
		}
	}
	p.machines = append(p.machines, machineRoom{m, m.Host, need})
}

// by has a running machine grow on its host.
func (p *proof) by(m *Machine, need Size) {
	p.on(m.Host, need)
	p.in(m, Size{})
}

// holds reads the proof for h again: whether all the room it speaks of is there.
func (p *proof) holds(h *Host) bool {
	if !p.made || p.entered != h.entered {
		return false
	}
	for i := range p.hosts {
		if r := &p.hosts[i]; !r.host.Up || !r.need.fits(r.host.Free()) {
			return false
		}
	}
	for i := range p.machines {
		r := &p.machines[i]
		m := r.machine
		if !m.Up || m.Gone || m.target != nil || m.Host != r.host || r.need != (Size{}) && !r.need.fits(m.slot()) {
			return false
		}
	}
	return true
}

// slot is what may start in m at once.
func (m *Machine) slot() Size {
	free := m.Free()
	return Size{min(free.CPU, m.Live.CPU-m.Used.CPU), min(free.Memory, m.Live.Memory-m.Used.Memory)}
}
