// Package fakehost is a host agent without a host: it answers the server as a
// real agent does, and its machines and containers are entries in a map. Tests
// and the simulation put it on one end of a server; Script says how containers of
// an image behave.
//
//	h := fakehost.New(fakehost.Options{ID: "h-1", Capacity: &v1.Size{CpuMilli: 8000, MemoryBytes: 16 << 30}})
//	go h.Connect(ctx, socket, token)      // through a real server's socket, or
//	go ctl.Serve(ctx, "h-1", h.Client())  // straight into the controllers
//
// Who moves time by hand calls Tick for what is due, and News for what is seen.
package fakehost

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/clock"
	"tandem/internal/rpc"
)

// Clock is what time a fake host has.
type Clock = clock.Clock

// Script is how containers of an image behave. The zero value runs until it is
// stopped, and is healthy at once when it has a check.
type Script struct {
	// Fail, when set, is why it can't start.
	Fail string
	// Exits lets it end after RunFor with ExitCode.
	Exits    bool
	RunFor   time.Duration
	ExitCode int32
	// HealthyAfter is how long its health check takes to pass; Unhealthy lets it
	// fail for ever.
	HealthyAfter time.Duration
	Unhealthy    bool
	// StopsAfter is how long it takes to stop; it is killed (exit code 137) when
	// that is longer than it is given.
	StopsAfter time.Duration
	// Output is its log, line by line.
	Output []string
}

// Options of New; zero values are a host of 8 cores and 16 GiB.
type Options struct {
	ID, Hostname, Zone string
	Capacity           *v1.Size
	Capabilities       *v1.Capabilities
	Clock              Clock
	// Boot is how long a machine takes to start, Prepare a container.
	Boot    time.Duration
	Prepare time.Duration
}

// Host is one fake host. Its state outlives connections, as a real host's does.
type Host struct {
	tandemv1connect.UnimplementedAgentServiceHandler
	opts Options

	mu         sync.Mutex
	scripts    map[string]Script
	spec       *v1.HostSpec
	machines   map[string]*machine
	containers map[string]*container
	volumes    map[string]*v1.VolumeStatus
	images     map[string]*v1.Image
	changed    chan struct{} // closed and renewed
	version    uint64
	touched    map[string]uint64 // id -> version of its last change
	removed    map[string]gone
	events     []event
	progress   []step
	applies    int
	load       load
}

type gone struct {
	kind    string
	version uint64
}

type event struct {
	version uint64
	e       *v1.Event
}

type step struct {
	version uint64
	p       *v1.Progress
}

type machine struct {
	a  *v1.MachineAssignment
	st *v1.MachineStatus
	up bool
	at time.Time // when it is up
}

type container struct {
	a       *v1.ContainerAssignment
	st      *v1.ContainerStatus
	log     []*v1.LogEntry
	gone    bool // to be removed, after it has stopped
	stopped bool // ended because it was asked to
	grace   time.Duration
	stop    time.Time     // when it was told to end
	delay   time.Duration // before the next restart
	// When the next things happen; zero: never.
	ready, end, healthy, again time.Time
}

// New makes a host.
func New(o Options) *Host {
	o.ID = cmp.Or(o.ID, "h-1")
	o.Hostname = cmp.Or(o.Hostname, o.ID)
	if o.Capacity == nil {
		o.Capacity = &v1.Size{CpuMilli: 8000, MemoryBytes: 16 << 30}
	}
	if o.Capabilities == nil {
		o.Capabilities = &v1.Capabilities{GrowCpu: true, ShrinkCpu: true, GrowMemory: true, ShrinkMemory: true, HotDisk: true, Clone: true, Metal: true, MemoryStepBytes: 64 << 20}
	}
	if o.Clock == nil {
		o.Clock = clock.System{}
	}
	return &Host{opts: o, scripts: map[string]Script{}, machines: map[string]*machine{}, containers: map[string]*container{},
		volumes: map[string]*v1.VolumeStatus{}, images: map[string]*v1.Image{}, changed: make(chan struct{}), touched: map[string]uint64{}, removed: map[string]gone{}}
}

// Script says how containers of an image behave from now on.
func (h *Host) Script(image string, s Script) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.scripts[image] = s
}

// ID is the host's id.
func (h *Host) ID() string { return h.opts.ID }

// Applies counts the intents that were accepted and differed from the one before.
func (h *Host) Applies() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.applies
}

