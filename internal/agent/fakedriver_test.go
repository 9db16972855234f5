package agent

import (
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
)

// fakeDriver runs machines that are fakeGuests.
type fakeDriver struct {
	consoleLog          []byte
	console             func(id string) (io.ReadWriteCloser, error)
	w                   *world
	mu                  sync.Mutex
	ms                  map[string]*fakeMachine
	templates           map[string]bool
	watchers            map[chan hypervisor.Event]bool
	bootTime, cloneTime time.Duration
	nextPID             int
	starts              []string
	failStart           error
	room                int            // CPUs that a machine gets at most; 0: any
	deaf                map[string]int // so many guests of a machine that start next never answer
	stubborn            bool           // guests do not power off
	lingers             time.Duration  // Stop returns so much later than the machine ends
}

type fakeMachine struct {
	d     *fakeDriver
	st    hypervisor.Status
	guest *fakeGuest
	rt    *fakeRuntime
	keep  bool // its scratch disk is as it was
}

func (m *fakeMachine) hasDisk(id string) bool {
	m.d.mu.Lock()
	defer m.d.mu.Unlock()
	for _, d := range m.st.Disks {
		if d.ID == id {
			return true
		}
	}
	return false
}

func (d *fakeDriver) Capabilities() hypervisor.Capabilities {
	return hypervisor.Capabilities{Accelerator: "kvm", GrowCPU: true, ShrinkCPU: true, GrowMemory: true, ShrinkMemory: true, HotDisk: true, HotNIC: true,
		Clone: true, Base: hypervisor.Size{CPUs: 1, Memory: 256 << 20}, Max: hypervisor.Size{CPUs: 8, Memory: 8 << 30}, MemoryStep: 2 << 20, MaxDisks: 64, MaxNICs: 2}
}

func (d *fakeDriver) Create(ctx context.Context, s hypervisor.MachineSpec) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.ms[s.ID]; m != nil {
		if m.st.Spec != s {
			return errdefs.ErrAlreadyExists
		}
		return nil
	}
	d.ms[s.ID] = &fakeMachine{d: d, st: hypervisor.Status{Spec: s, State: hypervisor.Stopped}}
	return nil
}

func (d *fakeDriver) Start(ctx context.Context, id string, o hypervisor.StartOptions) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m := d.ms[id]
	if m == nil {
		return errdefs.ErrNotFound
	}
	if d.failStart != nil {
		return d.failStart
	}
	if m.st.State == hypervisor.Running {
		return nil
	}
	took := d.bootTime
	if o.Template != "" {
		if !d.templates[o.Template] {
			return errdefs.ErrNotFound
		}
		took = d.cloneTime
	}
	d.starts = append(d.starts, id+" "+o.Template)
	d.nextPID++
	m.st.State, m.st.PID, m.st.Size, m.st.StartedAt, m.st.Disks, m.st.NICs, m.st.Template = hypervisor.Running, d.nextPID, d.Capabilities().Base, time.Now(), nil, nil, o.Template
	if m.rt == nil {
		m.rt = newFakeRuntime()
		m.rt.w = d.w
	} else {
		m.rt = m.rt.reboot(m.keep)
	}
	g := &fakeGuest{m: m, rt: m.rt, up: make(chan struct{}), dead: make(chan struct{}), id: strconv.Itoa(d.nextPID)}
	m.guest, m.keep = g, true
	if d.deaf[id] > 0 {
		d.deaf[id]--
		return nil
	}
	time.AfterFunc(took, func() { close(g.up) })
	return nil
}

func (d *fakeDriver) end(m *fakeMachine, s hypervisor.State) {
	if m.st.State != hypervisor.Running {
		return
	}
	m.st.State, m.st.PID, m.st.Disks, m.st.NICs = s, 0, nil, nil
	m.guest.die()
	for w := range d.watchers {
		w <- hypervisor.Event{Machine: m.st.Spec.ID, Kind: hypervisor.EventExited}
	}
}

func (d *fakeDriver) crash(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.ms[id]; m != nil {
		d.end(m, hypervisor.Crashed)
	}
}

func (d *fakeDriver) Stop(ctx context.Context, id string, o hypervisor.StopOptions) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	if d.stubborn {
		time.Sleep(o.Grace)
	}
	d.mu.Lock()
	m := d.ms[id]
	if m != nil {
		d.end(m, hypervisor.Stopped)
		m.st.State = hypervisor.Stopped
	}
	d.mu.Unlock()
	if m == nil {
		return errdefs.ErrNotFound
	}
	select {
	case <-time.After(d.lingers):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *fakeDriver) Delete(ctx context.Context, id string) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.ms[id]; m != nil {
		d.end(m, hypervisor.Stopped)
		delete(d.ms, id)
	}
	return nil
}

