package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
	"tandem/internal/rpc"
)

// Agent is one host's agent. Make it with New, then Run it.
type Agent struct {
	o         Options
	log       *slog.Logger
	state     *stateDir
	hostID    string
	bootID    string
	hub       *hub
	net       *netApplier
	images    *images
	templates *templates
	metal     *kernel // nil: not offered
	volumes   *volumeKeeper

	halting  atomic.Bool // nothing is started any more
	applying sync.Mutex  // one Apply at a time

	mu               sync.Mutex
	ctx              context.Context // of Run; nil before
	wg               sync.WaitGroup
	spec             *v1.HostSpec // last accepted; nil: never one
	cluster          string
	machines         map[string]*machine
	containers       map[string]*container
	hostFacts        *v1.HostFacts
	overheadMeasured bool
}

// New opens a host's state and takes its lock (a second agent on the same state
// directory is refused with FailedPrecondition). It touches nothing that runs;
// Run does. Close it when it is never run.
func New(o Options) (*Agent, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(o.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("agent's run directory: %w", err)
	}
	st, err := openState(o.StateDir)
	if err != nil {
		return nil, err
	}
	a := &Agent{o: o, log: o.Logger, state: st, hub: newHub(), bootID: strings.TrimSpace(firstLine("/proc/sys/kernel/random/boot_id")),
		machines: map[string]*machine{}, containers: map[string]*container{}}
	if err := a.load(); err != nil {
		st.close()
		return nil, err
	}
	return a, nil
}

func (a *Agent) load() (err error) {
	if a.hostID, err = a.state.hostID(a.o.Rand); err != nil {
		return err
	}
	if a.hostFacts, err = a.facts(); err != nil {
		return err
	}
	a.hub.setFacts(a.hostFacts)
	a.net = newNetApplier(a, a.networkState)
	a.templates = newTemplates(a)
	a.volumes = newVolumeKeeper(a)
	if a.o.Metal != nil {
		a.metal = newKernel("", a.o.Clock, a.log, a.metalDisks(), a.belongs)
		a.metal.disks.session = func() *session { return a.metal.observe("").sess }
	}
	b, err := a.state.read("cluster-id")
	if err != nil {
		return err
	}
	a.cluster = strings.TrimSpace(string(b))
	spec, err := a.state.loadSpec()
	if errdefs.IsDataLoss(err) {
		a.log.Error("the stored intent is lost; what runs goes on, and the server sends it anew", "error", err)
	} else if err != nil {
		return err
	}
	if spec != nil && validateSpec(spec) == nil {
		a.spec = spec
		a.hub.setRevision(spec.Revision)
	}
	return nil
}

// HostID is this host's id: random, kept in the state directory.
func (a *Agent) HostID() string { return a.hostID }

// Close lets go of the state directory. Run does it itself at its end.
func (a *Agent) Close() error {
	a.state.close()
	return nil
}

// Run supervises the host until ctx ends, and serves the server over tunnels
// that it dials again and again (nil: works without a server). Machines and
// containers go on when it returns; the state directory is let go.
func (a *Agent) Run(ctx context.Context, dialServer func(context.Context) (net.Conn, error), token string) error {
	defer a.state.close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := a.begin(ctx); err != nil {
		cancel()
		a.wg.Wait()
		return err
	}
	if dialServer != nil {
		a.serve(ctx, dialServer, token)
	} else {
		<-ctx.Done()
	}
	a.wg.Wait()
	return nil
}

// begin starts all actors: those of the stored intent, and those of what an
// earlier agent left behind.
func (a *Agent) begin(ctx context.Context) error {
	contRecs, badC, err := loadRecords[containerRecord](a.state, "containers")
	if err != nil {
		return err
	}
	machRecs, badM, err := loadRecords[machineRecord](a.state, "machines")
	if err != nil {
		return err
	}
	if len(badC)+len(badM) > 0 {
		a.log.Error("records can't be read; their containers and machines are looked at anew", "files", append(badC, badM...))
	}
	running, err := a.o.Driver.List(ctx)
	if err != nil {
		return fmt.Errorf("list machines: %w", err)
	}
	a.mu.Lock()
	if a.ctx != nil {
		a.mu.Unlock()
		return fmt.Errorf("this agent runs already: %w", errdefs.ErrFailedPrecondition)
	}
	a.ctx = ctx
	a.images = &images{a: a, ctx: ctx}
	for _, st := range running {
		id := st.Spec.ID
		if templateMachine(id) { // an earlier agent was killed while it made one
			a.spawn(func(ctx context.Context) { a.deleteHalfTemplate(ctx, id) })
			continue
		}
		a.machines[id] = newMachine(a, id, machRecs[id])
	}
	for id, r := range machRecs {
		if a.machines[id] == nil && validID.MatchString(id) {
			a.machines[id] = newMachine(a, id, r)
		}
	}
	for id, r := range contRecs {
		if validID.MatchString(id) {
			c := newContainer(a, id, r)
			a.containers[id] = c
			if k := a.kernelLocked(r.Machine); k != nil {
				k.disks.hold(id, r.Disks) // before anybody thinks they are unused
			}
		}
	}
	spec := a.spec
	a.mu.Unlock()

	a.spawn(a.net.run)
	a.spawn(a.volumes.run)
	a.spawn(a.watchDriver)
	if a.metal != nil {
		a.spawn(a.runMetal)
	}
	a.spawn(a.templates.run)
	if spec != nil {
		a.distribute(spec)
	}
	return nil
}

