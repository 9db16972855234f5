// Package fake is a hypervisor driver whose machines exist in memory only. It
// passes the same suite as the real one, and fails on request, so that whatever
// stands on the contract can be tested in milliseconds.
//
//	d := fake.New(fake.Options{Serve: func(machine string, c net.Conn) { io.Copy(c, c) }})
//	d.FailNext("Start", errdefs.ErrUnavailable)
//	d.Crash("web", "out of memory")
//	again := d.Reopen() // as if the process had been restarted
//
// Times come from Options.Now; nothing happens by itself and nothing is random.
package fake

import (
	"context"
	"fmt"
	"net"
	"regexp"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/watch"
)

// Options adjust a fake. The zero value is a host like the QEMU driver's.
type Options struct {
	// Capabilities; zero means those of a host with 8 CPUs and 32 GiB.
	Capabilities *hypervisor.Capabilities
	// Serve is the guest's side of a machine's channel; it is called in a
	// goroutine of its own for each connection, which it owns. nil: nobody answers.
	Serve func(machine string, conn net.Conn)
	// Resize says what a guest makes of a wish; nil: it obeys.
	Resize func(machine string, now, want hypervisor.Size) hypervisor.Size
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Driver is the fake. Make it with New.
type Driver struct {
	*host
	events watch.Hub
	closed bool // under host.mu
}

var _ hypervisor.Driver = (*Driver)(nil)

// host is what survives a restart of the driver.
type host struct {
	opt       Options
	caps      hypervisor.Capabilities
	mu        sync.Mutex
	machines  map[string]*machine
	templates map[string]hypervisor.MachineSpec
	fail      map[string][]error
	calls     []string
	pid       int
	driver    *Driver // the present one
}

type machine struct {
	spec        hypervisor.MachineSpec
	state       hypervisor.State
	size        hypervisor.Size
	pid         int
	started     time.Time
	template    string
	forTemplate bool
	disks       []hypervisor.Disk
	nics        []hypervisor.NIC
	message     string
	log         []byte
	channel     net.Conn
	consoles    map[*consoleEnd]struct{}
}

// New makes a fake host and its driver.
func New(o Options) *Driver {
	if o.Now == nil {
		o.Now = time.Now
	}
	h := &host{opt: o, machines: map[string]*machine{}, templates: map[string]hypervisor.MachineSpec{}, fail: map[string][]error{}, pid: 1000}
	h.caps = hypervisor.Capabilities{
		Accelerator: "fake", GrowCPU: true, ShrinkCPU: true, GrowMemory: true, ShrinkMemory: true,
		HotDisk: true, HotNIC: true, Clone: true,
		Base:       hypervisor.Size{CPUs: 1, Memory: 256 << 20},
		Max:        hypervisor.Size{CPUs: 8, Memory: 32 << 30},
		MemoryStep: 4 << 20, MaxDisks: 1024, MaxNICs: 4,
	}
	if o.Capabilities != nil {
		h.caps = *o.Capabilities
	}
	h.driver = &Driver{host: h}
	return h.driver
}

// Reopen closes the driver and returns another of the same host: what a restart
// of the process does.
func (d *Driver) Reopen() *Driver {
	_ = d.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.host.driver = &Driver{host: d.host}
	return d.host.driver
}

// FailNext makes the next call of a method ("Start", "AttachDisk", ...) fail
// with err and do nothing. Several are used up in order.
func (d *Driver) FailNext(method string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail[method] = append(d.fail[method], err)
}

// Calls are the calls that changed or tried to change something, as "Method id".
func (d *Driver) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.calls...)
}

// Crash ends a running machine as if its VMM had died.
func (d *Driver) Crash(id, message string) {
	d.end(id, hypervisor.Crashed, message)
}

// PowerOff ends a running machine as if its guest had shut down.
func (d *Driver) PowerOff(id string) {
	d.end(id, hypervisor.Stopped, "the guest powered itself off")
}

