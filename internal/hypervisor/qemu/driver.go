package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/watch"
)

// Driver runs machines as QEMU processes. Make it with New.
type Driver struct {
	opt    Options
	host   host
	log    *slog.Logger
	groups *cgroups // nil when this host has none
	lock   *os.File
	events watch.Hub
	starts chan struct{} // bounds how many machines start at once

	mu       sync.Mutex
	machines map[string]*machine
	uids     map[uint32]string // uid -> machine that runs as it

	tmu       sync.Mutex
	templates map[string]*sealed // loaded into memory

	closed  chan struct{}
	closing sync.Once
	wg      sync.WaitGroup // supervisors
}

var _ hypervisor.Driver = (*Driver)(nil)

// New makes a driver, adopts the machines that an earlier one of the same
// StateDir left running, and cleans up what one that was killed left half done.
// A StateDir has one driver at a time: a second one fails with
// FailedPrecondition.
func New(ctx context.Context, o Options) (*Driver, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	for _, dir := range []string{"machines", "templates"} {
		if err := os.MkdirAll(filepath.Join(o.StateDir, dir), 0o700); err != nil {
			return nil, fmt.Errorf("qemu driver: state directory: %w", err)
		}
	}
	if err := os.MkdirAll(o.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("qemu driver: run directory: %w", err)
	}
	lock, err := lockDir(ctx, o.StateDir)
	if err != nil {
		return nil, err
	}
	h, err := o.inspect(ctx)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	d := &Driver{
		opt: o, host: h, log: o.Logger, lock: lock,
		starts:    make(chan struct{}, max(2, runtime.NumCPU())),
		machines:  map[string]*machine{},
		uids:      map[uint32]string{},
		templates: map[string]*sealed{},
		closed:    make(chan struct{}),
	}
	d.groups, err = findCgroups(o.CgroupParent)
	if err != nil {
		_ = lock.Close()
		return nil, err
	}
	if d.groups.none() || os.Geteuid() != 0 {
		d.log.Warn("no control groups: machines run without limits of their own")
		d.groups = nil
	}
	if err := d.adopt(ctx); err != nil {
		_ = d.Close()
		return nil, err
	}
	d.wg.Add(1)
	go d.trimLogs()
	return d, nil
}