// spawn runs fn as part of Run.
func (a *Agent) spawn(fn func(context.Context)) {
	ctx := a.ctx
	a.wg.Add(1)
	go func() {
		defer a.wg.Done()
		fn(ctx)
	}()
}

// apply accepts a new intent: checks it, stores it, hands it to the actors.
func (a *Agent) apply(spec *v1.HostSpec) (uint64, error) {
	if err := validateSpec(spec); err != nil {
		return 0, err
	}
	a.applying.Lock()
	defer a.applying.Unlock()
	if err := a.checkCluster(spec.ClusterId); err != nil {
		return 0, err
	}
	a.mu.Lock()
	old := a.spec
	a.mu.Unlock()
	if old != nil && spec.Revision < old.Revision {
		return 0, fmt.Errorf("host spec revision %d is older than %d: %w", spec.Revision, old.Revision, errdefs.ErrFailedPrecondition)
	}
	if old != nil && spec.Revision == old.Revision {
		return old.Revision, nil
	}
	spec = proto.Clone(spec).(*v1.HostSpec)
	if spec.Incomplete {
		a.log.Warn("the server can't read all of its records: what is missing in its intent stays as it is", "revision", spec.Revision)
		complement(spec, old)
		if err := validateSpec(spec); err != nil {
			return 0, fmt.Errorf("with what an earlier intent had: %w", err)
		}
	}
	if err := a.state.saveSpec(spec); err != nil {
		return 0, err
	}
	a.mu.Lock()
	a.spec = spec
	started := a.ctx != nil
	a.mu.Unlock()
	a.hub.setRevision(spec.Revision)
	if started {
		a.distribute(spec)
	}
	return spec.Revision, nil
}

func (a *Agent) checkCluster(id string) error {
	if err := a.state.clusterID(id); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if id != "" {
		a.cluster = id
	}
	return nil
}

// distribute gives every actor its part; those that have none are told to end. Of
// an incomplete intent nobody learns that: complement has added what was wanted
// before, and what an agent without memory finds is left alone.
func (a *Agent) distribute(spec *v1.HostSpec) {
	a.mu.Lock()
	if a.ctx.Err() != nil {
		a.mu.Unlock()
		return
	}
	machines := map[string]*v1.MachineAssignment{}
	for _, m := range spec.Machines {
		machines[m.Id] = m
		if a.machines[m.Id] == nil {
			a.machines[m.Id] = newMachine(a, m.Id, nil)
		}
	}
	containers := map[string]*v1.ContainerAssignment{}
	for _, c := range spec.Containers {
		containers[c.Id] = c
		if a.containers[c.Id] == nil {
			a.containers[c.Id] = newContainer(a, c.Id, nil)
		}
	}
	leaving := map[string]*durationpb.Duration{}
	for _, l := range spec.Leaving {
		leaving[l.Id] = l.StopTimeout
	}
	for id, m := range a.machines {
		if spec.Incomplete && machines[id] == nil && !m.begun {
			continue
		}
		m.set(machines[id])
		if !m.begun {
			m.begun = true
			a.spawn(m.run)
		}
	}
	for id, c := range a.containers {
		if spec.Incomplete && containers[id] == nil && !c.begun {
			continue
		}
		c.set(containers[id], leaving[id])
		if !c.begun {
			c.begun = true
			a.spawn(c.run)
		}
	}
	a.mu.Unlock()
	a.net.kick()
	a.volumes.kick()
}

// kernel finds where containers with the given machine id run; nil: nowhere.
func (a *Agent) kernel(machine string) *kernel {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.kernelLocked(machine)
}

func (a *Agent) kernelLocked(machine string) *kernel {
	if machine == "" {
		return a.metal
	}
	if m := a.machines[machine]; m != nil {
		return m.kernel
	}
	return nil
}