// Spec is the intent that the host has.
func (h *Host) Spec() *v1.HostSpec {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.spec
}

// Running names the containers that run, sorted.
func (h *Host) Running() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, c := range h.containers {
		if c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
			out = append(out, c.a.Name)
		}
	}
	slices.Sort(out)
	return out
}

// Left counts machines, containers and volumes that the host has.
func (h *Host) Left() (machines, containers, volumes int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.machines), len(h.containers), len(h.volumes)
}

// Exit ends a container by name, as if its process had.
func (h *Host) Exit(name string, code int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.containers {
		if c.a.Name == name && c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
			h.exit(c, code)
		}
	}
}

// Crash ends a machine by name, as if its VMM had died: it boots again, and its
// containers start again in it, whatever their policies are.
func (h *Host) Crash(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, m := range h.machines {
		if m.a.Name != name || !m.up {
			continue
		}
		m.up, m.at = false, h.opts.Clock.Now().Add(h.opts.Boot)
		m.st = proto.Clone(m.st).(*v1.MachineStatus)
		m.st.State, m.st.StartedAt = v1.MachineState_MACHINE_STATE_STARTING, nil
		m.st.Restarts++
		h.tell("machine", "crash", id)
		h.touch(id)
		for cid, c := range h.containers {
			if c.a.MachineId != id || c.st.StartedAt == nil || c.st.State == v1.ContainerState_CONTAINER_STATE_EXITED {
				continue
			}
			c.st.State, c.st.Health = v1.ContainerState_CONTAINER_STATE_PENDING, v1.Health_HEALTH_UNSPECIFIED
			c.st.RestartCount++
			c.end, c.healthy = time.Time{}, time.Time{}
			h.touch(cid)
		}
	}
}

// Tick does what is due, and says after how long something will be (0: nothing).
func (h *Host) Tick() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.tick()
}

// News is what Watch would send to who has seen all up to a version (full: to who
// has seen nothing), and the version to go on with; nil when there is nothing.
func (h *Host) News(seen uint64, full bool) (*v1.HostStatus, uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.status(seen, full)
	if !full && len(st.Machines)+len(st.Containers)+len(st.Volumes)+len(st.RemovedMachines)+len(st.RemovedContainers)+len(st.RemovedVolumes)+len(st.Events)+len(st.Progress) == 0 {
		st = nil
	}
	return st, h.version
}

// Handler serves the agent's side.
func (h *Host) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(tandemv1connect.NewAgentServiceHandler(h, rpc.HandlerOptions()...))
	return mux
}

