package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/hypervisor"
	"tandem/internal/image"
	"tandem/internal/network"
	"tandem/internal/runtime"
	"tandem/internal/volume"
)

// world is a host without the agent: it outlives agents.
type world struct {
	drv  *fakeDriver
	rt   *fakeRuntime // metal
	imgs *fakeImages
	vols *fakeVolumes
	net  *fakeNetwork

	gmu    sync.Mutex
	gen    int    // the agent that lives; calls of others do nothing
	killIn int    // calls until it is killed; 0: never
	after  bool   // that call still takes effect
	killed func() // keeps what is on disk at that instant
}

type genKey struct{}

// gate is passed by every call of an agent into the world. It kills the agent at
// a chosen call: from then on nothing that it does has an effect.
func (w *world) gate(ctx context.Context) error {
	gen, ok := ctx.Value(genKey{}).(int)
	if !ok {
		return nil
	}
	w.gmu.Lock()
	defer w.gmu.Unlock()
	dead := fmt.Errorf("this agent was killed: %w", errdefs.ErrUnavailable)
	if gen != w.gen {
		return dead
	}
	if w.killIn > 0 {
		if w.killIn--; w.killIn == 0 {
			w.gen++
			w.killed()
			if !w.after {
				return dead
			}
		}
	}
	return nil
}

func newWorld() *world {
	w := &world{rt: newFakeRuntime(), imgs: newFakeImages(), vols: newFakeVolumes(), net: &fakeNetwork{}}
	w.drv = &fakeDriver{w: w, ms: map[string]*fakeMachine{}, templates: map[string]bool{}, watchers: map[chan hypervisor.Event]bool{},
		bootTime: 6 * time.Second, cloneTime: 400 * time.Millisecond, nextPID: 100}
	w.rt.w, w.imgs.w, w.vols.w, w.net.w = w, w, w, w
	w.vols.removed = func(id string) {
		w.drv.mu.Lock()
		defer w.drv.mu.Unlock()
		if m := w.drv.ms[strings.TrimPrefix(id, "scratch-")]; m != nil {
			m.keep = false
		}
	}
	return w
}

// fakeRuntime runs programs by name: "sleep" for ever, "run DURATION CODE".
type fakeRuntime struct {
	w       *world
	mu      sync.Mutex
	cs      map[string]*fakeContainer
	mounts  map[string]bool
	subs    map[chan *v1.RuntimeEvent]bool
	probe   func() int // exit code of exec
	dead    bool
	creates int
	frozen  chan struct{}
}

type fakeContainer struct {
	spec  *v1.RuntimeSpec
	st    *v1.RuntimeStatus
	timer *time.Timer
	ended chan struct{}
	run   int
}

func newFakeRuntime() *fakeRuntime {
	return &fakeRuntime{cs: map[string]*fakeContainer{}, mounts: map[string]bool{}, subs: map[chan *v1.RuntimeEvent]bool{}, probe: func() int { return 0 }}
}

func (r *fakeRuntime) emit(action string, c *fakeContainer) {
	e := &v1.RuntimeEvent{Id: c.st.Id, Action: action, Status: proto.Clone(c.st).(*v1.RuntimeStatus), At: timestamppb.Now()}
	for s := range r.subs {
		s <- e
	}
}

func (r *fakeRuntime) lock() (func(), error) {
	r.mu.Lock()
	if r.dead {
		r.mu.Unlock()
		return nil, fmt.Errorf("kernel is dead: %w", errdefs.ErrUnavailable)
	}
	return r.mu.Unlock, nil
}

