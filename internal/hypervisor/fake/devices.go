package fake

import (
	"context"
	"fmt"
	"io"
	"net"
	"sort"
	"sync"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
)

// Resize implements hypervisor.Driver.
func (d *Driver) Resize(ctx context.Context, id string, want hypervisor.Size) (hypervisor.Size, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "Resize", id)
	if err != nil {
		return hypervisor.Size{}, err
	}
	if want.CPUs == 0 {
		want.CPUs = m.size.CPUs
	}
	if want.Memory == 0 {
		want.Memory = m.size.Memory
	}
	if s := d.caps.MemoryStep; s > 0 {
		want.Memory = (want.Memory + s - 1) / s * s
	}
	b, c := d.caps.Base, m.spec.Ceiling
	if want.CPUs < b.CPUs || want.Memory < b.Memory || want.CPUs > c.CPUs || want.Memory > c.Memory {
		return m.size, fmt.Errorf("resize machine %s to %+v: not between %+v and %+v: %w", id, want, b, c, errdefs.ErrOutOfRange)
	}
	if m.forTemplate && want != m.size {
		return m.size, fmt.Errorf("a machine that will be a template stays as it is: %w", errdefs.ErrFailedPrecondition)
	}
	if d.opt.Resize != nil {
		want = d.opt.Resize(id, m.size, want)
	}
	m.size = want
	return m.size, nil
}

// AttachDisk implements hypervisor.Driver.
func (d *Driver) AttachDisk(ctx context.Context, id string, want hypervisor.Disk) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "AttachDisk", id)
	if err != nil {
		return err
	}
	if want.ID == "" || len(want.ID) > 64 || len(want.Serial) > 36 {
		return fmt.Errorf("disk %q: bad id or serial: %w", want.ID, errdefs.ErrInvalidArgument)
	}
	if m.forTemplate {
		return fmt.Errorf("a machine that will be a template takes no disks: %w", errdefs.ErrFailedPrecondition)
	}
	for _, have := range m.disks {
		if have == want {
			return nil
		}
		if have.ID == want.ID {
			return fmt.Errorf("disk %s of machine %s: %w", want.ID, id, errdefs.ErrAlreadyExists)
		}
	}
	if !want.ReadOnly {
		for other, o := range d.machines {
			for _, have := range o.disks {
				if have.Path == want.Path && !have.ReadOnly {
					return fmt.Errorf("disk %s is in use by machine %s: %w", want.Path, other, errdefs.ErrFailedPrecondition)
				}
			}
		}
	}
	if len(m.disks) >= d.caps.MaxDisks {
		return fmt.Errorf("machine %s has %d disks already: %w", id, len(m.disks), errdefs.ErrResourceExhausted)
	}
	m.disks = append(m.disks, want)
	return nil
}

// DetachDisk implements hypervisor.Driver.
func (d *Driver) DetachDisk(ctx context.Context, id, disk string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "DetachDisk", id)
	if err != nil {
		return err
	}
	var left []hypervisor.Disk
	for _, have := range m.disks {
		if have.ID != disk {
			left = append(left, have)
		}
	}
	m.disks = left
	return nil
}

// AttachNIC implements hypervisor.Driver.
func (d *Driver) AttachNIC(ctx context.Context, id string, want hypervisor.NIC) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "AttachNIC", id)
	if err != nil {
		return err
	}
	if mac, err := net.ParseMAC(want.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 || want.ID == "" {
		return fmt.Errorf("NIC %q with MAC %q: bad id or MAC: %w", want.ID, want.MAC, errdefs.ErrInvalidArgument)
	}
	if m.forTemplate {
		return fmt.Errorf("a machine that will be a template takes no NICs: %w", errdefs.ErrFailedPrecondition)
	}
	for _, have := range m.nics {
		if have == want {
			return nil
		}
		if have.ID == want.ID {
			return fmt.Errorf("NIC %s of machine %s: %w", want.ID, id, errdefs.ErrAlreadyExists)
		}
	}
	if len(m.nics) >= d.caps.MaxNICs {
		return fmt.Errorf("machine %s has %d NICs already: %w", id, len(m.nics), errdefs.ErrResourceExhausted)
	}
	m.nics = append(m.nics, want)
	return nil
}