func (a *Agent) hasContainer(id string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.containers[id] != nil
}

// anonymous are the beginnings of the names of all containers' anonymous volumes.
func (a *Agent) anonymous() map[string]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := make(map[string]bool, len(a.containers))
	for id := range a.containers {
		m[anonymousOf(id)] = true
	}
	return m
}

// belongs says that a container that a runtime has is to be there, or that its
// actor will remove it. What was removed while its kernel could not be talked to
// is not: the kernel's next session deletes it.
func (a *Agent) belongs(id string) bool {
	a.mu.Lock()
	c, incomplete := a.containers[id], a.spec.GetIncomplete()
	a.mu.Unlock()
	if c == nil {
		return incomplete
	}
	return !c.leaving.Load()
}

func (a *Agent) pokeMachine(id string) {
	a.mu.Lock()
	m := a.machines[id]
	a.mu.Unlock()
	if m != nil {
		m.poke()
	}
}

// dropContainer forgets a container that is gone. When it was asked for again
// meanwhile, it begins anew.
func (a *Agent) dropContainer(c *container) {
	a.mu.Lock()
	delete(a.containers, c.id)
	c.mu.Lock()
	again := c.want
	c.mu.Unlock()
	if again != nil && a.ctx.Err() == nil {
		n := newContainer(a, c.id, nil)
		a.containers[c.id] = n
		n.set(again, nil)
		n.begun = true
		a.spawn(n.run)
	}
	a.mu.Unlock()
	a.net.kick()
	a.volumes.kick()
}

func (a *Agent) dropMachine(m *machine) {
	a.mu.Lock()
	delete(a.machines, m.id)
	m.mu.Lock()
	again := m.want
	m.mu.Unlock()
	if again != nil && a.ctx.Err() == nil {
		n := newMachine(a, m.id, nil)
		a.machines[m.id] = n
		n.set(again)
		n.begun = true
		a.spawn(n.run)
	}
	a.mu.Unlock()
	a.net.kick()
	a.volumes.kick()
}

// watchDriver hands the hypervisor's events to the machines.
func (a *Agent) watchDriver(ctx context.Context) {
	for ctx.Err() == nil {
		for e := range a.o.Driver.Watch(ctx) {
			a.mu.Lock()
			m := a.machines[e.Machine]
			a.mu.Unlock()
			if m != nil {
				m.happened(e)
			}
		}
		select {
		case <-ctx.Done():
		case <-a.o.Clock.After(time.Second): // the driver ended it: watch again
		}
	}
}

func (a *Agent) newEvent(kind, action, id, name, project string) *v1.Event {
	return &v1.Event{At: timestamppb.New(a.o.Clock.Now()), Kind: kind, Action: action, Id: id, Name: name, Project: project,
		Attributes: map[string]string{"host": a.hostID}}
}

// machineSpec is what a machine is made with. All machines get the driver's
// highest ceiling, so that one template serves them all; the wanted ceiling
// bounds how far they are resized.
func (a *Agent) machineSpec(id string, ceiling *v1.Size) hypervisor.MachineSpec {
	g := a.o.Guest
	most := a.o.Driver.Capabilities().Max
	return hypervisor.MachineSpec{ID: id, Ceiling: most, Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline, GuestVersion: g.Version}
}

// serve keeps a tunnel to the server open.
func (a *Agent) serve(ctx context.Context, dial func(context.Context) (net.Conn, error), token string) {
	srv := rpc.NewServer(a.Handler())
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	var retry backoff
	for ctx.Err() == nil {
		begin := a.o.Clock.Now()
		err := func() error {
			call, cancel := context.WithTimeout(ctx, 15*time.Second)
			defer cancel()
			conn, err := dial(call)
			if err != nil {
				return err
			}
			l, err := rpc.OpenTunnel(call, conn, a.hostID, token)
			if err != nil {
				return err
			}
			defer l.Close()
			a.log.Info("connected to the server")
			return srv.Serve(l)
		}()
		if ctx.Err() != nil {
			return
		}
		if a.o.Clock.Now().Sub(begin) > 10*time.Second {
			retry.reset()
		}
		wait := retry.next(100*time.Millisecond, 5*time.Second)
		a.log.Info("no connection to the server; this host goes on with what it was told last", "error", err, "retry", wait)
		select {
		case <-ctx.Done():
		case <-a.o.Clock.After(wait):
		}
	}
}

// Handler serves tandem.v1.AgentService.
func (a *Agent) Handler() http.Handler { return a.handler() }