// lockDir waits shortly: a predecessor that was killed may have a child between
// fork and exec that still holds the lock.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("qemu driver: %w", err)
	}
	for deadline := time.Now().Add(2 * time.Second); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) || ctx.Err() != nil {
			_ = f.Close()
			return nil, fmt.Errorf("qemu driver: %s is in use by another process: %w: %v", dir, errdefs.ErrFailedPrecondition, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Capabilities implements hypervisor.Driver.
func (d *Driver) Capabilities() hypervisor.Capabilities {
	return hypervisor.Capabilities{
		Accelerator: d.host.accel,
		GrowCPU:     true, ShrinkCPU: d.canShrinkCPU(), GrowMemory: true, ShrinkMemory: true,
		HotDisk: true, HotNIC: true, Clone: true,
		Base:       hypervisor.Size{CPUs: baseCPUs, Memory: baseMemory},
		Max:        d.host.max,
		MemoryStep: memoryStep,
		MaxDisks:   maxDisks,
		MaxNICs:    maxNICs,
	}
}

var validID = regexp.MustCompile(`^[a-z0-9-]{1,63}$`)

// Create implements hypervisor.Driver.
func (d *Driver) Create(ctx context.Context, spec hypervisor.MachineSpec) error {
	if !validID.MatchString(spec.ID) {
		return fmt.Errorf("machine id %q: must be 1 to 63 of a-z, 0-9 and -: %w", spec.ID, errdefs.ErrInvalidArgument)
	}
	full, err := d.complete(spec)
	if err != nil {
		return err
	}
	d.mu.Lock()
	m := d.machines[spec.ID]
	if m == nil {
		m = newMachine(d, full)
		d.machines[spec.ID] = m
	}
	d.mu.Unlock()
	unlock, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if m.spec != full {
		return fmt.Errorf("machine %s exists with another specification (delete it first): %w", spec.ID, errdefs.ErrAlreadyExists)
	}
	if m.created {
		return nil
	}
	if err = os.MkdirAll(m.stateDir(), 0o700); err == nil {
		err = writeJSON(m.specFile(), full)
	}
	if err != nil {
		_ = os.RemoveAll(m.stateDir())
		d.forget(m)
		return fmt.Errorf("create machine %s: %w", spec.ID, err)
	}
	m.created = true
	return nil
}

// complete checks a specification and fills in the ceiling.
func (d *Driver) complete(spec hypervisor.MachineSpec) (hypervisor.MachineSpec, error) {
	bad := func(format string, a ...any) (hypervisor.MachineSpec, error) {
		return spec, fmt.Errorf("machine %s: %s: %w", spec.ID, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	for _, p := range []*string{&spec.Kernel, &spec.Initrd} {
		if !filepath.IsAbs(*p) {
			return bad("kernel and initrd must be absolute paths, not %q", *p)
		}
		if fi, err := os.Stat(*p); err != nil || !fi.Mode().IsRegular() {
			return bad("%s is no file (build the guest first)", *p)
		}
	}
	if len(spec.Cmdline) > 1024 {
		return bad("kernel command line longer than 1024 bytes")
	}
	if spec.Ceiling.CPUs == 0 {
		spec.Ceiling.CPUs = d.host.max.CPUs
	}
	if spec.Ceiling.Memory == 0 {
		spec.Ceiling.Memory = d.host.max.Memory
	}
	spec.Ceiling.Memory = spec.Ceiling.Memory / memoryStep * memoryStep
	if c := spec.Ceiling; c.CPUs < baseCPUs || c.CPUs > d.host.max.CPUs || c.Memory < baseMemory || c.Memory > d.host.max.Memory {
		return bad("ceiling of %d CPUs and %d MiB: must lie between %d, %d MiB and %d, %d MiB",
			c.CPUs, c.Memory/mib, baseCPUs, baseMemory/mib, d.host.max.CPUs, d.host.max.Memory/mib)
	}
	return spec, nil
}

// Delete implements hypervisor.Driver. Deleting what is not there is no error.
func (d *Driver) Delete(ctx context.Context, id string) error {
	m, err := d.find(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	unlock, err := m.acquire(ctx)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	defer unlock()
	if err := m.stop(ctx, hypervisor.StopOptions{}); err != nil {
		return fmt.Errorf("delete machine %s: %w", id, err)
	}
	// The specification goes first: without it, New removes the rest.
	if err := os.Remove(m.specFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete machine %s: %w", id, err)
	}
	if err := errors.Join(d.removeTraces(id), os.RemoveAll(m.stateDir())); err != nil {
		return fmt.Errorf("delete machine %s: %w", id, err)
	}
	d.forget(m)
	return nil
}

// removeTraces removes what a run leaves outside of the state directory.
func (d *Driver) removeTraces(id string) error {
	var err error
	if d.groups != nil {
		err = d.groups.remove(id)
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(d.opt.RunDir, id)))
}

func (d *Driver) forget(m *machine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m.gone = true
	if d.machines[m.id] == m {
		delete(d.machines, m.id)
	}
}

func (d *Driver) find(id string) (*machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %q: %w", id, errdefs.ErrNotFound)
}

// List implements hypervisor.Driver: all machines, by id.
func (d *Driver) List(context.Context) ([]hypervisor.Status, error) {
	d.mu.Lock()
	all := make([]*machine, 0, len(d.machines))
	for _, m := range d.machines {
		all = append(all, m)
	}
	d.mu.Unlock()
	sort.Slice(all, func(i, j int) bool { return all[i].id < all[j].id })
	out := make([]hypervisor.Status, 0, len(all))
	for _, m := range all {
		out = append(out, m.status())
	}
	return out, nil
}

// Inspect implements hypervisor.Driver.
func (d *Driver) Inspect(_ context.Context, id string) (hypervisor.Status, error) {
	m, err := d.find(id)
	if err != nil {
		return hypervisor.Status{}, err
	}
	return m.status(), nil
}

// MemoryUse implements hypervisor.Driver.
func (d *Driver) MemoryUse(_ context.Context, id string) (int64, error) {
	m, err := d.find(id)
	if err != nil {
		return 0, err
	}
	st := m.status()
	if st.PID == 0 {
		return 0, m.notRunning()
	}
	n, err := pss(st.PID)
	if err != nil {
		return 0, fmt.Errorf("memory use of machine %s: %w", id, err)
	}
	return n, nil
}

// Watch implements hypervisor.Driver.
func (d *Driver) Watch(ctx context.Context) <-chan hypervisor.Event { return d.events.Watch(ctx) }

// Close implements hypervisor.Driver: machines go on; a later New finds them.
func (d *Driver) Close() error {
	d.closing.Do(func() {
		close(d.closed)
		d.wg.Wait()
		d.mu.Lock()
		for _, m := range d.machines {
			m.letGo()
		}
		d.mu.Unlock()
		d.tmu.Lock()
		for _, t := range d.templates {
			_ = t.memory.Close()
		}
		d.templates = map[string]*sealed{}
		d.tmu.Unlock()
		d.events.Close()
		if d.groups != nil {
			d.groups.removeParent()
		}
		_ = d.lock.Close()
	})
	return nil
}