// DetachNIC implements hypervisor.Driver.
func (d *Driver) DetachNIC(ctx context.Context, id, nic string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "DetachNIC", id)
	if err != nil {
		return err
	}
	var left []hypervisor.NIC
	for _, have := range m.nics {
		if have.ID != nic {
			left = append(left, have)
		}
	}
	m.nics = left
	return nil
}

// Channel implements hypervisor.Driver.
func (d *Driver) Channel(ctx context.Context, id string) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "Channel", id)
	if err != nil {
		return nil, err
	}
	if m.channel != nil {
		_ = m.channel.Close()
	}
	ours, guest := net.Pipe()
	m.channel = ours
	if d.opt.Serve != nil {
		go d.opt.Serve(id, guest)
	}
	return ours, nil
}

// ConsoleLog implements hypervisor.Driver.
func (d *Driver) ConsoleLog(_ context.Context, id string, n int64) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.find(id)
	if err != nil {
		return nil, err
	}
	n = max(0, min(n, int64(len(m.log))))
	return append([]byte(nil), m.log[int64(len(m.log))-n:]...), nil
}

// Console implements hypervisor.Driver: what is typed is echoed.
func (d *Driver) Console(ctx context.Context, id string) (io.ReadWriteCloser, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "Console", id)
	if err != nil {
		return nil, err
	}
	e := &consoleEnd{d: d, m: m}
	e.cond = sync.NewCond(&e.mu)
	m.consoles[e] = struct{}{}
	return e, nil
}

func (m *machine) print(b []byte) {
	m.log = append(m.log, b...)
	for c := range m.consoles {
		c.mu.Lock()
		c.buf = append(c.buf, b...)
		c.cond.Broadcast()
		c.mu.Unlock()
	}
}

type consoleEnd struct {
	d      *Driver
	m      *machine
	mu     sync.Mutex
	cond   *sync.Cond
	buf    []byte
	closed bool
}

func (e *consoleEnd) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	e.cond.Broadcast()
}

func (e *consoleEnd) Read(p []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for len(e.buf) == 0 {
		if e.closed {
			return 0, io.EOF
		}
		e.cond.Wait()
	}
	n := copy(p, e.buf)
	e.buf = e.buf[n:]
	return n, nil
}

func (e *consoleEnd) Write(p []byte) (int, error) {
	e.mu.Lock()
	closed := e.closed
	e.mu.Unlock()
	if closed {
		return 0, io.ErrClosedPipe
	}
	e.d.mu.Lock()
	defer e.d.mu.Unlock()
	e.m.print(p)
	return len(p), nil
}

func (e *consoleEnd) Close() error {
	e.d.mu.Lock()
	delete(e.m.consoles, e)
	e.d.mu.Unlock()
	e.end()
	return nil
}

// SaveTemplate implements hypervisor.Driver.
func (d *Driver) SaveTemplate(ctx context.Context, id, name string) error {
	d.mu.Lock()
	m, err := d.running(ctx, "SaveTemplate", id)
	if err == nil {
		switch _, there := d.templates[name]; {
		case name == "" || name[0] == '.':
			err = fmt.Errorf("template name %q: %w", name, errdefs.ErrInvalidArgument)
		case there:
			err = fmt.Errorf("template %s: %w", name, errdefs.ErrAlreadyExists)
		case !m.forTemplate:
			err = fmt.Errorf("machine %s was not started for a template: %w", id, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		d.mu.Unlock()
		return err
	}
	d.templates[name] = m.spec
	m.halt(hypervisor.Stopped, "")
	delete(d.machines, id)
	d.mu.Unlock()
	d.publish(hypervisor.Event{Machine: id, Kind: hypervisor.EventExited})
	return nil
}

// Templates implements hypervisor.Driver.
func (d *Driver) Templates(context.Context) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := []string{}
	for n := range d.templates {
		names = append(names, n)
	}
	sort.Strings(names)
	return names, nil
}

// DeleteTemplate implements hypervisor.Driver.
func (d *Driver) DeleteTemplate(ctx context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(ctx, "DeleteTemplate", name); err != nil {
		return err
	}
	delete(d.templates, name)
	return nil
}

// MemoryUse implements hypervisor.Driver: a third of the machine's memory.
func (d *Driver) MemoryUse(ctx context.Context, id string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, err := d.running(ctx, "MemoryUse", id)
	if err != nil {
		return 0, err
	}
	return m.size.Memory / 3, nil
}