// Panic ends a running machine by a panic of its guest's kernel.
func (d *Driver) Panic(id string) {
	d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventPanic, Message: "guest kernel panic"})
	d.end(id, hypervisor.Crashed, "guest kernel panic")
}

// Print lets a guest write to its console.
func (d *Driver) Print(id, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[id]; m != nil {
		m.print([]byte(text))
	}
}

func (d *Driver) end(id string, s hypervisor.State, message string) {
	d.mu.Lock()
	m := d.machines[id]
	if m == nil || m.state != hypervisor.Running {
		d.mu.Unlock()
		return
	}
	m.halt(s, message)
	d.mu.Unlock()
	d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventExited, Message: message})
}

func (d *Driver) publish(e hypervisor.Event) {
	d.mu.Lock()
	now := d.host.driver
	d.mu.Unlock()
	now.events.Publish(e)
}

func (m *machine) halt(s hypervisor.State, message string) {
	m.state, m.message = s, message
	m.size, m.pid, m.template, m.forTemplate = hypervisor.Size{}, 0, "", false
	m.disks, m.nics = nil, nil
	m.hangUp()
}

func (m *machine) hangUp() {
	if m.channel != nil {
		_ = m.channel.Close()
		m.channel = nil
	}
	for c := range m.consoles {
		c.end()
	}
	m.consoles = map[*consoleEnd]struct{}{}
}

// begin is the start of each call that changes something: faults are injected here.
func (d *Driver) begin(ctx context.Context, method, id string) error {
	d.calls = append(d.calls, method+" "+id)
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.closed {
		return fmt.Errorf("driver is closed: %w", errdefs.ErrFailedPrecondition)
	}
	if q := d.fail[method]; len(q) > 0 {
		d.fail[method] = q[1:]
		return q[0]
	}
	return nil
}

func (d *Driver) find(id string) (*machine, error) {
	if m := d.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %q: %w", id, errdefs.ErrNotFound)
}

// running begins a call on a running machine. The caller holds mu.
func (d *Driver) running(ctx context.Context, method, id string) (*machine, error) {
	if err := d.begin(ctx, method, id); err != nil {
		return nil, err
	}
	m, err := d.find(id)
	if err != nil {
		return nil, err
	}
	if m.state != hypervisor.Running {
		return nil, fmt.Errorf("machine %s does not run: %w", id, errdefs.ErrFailedPrecondition)
	}
	return m, nil
}

// Capabilities implements hypervisor.Driver.
func (d *Driver) Capabilities() hypervisor.Capabilities { return d.caps }

var validID = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// Create implements hypervisor.Driver.
func (d *Driver) Create(ctx context.Context, spec hypervisor.MachineSpec) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(ctx, "Create", spec.ID); err != nil {
		return err
	}
	if spec.Ceiling.CPUs == 0 {
		spec.Ceiling.CPUs = d.caps.Max.CPUs
	}
	if spec.Ceiling.Memory == 0 {
		spec.Ceiling.Memory = d.caps.Max.Memory
	}
	c := spec.Ceiling
	if !validID.MatchString(spec.ID) || c.CPUs < d.caps.Base.CPUs || c.CPUs > d.caps.Max.CPUs || c.Memory < d.caps.Base.Memory || c.Memory > d.caps.Max.Memory {
		return fmt.Errorf("machine %q: bad id or ceiling: %w", spec.ID, errdefs.ErrInvalidArgument)
	}
	if m := d.machines[spec.ID]; m != nil {
		if m.spec != spec {
			return fmt.Errorf("machine %s exists with another specification: %w", spec.ID, errdefs.ErrAlreadyExists)
		}
		return nil
	}
	d.machines[spec.ID] = &machine{spec: spec, state: hypervisor.Stopped, consoles: map[*consoleEnd]struct{}{}}
	return nil
}

