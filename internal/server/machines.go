package server

import (
	"cmp"
	"context"
	"fmt"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

type machines struct{ s *Server }

// List implements MachineService.
func (k *machines) List(_ context.Context, req *connect.Request[v1.ListMachinesRequest]) (*connect.Response[v1.ListMachinesResponse], error) {
	out := &v1.ListMachinesResponse{}
	for _, m := range store.List[*v1.Machine](k.s.store, req.Msg.GetProject()) {
		out.Machines = append(out.Machines, k.s.ctl.Hosts.MachineStatus(m))
	}
	return connect.NewResponse(out), nil
}

// Inspect implements MachineService.
func (k *machines) Inspect(_ context.Context, req *connect.Request[v1.MachineRequest]) (*connect.Response[v1.Machine], error) {
	m, err := k.s.machine(req.Msg.GetMachine())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(k.s.ctl.Hosts.MachineStatus(m)), nil
}

// Create implements MachineService: a machine that a user keeps, also when empty.
func (k *machines) Create(ctx context.Context, req *connect.Request[v1.CreateMachineRequest]) (*connect.Response[v1.Machine], error) {
	s, r := k.s, req.Msg
	p := &problems{}
	if r.Name != "" && !objectName.MatchString(r.Name) {
		p.add("machine name %.80q is malformed", r.Name)
	}
	switch r.Isolation {
	case v1.Isolation_ISOLATION_UNSPECIFIED, v1.Isolation_ISOLATION_PROJECT, v1.Isolation_ISOLATION_SHARED:
	default:
		p.add("a machine is for a project or shared")
	}
	for what, z := range map[string]*v1.Size{"size": r.Size, "ceiling": r.Ceiling} {
		if z.GetCpuMilli() < 0 || z.GetMemoryBytes() < 0 || z.GetCpuMilli() > 1<<30 || z.GetMemoryBytes() > 1<<50 {
			p.add("%s is out of range", what)
		}
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	project := ""
	if r.Isolation != v1.Isolation_ISOLATION_SHARED {
		project = cmp.Or(r.Project, DefaultProject)
		if err := checkProjectName(project); err != nil {
			return nil, err
		}
	}
	s.firstHost(ctx)
	h, err := s.host(r.Host)
	if err != nil {
		return nil, err
	}
	m, err := s.ctl.CreateMachine(ctx, r, project, h)
	if err != nil {
		return nil, err
	}
	if r.Wait {
		m, err = s.waitMachine(ctx, m.Meta.Id, v1.MachineState_MACHINE_STATE_RUNNING)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(s.ctl.Hosts.MachineStatus(m)), nil
}

// change writes what fn does to a machine.
func (s *Server) changeMachine(ctx context.Context, word string, fn func(*v1.Machine) error) (*v1.Machine, error) {
	m, err := s.machine(word)
	if err != nil {
		return nil, err
	}
	return store.Update(ctx, s.store, store.KeyOf(m), func(m *v1.Machine) error {
		if m.Meta.Deleting {
			return fmt.Errorf("machine %s is being removed: %w", m.Meta.Name, errdefs.ErrFailedPrecondition)
		}
		before := proto.Clone(m)
		if err := fn(m); err != nil {
			return err
		}
		if !proto.Equal(before, m) {
			m.Meta.Generation++
		}
		return nil
	})
}

// waitMachine returns when a machine is in a state, for its newest intent.
func (s *Server) waitMachine(ctx context.Context, id string, want v1.MachineState) (*v1.Machine, error) {
	for {
		_, changed := s.store.Changed()
		m, err := store.ByID[*v1.Machine](s.store, store.Machines, id)
		if err != nil {
			return nil, err
		}
		st := m.GetStatus()
		if st.GetState() == want && st.GetObservedGeneration() >= m.Meta.Generation {
			return m, nil
		}
		if st.GetState() == v1.MachineState_MACHINE_STATE_FAILED && st.GetObservedGeneration() >= m.Meta.Generation {
			return nil, fmt.Errorf("machine %s failed: %s: %w", m.Meta.Name, st.Message, errdefs.ErrFailedPrecondition)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for machine %s: %w", m.Meta.Name, ctx.Err())
		case <-s.store.Failed():
			return nil, s.store.Err()
		case <-changed:
		}
	}
}

func (k *machines) setStopped(ctx context.Context, r *v1.MachineRequest, stop bool) (*connect.Response[v1.Machine], error) {
	s := k.s
	m, err := s.changeMachine(ctx, r.GetMachine(), func(m *v1.Machine) error {
		if stop && !r.Force {
			for _, c := range store.List[*v1.Container](s.store, "") {
				if c.GetAssignment().GetMachineId() == m.Meta.Id && !stopped(c) && !c.Meta.Deleting {
					return fmt.Errorf("container %s runs in machine %s: stop it first, or use --force: %w", c.Meta.Name, m.Meta.Name, errdefs.ErrFailedPrecondition)
				}
			}
		}
		m.Stopped = stop
		return nil
	})
	if err == nil && r.Wait {
		want := v1.MachineState_MACHINE_STATE_RUNNING
		if stop {
			want = v1.MachineState_MACHINE_STATE_STOPPED
		}
		m, err = s.waitMachine(ctx, m.Meta.Id, want)
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(s.ctl.Hosts.MachineStatus(m)), nil
}

// Start implements MachineService.
func (k *machines) Start(ctx context.Context, req *connect.Request[v1.MachineRequest]) (*connect.Response[v1.Machine], error) {
	return k.setStopped(ctx, req.Msg, false)
}

// Stop implements MachineService; with force also while containers run in it.
func (k *machines) Stop(ctx context.Context, req *connect.Request[v1.MachineRequest]) (*connect.Response[v1.Machine], error) {
	return k.setStopped(ctx, req.Msg, true)
}

// Remove implements MachineService; with force its containers get another place.
func (k *machines) Remove(ctx context.Context, req *connect.Request[v1.MachineRequest]) (*connect.Response[v1.MachineRequest], error) {
	s, r := k.s, req.Msg
	m, err := s.machine(r.GetMachine())
	if err != nil {
		return nil, err
	}
	id := m.Meta.Id
	err = s.again(func() error {
		m, err := store.ByID[*v1.Machine](s.store, store.Machines, id)
		if err != nil || m.Meta.Deleting {
			return nil
		}
		tx := s.store.Txn()
		for _, c := range store.List[*v1.Container](s.store, "") {
			if c.GetAssignment().GetMachineId() != id || c.Meta.Deleting {
				continue
			}
			if !r.Force {
				return fmt.Errorf("container %s is in machine %s: remove it first, or use --force to let it start elsewhere: %w", c.Meta.Name, m.Meta.Name, errdefs.ErrFailedPrecondition)
			}
			c = proto.Clone(c).(*v1.Container)
			c.Assignment = nil
			c.Status = &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: c.GetStatus().GetCreatedAt(), Message: "its machine is being removed"}
			tx.Update(c)
		}
		m = proto.Clone(m).(*v1.Machine)
		m.Meta.Deleting = true
		m.Meta.Generation++
		_, err = tx.Update(m).Commit(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	for r.Wait {
		_, changed := s.store.Changed()
		if _, err := store.ByID[*v1.Machine](s.store, store.Machines, id); err != nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.store.Failed():
			return nil, s.store.Err()
		case <-changed:
		}
	}
	return connect.NewResponse(&v1.MachineRequest{Machine: m.Meta.Name}), nil
}

// machineNeeds is what the containers of a machine reserve, with the guest's own
// overhead; except, when not empty, is left out.
func (s *Server) machineNeeds(m *v1.Machine, except string) *v1.Size {
	return control.Needs(s.store.Snapshot(), m, except)
}

// Resize implements MachineService.
func (k *machines) Resize(ctx context.Context, req *connect.Request[v1.ResizeMachineRequest]) (*connect.Response[v1.Machine], error) {
	s, r := k.s, req.Msg
	want := r.GetSize()
	if want.GetCpuMilli() < 0 || want.GetMemoryBytes() < 0 || (want.GetCpuMilli() == 0 && want.GetMemoryBytes() == 0) {
		return nil, fmt.Errorf("a new size is needed: %w", errdefs.ErrInvalidArgument)
	}
	m, err := s.ctl.Resize(ctx, func() (*v1.Machine, error) { return s.machine(r.Machine) }, want, s.machineNeeds)
	if err != nil {
		return nil, err
	}
	for r.Wait {
		_, changed := s.store.Changed()
		if m, err = store.ByID[*v1.Machine](s.store, store.Machines, m.Meta.Id); err != nil {
			return nil, err
		}
		st := m.GetStatus()
		if m.Stopped || st.GetObservedGeneration() >= m.Meta.Generation && hasSize(st.GetSize(), m.Size) {
			break
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("machine %s is %s now, %s is wanted: %w", m.Meta.Name, sizeText(st.GetSize()), sizeText(m.Size), ctx.Err())
		case <-s.store.Failed():
			return nil, s.store.Err()
		case <-changed:
		}
	}
	return connect.NewResponse(s.ctl.Hosts.MachineStatus(m)), nil
}

// Console implements MachineService.
func (k *machines) Console(ctx context.Context, in *bidiIn) error {
	first, err := in.Receive()
	if err != nil {
		return fmt.Errorf("console: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	m, err := k.s.machine(first.GetConsole().GetMachineId())
	if err != nil {
		return err
	}
	agent, err := k.s.ctl.Hosts.Await(ctx, m.HostId, hostPatience)
	if err != nil {
		return err
	}
	return proxy(ctx, in, func(ctx context.Context) *bidiOut { return agent.Console(ctx) },
		&v1.StreamInput{Kind: &v1.StreamInput_Console{Console: &v1.ConsoleSpec{MachineId: m.Meta.Id}}}, nil)
}

// hasSize says that a machine has what is wanted: the memory, and at least the CPUs,
// which come whole and can't be taken away everywhere.
func hasSize(have, want *v1.Size) bool {
	return have.GetMemoryBytes() == want.GetMemoryBytes() && have.GetCpuMilli() >= want.GetCpuMilli()
}