func (r *fakeRuntime) Mount(ctx context.Context, m *v1.MountDiskRequest) (string, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return "", gerr
	}
	un, err := r.lock()
	if err != nil {
		return "", err
	}
	defer un()
	r.mounts[m.Id] = true
	return "/mnt/" + m.Id, nil
}
func (r *fakeRuntime) Unmount(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	for _, c := range r.cs {
		for _, l := range c.spec.Layers {
			if l == id {
				return fmt.Errorf("disk in use: %w", errdefs.ErrFailedPrecondition)
			}
		}
		for _, m := range c.spec.Mounts {
			if m.Source == id {
				return fmt.Errorf("disk in use: %w", errdefs.ErrFailedPrecondition)
			}
		}
	}
	delete(r.mounts, id)
	return nil
}
func (r *fakeRuntime) Create(ctx context.Context, s *v1.RuntimeSpec) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	if r.cs[s.Id] != nil {
		return errdefs.ErrAlreadyExists
	}
	for _, l := range s.Layers {
		if !r.mounts[l] {
			return fmt.Errorf("layer %s is not mounted: %w", l, errdefs.ErrFailedPrecondition)
		}
	}
	r.creates++
	c := &fakeContainer{spec: s, st: &v1.RuntimeStatus{Id: s.Id, State: v1.ContainerState_CONTAINER_STATE_CREATED}, ended: make(chan struct{})}
	r.cs[s.Id] = c
	r.emit("create", c)
	return nil
}
func (r *fakeRuntime) Start(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	if c == nil {
		return errdefs.ErrNotFound
	}
	if c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
		return nil
	}
	if c.spec.Args[0] == "missing" {
		return fmt.Errorf("exec missing: no such file: %w", errdefs.ErrNotFound)
	}
	c.run++
	run := c.run
	c.ended = make(chan struct{})
	c.st = &v1.RuntimeStatus{Id: id, State: v1.ContainerState_CONTAINER_STATE_RUNNING, Pid: 10, StartedAt: timestamppb.Now()}
	r.emit("start", c)
	if c.spec.Args[0] == "run" {
		d, _ := time.ParseDuration(c.spec.Args[1])
		code, _ := strconv.Atoi(c.spec.Args[2])
		c.timer = time.AfterFunc(d, func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			if c.run == run {
				r.end(c, int32(code))
			}
		})
	}
	return nil
}
func (r *fakeRuntime) end(c *fakeContainer, code int32) {
	if r.dead || c.st.State != v1.ContainerState_CONTAINER_STATE_RUNNING && c.st.State != v1.ContainerState_CONTAINER_STATE_PAUSED {
		return
	}
	c.st = &v1.RuntimeStatus{Id: c.st.Id, State: v1.ContainerState_CONTAINER_STATE_EXITED, ExitCode: code, StartedAt: c.st.StartedAt, FinishedAt: timestamppb.Now()}
	close(c.ended)
	r.emit("exit", c)
}
func (r *fakeRuntime) Stop(ctx context.Context, id, sig string, grace time.Duration) (*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer un()
	c := r.cs[id]
	if c == nil {
		return nil, errdefs.ErrNotFound
	}
	r.end(c, 143)
	return proto.Clone(c.st).(*v1.RuntimeStatus), nil
}
func (r *fakeRuntime) Kill(ctx context.Context, id, signal string, all bool) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	if c := r.cs[id]; c != nil {
		r.end(c, 137)
		return nil
	}
	return errdefs.ErrNotFound
}
func (r *fakeRuntime) Delete(ctx context.Context, id string, force bool) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	if c == nil {
		return nil
	}
	if !force && c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
		return errdefs.ErrFailedPrecondition
	}
	delete(r.cs, id)
	r.emit("delete", c)
	return nil
}
func (r *fakeRuntime) setState(id string, st v1.ContainerState) error {
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	c := r.cs[id]
	c.st = proto.Clone(c.st).(*v1.RuntimeStatus)
	c.st.State = st
	r.emit("pause", c)
	return nil
}
func (r *fakeRuntime) Pause(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return r.setState(id, v1.ContainerState_CONTAINER_STATE_PAUSED)
}
func (r *fakeRuntime) Resume(ctx context.Context, id string) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return r.setState(id, v1.ContainerState_CONTAINER_STATE_RUNNING)
}
func (r *fakeRuntime) Update(ctx context.Context, id string, res *v1.Resources) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	un, err := r.lock()
	if err != nil {
		return err
	}
	defer un()
	r.cs[id].spec.Resources = res
	return nil
}
func (r *fakeRuntime) Exec(ctx context.Context, s *v1.ExecSpec, io runtime.Streams) (int, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return 0, gerr
	}
	un, err := r.lock()
	if err != nil {
		return 0, err
	}
	defer un()
	fmt.Fprint(io.Stdout, "probed")
	return r.probe(), nil
}
func (r *fakeRuntime) Attach(ctx context.Context, s *v1.AttachSpec, io runtime.Streams) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return nil
}
func (r *fakeRuntime) Logs(ctx context.Context, o *v1.LogOptions, fn func(*v1.LogEntry) error) error {
	if gerr := r.w.gate(ctx); gerr != nil {
		return gerr
	}
	return fn(&v1.LogEntry{Line: []byte("hello\n")})
}
func (r *fakeRuntime) Wait(ctx context.Context, id string) (*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return nil, errdefs.ErrNotImplemented
}
func (r *fakeRuntime) List(ctx context.Context) ([]*v1.RuntimeStatus, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer un()
	var out []*v1.RuntimeStatus
	for _, c := range r.cs {
		out = append(out, proto.Clone(c.st).(*v1.RuntimeStatus))
	}
	return out, nil
}
func (r *fakeRuntime) Stats(ctx context.Context, id string) (*v1.Usage, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return &v1.Usage{Pids: 1}, nil
}
func (r *fakeRuntime) Top(ctx context.Context, id string) ([]*v1.Process, error) { return nil, nil }
func (r *fakeRuntime) Events(ctx context.Context) (<-chan *v1.RuntimeEvent, error) {
	if gerr := r.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	un, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer un()
	in, out := make(chan *v1.RuntimeEvent, 1000), make(chan *v1.RuntimeEvent)
	r.subs[in] = true
	in <- &v1.RuntimeEvent{Action: "ready"}
	go func() {
		defer close(out)
		defer func() { r.mu.Lock(); delete(r.subs, in); r.mu.Unlock() }()
		for {
			select {
			case e, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
func (r *fakeRuntime) Close() error { return nil }

// kill ends the kernel: what ran is dead. Writable layers stay on the scratch disk.
func (r *fakeRuntime) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dead = true
}

// reboot gives the kernel that boots with the same scratch disk.
func (r *fakeRuntime) reboot(keep bool) *fakeRuntime {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := newFakeRuntime()
	n.w = r.w
	n.probe = r.probe
	if !keep {
		return n
	}
	for id, c := range r.cs {
		st := proto.Clone(c.st).(*v1.RuntimeStatus)
		if st.State == v1.ContainerState_CONTAINER_STATE_RUNNING || st.State == v1.ContainerState_CONTAINER_STATE_PAUSED {
			st.State, st.ExitCode, st.FinishedAt = v1.ContainerState_CONTAINER_STATE_EXITED, 255, timestamppb.Now()
		}
		n.cs[id] = &fakeContainer{spec: c.spec, st: st, ended: make(chan struct{})}
	}
	return n
}

// fakeGuest is a machine's guest.
type fakeGuest struct {
	tandemv1connect.UnimplementedGuestServiceHandler
	m          *fakeMachine
	rt         *fakeRuntime
	up         chan struct{} // closed when it answers
	dead       chan struct{}
	once       sync.Once
	mu         sync.Mutex
	id         string
	configured *v1.ConfigureRequest
	hang       bool
}

func (g *fakeGuest) die() { g.once.Do(func() { close(g.dead) }); g.rt.kill() }
func (g *fakeGuest) ok(ctx context.Context) error {
	g.mu.Lock()
	hang := g.hang
	g.mu.Unlock()
	select {
	case <-g.dead:
		return errdefs.ErrUnavailable
	default:
	}
	if hang {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}
func (g *fakeGuest) Hello(ctx context.Context, r *connect.Request[v1.GuestHelloRequest]) (*connect.Response[v1.GuestHelloResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	select {
	case <-g.up:
	case <-g.dead:
		return nil, errdefs.ErrUnavailable
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return connect.NewResponse(&v1.GuestHelloResponse{Protocol: 1, Version: "test", GuestId: g.id, Configured: g.configured != nil, MachineId: g.configured.GetMachineId()}), nil
}
func (g *fakeGuest) Configure(ctx context.Context, r *connect.Request[v1.ConfigureRequest]) (*connect.Response[v1.ConfigureResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	if len(r.Msg.Entropy) < 64 || !g.m.hasDisk(r.Msg.ScratchSerial) {
		return nil, errdefs.ErrFailedPrecondition
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.configured = r.Msg
	return connect.NewResponse(&v1.ConfigureResponse{GuestId: g.id}), nil
}
func (g *fakeGuest) ConfigureNetwork(ctx context.Context, r *connect.Request[v1.ConfigureNetworkRequest]) (*connect.Response[v1.ConfigureNetworkResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.ConfigureNetworkResponse{}), g.ok(ctx)
}
func (g *fakeGuest) Ping(ctx context.Context, r *connect.Request[v1.PingRequest]) (*connect.Response[v1.PingResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.PingResponse{Nonce: r.Msg.Nonce}), nil
}
func (g *fakeGuest) Resources(ctx context.Context, r *connect.Request[v1.GuestResourcesRequest]) (*connect.Response[v1.GuestResourcesResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.GuestResourcesResponse{Usage: &v1.Usage{MemoryBytes: 1}, OverheadBytes: 100 << 20}), g.ok(ctx)
}
func (g *fakeGuest) OfflineCPUs(ctx context.Context, r *connect.Request[v1.OfflineCPUsRequest]) (*connect.Response[v1.OfflineCPUsResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.OfflineCPUsResponse{Online: r.Msg.Keep}), g.ok(ctx)
}
func (g *fakeGuest) Quiesce(ctx context.Context, r *connect.Request[v1.QuiesceRequest]) (*connect.Response[v1.QuiesceResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return connect.NewResponse(&v1.QuiesceResponse{}), g.ok(ctx)
}
func (g *fakeGuest) Shutdown(ctx context.Context, r *connect.Request[v1.ShutdownRequest]) (*connect.Response[v1.ShutdownResponse], error) {
	if gerr := g.rt.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	if err := g.ok(ctx); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.ShutdownResponse{}), nil
}

// fakeDriver runs machines that are fakeGuests.
type fakeDriver struct {
	w                   *world
	mu                  sync.Mutex
	ms                  map[string]*fakeMachine
	templates           map[string]bool
	watchers            map[chan hypervisor.Event]bool
	bootTime, cloneTime time.Duration
	nextPID             int
	starts              []string
	failStart           error
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
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.ms[id]; m != nil {
		d.end(m, hypervisor.Stopped)
		m.st.State = hypervisor.Stopped
		return nil
	}
	return errdefs.ErrNotFound
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
	return nil, errdefs.ErrNotImplemented
}
func (d *fakeDriver) ConsoleLog(ctx context.Context, id string, n int64) ([]byte, error) {
	if gerr := d.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return nil, nil
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

// fakeImages has images by name.
type fakeImages struct {
	w *world
	image.Store
	mu     sync.Mutex
	have   map[string]*v1.Image
	remote map[string]*v1.Image
	leases map[string][]string
	pulls  int
}

func newFakeImages() *fakeImages {
	app := &v1.Image{Id: "sha256:app", Names: []string{"app"}, Config: &v1.ImageConfig{Command: []string{"sleep"}, Env: []string{"A=1"}}}
	return &fakeImages{have: map[string]*v1.Image{"app": app, "sha256:app": app}, remote: map[string]*v1.Image{}, leases: map[string][]string{}}
}
func (f *fakeImages) Get(ctx context.Context, ref string) (*v1.Image, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := f.have[ref]; i != nil {
		return i, nil
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}
func (f *fakeImages) Pull(ctx context.Context, ref string, o image.PullOptions) (*v1.Image, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pulls++
	i := f.remote[ref]
	if i == nil {
		return nil, errors.New("registry says no")
	}
	f.have[ref], f.have[i.Id] = i, i
	return i, nil
}
func (f *fakeImages) Layers(ctx context.Context, id string, p image.ProgressFunc) ([]image.Layer, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	return []image.Layer{{DiffID: "sha256:" + fmt.Sprintf("%064d", 1), Path: "/l1", FSType: "ext4"}, {DiffID: "sha256:" + fmt.Sprintf("%064d", 2), Path: "/l2", FSType: "ext4"}}, nil
}
func (f *fakeImages) Lease(ctx context.Context, holder, id string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leases[holder] = []string{id}
	return nil
}
func (f *fakeImages) Release(ctx context.Context, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.leases, holder)
	return nil
}
func (f *fakeImages) Leases(ctx context.Context) (map[string][]string, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string][]string{}
	for k, v := range f.leases {
		out[k] = v
	}
	return out, nil
}

// fakeVolumes has volumes in memory.
type fakeVolumes struct {
	w    *world
	mu   sync.Mutex
	vols map[string]volume.Volume
	used map[string]string

	removed func(id string)
}

func newFakeVolumes() *fakeVolumes {
	return &fakeVolumes{vols: map[string]volume.Volume{}, used: map[string]string{}}
}
func (f *fakeVolumes) Ensure(ctx context.Context, id string, size int64) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	v := volume.Volume{ID: id, Path: "/v/" + id, SizeBytes: size}
	f.vols[id] = v
	return v, nil
}
func (f *fakeVolumes) EnsureScratch(ctx context.Context, id string, size int64) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	return f.Ensure(ctx, id, size)
}
func (f *fakeVolumes) Get(ctx context.Context, id string) (volume.Volume, error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return volume.Volume{}, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if v, ok := f.vols[id]; ok {
		return v, nil
	}
	return volume.Volume{}, errdefs.ErrNotFound
}
func (f *fakeVolumes) List(ctx context.Context) (out []volume.Volume, err error) {
	if gerr := f.w.gate(ctx); gerr != nil {
		return nil, gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, v := range f.vols {
		out = append(out, v)
	}
	return out, nil
}
func (f *fakeVolumes) Remove(ctx context.Context, id string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	if f.removed != nil {
		f.removed(id)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used[id] != "" {
		return fmt.Errorf("volume %s in use by %s: %w", id, f.used[id], errdefs.ErrFailedPrecondition)
	}
	delete(f.vols, id)
	return nil
}
func (f *fakeVolumes) Use(ctx context.Context, id, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if h := f.used[id]; h != "" && h != holder {
		return fmt.Errorf("volume %s in use by %s: %w", id, h, errdefs.ErrFailedPrecondition)
	}
	f.used[id] = holder
	return nil
}
func (f *fakeVolumes) Unuse(ctx context.Context, id, holder string) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.used[id] == holder {
		delete(f.used, id)
	}
	return nil
}
func (f *fakeVolumes) Close() error { return nil }

type fakeNetwork struct {
	w     *world
	mu    sync.Mutex
	state *network.State
}

func (f *fakeNetwork) Apply(ctx context.Context, s *network.State) error {
	if gerr := f.w.gate(ctx); gerr != nil {
		return gerr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.state = s
	return nil
}
func (f *fakeNetwork) TapName(id string) string           { return "t" + id }
func (f *fakeNetwork) VethName(id string) string          { return "v" + id }
func (f *fakeNetwork) Close() error                       { return nil }
func (f *fakeNetwork) Teardown(ctx context.Context) error { return nil }