// Start implements hypervisor.Driver.
func (d *Driver) Start(ctx context.Context, id string, o hypervisor.StartOptions) error {
	started, err := d.start(ctx, id, o)
	if err == nil && started {
		d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventStarted})
	}
	return err
}

func (d *Driver) start(ctx context.Context, id string, o hypervisor.StartOptions) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(ctx, "Start", id); err != nil {
		return false, err
	}
	m, err := d.find(id)
	if err != nil {
		return false, err
	}
	if o.Template != "" && o.ForTemplate {
		return false, fmt.Errorf("a clone can't become a template: %w", errdefs.ErrInvalidArgument)
	}
	if m.state == hypervisor.Running {
		return false, nil
	}
	if o.Template != "" {
		t, ok := d.templates[o.Template]
		if !ok {
			return false, fmt.Errorf("template %s: %w", o.Template, errdefs.ErrNotFound)
		}
		if t.Ceiling != m.spec.Ceiling || t.GuestVersion != m.spec.GuestVersion || t.Cmdline != m.spec.Cmdline {
			return false, fmt.Errorf("template %s is of another machine: %w", o.Template, errdefs.ErrFailedPrecondition)
		}
	}
	d.pid++
	m.state, m.size, m.pid, m.started = hypervisor.Running, d.caps.Base, d.pid, d.opt.Now()
	m.template, m.forTemplate, m.message = o.Template, o.ForTemplate, ""
	m.print([]byte("fake guest of " + id + " started\n"))
	return true, nil
}

// Stop implements hypervisor.Driver. The grace period is never needed here.
func (d *Driver) Stop(ctx context.Context, id string, _ hypervisor.StopOptions) error {
	d.mu.Lock()
	if err := d.begin(ctx, "Stop", id); err != nil {
		d.mu.Unlock()
		return err
	}
	m, err := d.find(id)
	if err != nil {
		d.mu.Unlock()
		return err
	}
	ran := m.state == hypervisor.Running
	m.halt(hypervisor.Stopped, "")
	d.mu.Unlock()
	if ran {
		d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventExited})
	}
	return nil
}

// Delete implements hypervisor.Driver.
func (d *Driver) Delete(ctx context.Context, id string) error {
	d.mu.Lock()
	if err := d.begin(ctx, "Delete", id); err != nil {
		d.mu.Unlock()
		return err
	}
	m := d.machines[id]
	if m == nil {
		d.mu.Unlock()
		return nil
	}
	ran := m.state == hypervisor.Running
	m.halt(hypervisor.Stopped, "")
	delete(d.machines, id)
	d.mu.Unlock()
	if ran {
		d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventExited})
	}
	return nil
}

// List implements hypervisor.Driver.
func (d *Driver) List(context.Context) ([]hypervisor.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]hypervisor.Status, 0, len(d.machines))
	for _, m := range d.machines {
		out = append(out, d.status(m))
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Spec.ID < out[j].Spec.ID })
	return out, nil
}

// Inspect implements hypervisor.Driver.
func (d *Driver) Inspect(_ context.Context, id string) (hypervisor.Status, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.find(id)
	if err != nil {
		return hypervisor.Status{}, err
	}
	return d.status(m), nil
}

func (d *Driver) status(m *machine) hypervisor.Status {
	st := hypervisor.Status{Spec: m.spec, State: m.state, Message: m.message}
	if m.state != hypervisor.Running {
		return st
	}
	st.Size, st.PID, st.StartedAt, st.Template = m.size, m.pid, m.started, m.template
	st.Accelerator = d.caps.Accelerator
	st.Disks = append(st.Disks, m.disks...)
	st.NICs = append(st.NICs, m.nics...)
	return st
}

// Watch implements hypervisor.Driver.
func (d *Driver) Watch(ctx context.Context) <-chan hypervisor.Event { return d.events.Watch(ctx) }

// Close implements hypervisor.Driver.
func (d *Driver) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	for _, m := range d.machines {
		m.hangUp()
	}
	d.events.Close()
	return nil
}