// Connect is an agent's life: it opens a tunnel to the server behind a unix socket
// and serves it, again and again, until ctx ends.
func (h *Host) Connect(ctx context.Context, socket, token string) {
	go h.tickUntil(ctx)
	for ctx.Err() == nil {
		if err := h.connectOnce(ctx, socket, token); err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
}

func (h *Host) connectOnce(ctx context.Context, socket, token string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	l, err := rpc.OpenTunnel(ctx, conn, h.opts.ID, token)
	if err != nil {
		return err
	}
	return h.serve(ctx, l)
}

func (h *Host) serve(ctx context.Context, l net.Listener) error {
	srv := rpc.NewServer(h.Handler())
	stop := context.AfterFunc(ctx, func() { srv.Close(); l.Close() })
	defer stop()
	defer srv.Close()
	return srv.Serve(l)
}

// Client is a client of this host without any network, for the time of ctx. It
// also lets the host's time pass.
func (h *Host) Client(ctx context.Context) tandemv1connect.AgentServiceClient {
	l := newPipe()
	go h.serve(ctx, l)
	go h.tickUntil(ctx)
	return tandemv1connect.NewAgentServiceClient(rpc.NewClient(l.dial), rpc.BaseURL, rpc.ClientOptions()...)
}

// facts of the host.
func (h *Host) facts() *v1.HostFacts {
	return &v1.HostFacts{HostId: h.opts.ID, Hostname: h.opts.Hostname, Zone: h.opts.Zone, Capacity: h.opts.Capacity, Accelerator: "fake", Version: "fake",
		Capabilities: h.opts.Capabilities, MachineOverhead: &v1.Size{MemoryBytes: 64 << 20}, GuestOverhead: &v1.Size{MemoryBytes: 64 << 20},
		BaseMemoryBytes: 256 << 20, BootId: "fake"}
}

// Hello implements AgentService.
func (h *Host) Hello(context.Context, *connect.Request[v1.AgentHelloRequest]) (*connect.Response[v1.AgentHelloResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return connect.NewResponse(&v1.AgentHelloResponse{Protocol: 1, Facts: h.facts(), AppliedRevision: h.spec.GetRevision()}), nil
}

// Apply implements AgentService.
func (h *Host) Apply(_ context.Context, req *connect.Request[v1.ApplyHostRequest]) (*connect.Response[v1.ApplyHostResponse], error) {
	s := req.Msg.GetSpec()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.spec != nil && s.Revision < h.spec.Revision {
		return nil, fmt.Errorf("revision %d is older than %d: %w", s.Revision, h.spec.Revision, errdefs.ErrFailedPrecondition)
	}
	machines := map[string]bool{}
	for _, m := range s.Machines {
		machines[m.Id] = true
	}
	for _, c := range s.Containers {
		if c.MachineId != "" && !machines[c.MachineId] {
			return nil, fmt.Errorf("container %s is in machine %s, which is not in the spec: %w", c.Id, c.MachineId, errdefs.ErrInvalidArgument)
		}
	}
	if h.spec == nil || s.Revision != h.spec.Revision {
		h.applies++
		h.spec = proto.Clone(s).(*v1.HostSpec)
		h.reconcile()
	}
	return connect.NewResponse(&v1.ApplyHostResponse{Revision: s.Revision}), nil
}

// Watch implements AgentService.
func (h *Host) Watch(ctx context.Context, _ *connect.Request[v1.WatchHostRequest], out *connect.ServerStream[v1.HostStatus]) error {
	seen, full := uint64(0), true
	for {
		h.mu.Lock()
		changed := h.changed
		h.mu.Unlock()
		st, version := h.News(seen, full)
		if st != nil {
			if err := out.Send(st); err != nil {
				return err
			}
		}
		seen, full = version, false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// status is all, or what changed after version seen. The lock is held.
func (h *Host) status(seen uint64, full bool) *v1.HostStatus {
	st := &v1.HostStatus{Full: full, AppliedRevision: h.spec.GetRevision()}
	if full {
		st.Facts = h.facts()
	}
	for _, id := range slices.Sorted(maps.Keys(h.machines)) {
		if full || h.touched[id] > seen {
			st.Machines = append(st.Machines, proto.Clone(h.machines[id].st).(*v1.MachineStatus))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(h.containers)) {
		if full || h.touched[id] > seen {
			x := proto.Clone(h.containers[id].st).(*v1.ContainerStatus)
			x.Ip = h.containers[id].a.GetIp()
			for _, a := range h.containers[id].a.GetAddresses() {
				x.Ips = append(x.Ips, a.Ip)
			}
			st.Containers = append(st.Containers, x)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(h.volumes)) {
		if full || h.touched[id] > seen {
			st.Volumes = append(st.Volumes, proto.Clone(h.volumes[id]).(*v1.VolumeStatus))
		}
	}
	if full {
		for _, id := range h.spec.GetDeletedVolumes() {
			if h.volumes[id] == nil {
				st.RemovedVolumes = append(st.RemovedVolumes, id)
			}
		}
	} else {
		for _, id := range slices.Sorted(maps.Keys(h.removed)) {
			if g := h.removed[id]; g.version > seen {
				switch g.kind {
				case "machine":
					st.RemovedMachines = append(st.RemovedMachines, id)
				case "container":
					st.RemovedContainers = append(st.RemovedContainers, id)
				default:
					st.RemovedVolumes = append(st.RemovedVolumes, id)
				}
			}
		}
		for _, e := range h.events {
			if e.version > seen {
				st.Events = append(st.Events, e.e)
			}
		}
		for _, p := range h.progress {
			if p.version > seen {
				st.Progress = append(st.Progress, p.p)
			}
		}
	}
	return st
}

func (h *Host) touch(id string) {
	h.version++
	h.touched[id] = h.version
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *Host) tell(kind, action, id string) {
	h.version++
	h.events = append(h.events, event{h.version, &v1.Event{At: h.now(), Kind: kind, Action: action, Id: id}})
}

func (h *Host) now() *timestamppb.Timestamp { return timestamppb.New(h.opts.Clock.Now()) }

func ms(d time.Duration) *durationpb.Duration { return durationpb.New(d) }