func (d *fakeDriver) on(id string) (*fakeMachine, error) {
	m := d.ms[id]
	if m == nil {
		return nil, errdefs.ErrNotFound
	}
	if m.st.State != hypervisor.Running {
		return nil, errdefs.ErrFailedPrecondition
	}
	return m, nil
}

func (d *fakeDriver) Resize(ctx context.Context, id string, want hypervisor.Size) (hypervisor.Size, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return hypervisor.Size{}, gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err != nil {
		return hypervisor.Size{}, err
	}
	if d.room > 0 {
		want.CPUs = min(want.CPUs, d.room)
	}
	m.st.Size = want
	return want, nil
}

func (d *fakeDriver) AttachDisk(ctx context.Context, id string, k hypervisor.Disk) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err != nil {
		return err
	}
	if len(k.Serial) > 36 {
		return errdefs.ErrInvalidArgument
	}
	for _, have := range m.st.Disks {
		if have.ID == k.ID {
			return nil
		}
	}
	m.st.Disks = append(m.st.Disks, k)
	return nil
}

func (d *fakeDriver) DetachDisk(ctx context.Context, id, disk string) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err != nil {
		return err
	}
	m.rt.mu.Lock()
	mounted := m.rt.mounts[disk]
	m.rt.mu.Unlock()
	if mounted {
		return fmt.Errorf("disk %s is mounted: %w", disk, errdefs.ErrFailedPrecondition)
	}
	var rest []hypervisor.Disk
	for _, have := range m.st.Disks {
		if have.ID != disk {
			rest = append(rest, have)
		}
	}
	m.st.Disks = rest
	return nil
}

func (d *fakeDriver) AttachNIC(ctx context.Context, id string, n hypervisor.NIC) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err == nil {
		m.st.NICs = append(m.st.NICs, n)
	}
	return err
}

func (d *fakeDriver) DetachNIC(ctx context.Context, id, nic string) error { return nil }

func (d *fakeDriver) Console(ctx context.Context, id string) (io.ReadWriteCloser, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if d.console != nil {
		return d.console(id)
	}
	return nil, errdefs.ErrNotImplemented
}

func (d *fakeDriver) ConsoleLog(ctx context.Context, id string, n int64) ([]byte, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return d.consoleLog[max(0, int64(len(d.consoleLog))-n):], nil
}

func (d *fakeDriver) Channel(ctx context.Context, id string) (net.Conn, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err != nil {
		return nil, err
	}
	return &fakeChannel{g: m.guest}, nil
}

type fakeChannel struct {
	net.Conn
	g *fakeGuest
}

func (*fakeChannel) Close() error { return nil }

func fakeConnect(ctx context.Context, machine string, ch net.Conn) (*GuestLink, error) {
	g := ch.(*fakeChannel).g
	return &GuestLink{Guest: g, Runtime: g.rt, Done: g.dead, Close: func() {}}, nil
}

func (d *fakeDriver) SaveTemplate(ctx context.Context, id, name string) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.on(id)
	if err != nil {
		return err
	}
	if len(m.st.Disks)+len(m.st.NICs) > 0 {
		return errdefs.ErrFailedPrecondition
	}
	m.guest.die()
	delete(d.ms, id)
	d.templates[name] = true
	return nil
}

func (d *fakeDriver) Templates(ctx context.Context) (out []string, err error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for n := range d.templates {
		out = append(out, n)
	}
	return out, nil
}

func (d *fakeDriver) DeleteTemplate(ctx context.Context, name string) error {
	if gerr := d.w.gate(ctx); gerr != nil {
		return gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.templates, name)
	return nil
}

func (d *fakeDriver) List(ctx context.Context) (out []hypervisor.Status, err error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.ms {
		out = append(out, m.st)
	}
	return out, nil
}

func (d *fakeDriver) Inspect(ctx context.Context, id string) (hypervisor.Status, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return hypervisor.Status{}, gerr
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.ms[id]; m != nil {
		return m.st, nil
	}
	return hypervisor.Status{}, errdefs.ErrNotFound
}

func (d *fakeDriver) MemoryUse(ctx context.Context, id string) (int64, error) { return 100 << 20, nil }

func (d *fakeDriver) Watch(ctx context.Context) <-chan hypervisor.Event {
	ch := make(chan hypervisor.Event, 1000)
	d.mu.Lock()
	d.watchers[ch] = true
	d.mu.Unlock()
	context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.watchers, ch)
		close(ch)
	})
	return ch
}

func (d *fakeDriver) Close() error { return nil }
