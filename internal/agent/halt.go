package agent

import (
	"context"
	"fmt"
	"maps"
	"sync"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// Halt ends all machines and containers of this host in order, because the host is
// going down: containers get their signal and grace, guests write down what they
// keep, so that writable layers are there after the boot, when a new agent starts all
// again. The intent stays as it is. This agent starts nothing any more; end its Run
// after Halt. It returns when all has ended or with ctx, and may be called while Run
// runs.
func (a *Agent) Halt(ctx context.Context) error {
	a.halting.Store(true)
	a.log.Info("the host is going down: everything is stopped")
	a.mu.Lock()
	machines := maps.Clone(a.machines)
	a.mu.Unlock()
	for _, m := range machines {
		m.halt()
	}
	for {
		running, err := a.haltMetal(ctx)
		if err != nil {
			a.log.Warn("containers on metal", "error", err)
		}
		a.mu.Lock()
		machines = maps.Clone(a.machines)
		a.mu.Unlock()
		for _, m := range machines {
			if !m.rests() {
				running++
			}
		}
		list, err := a.o.Driver.List(ctx)
		if err != nil {
			return fmt.Errorf("halt: %w", err)
		}
		for _, st := range list { // those without an actor, too
			if (st.State == hypervisor.Running || st.State == hypervisor.Paused) && !templateMachine(st.Spec.ID) && machines[st.Spec.ID] == nil {
				running++
			}
		}
		if running == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("halt: %d machines and containers still run: %w", running, ctx.Err())
		case <-a.o.Clock.After(100 * time.Millisecond):
		}
	}
}

// haltMetal stops the containers on metal, all at once, and says how many ran. Their
// actors have no session any more and so see no end that they would act on.
func (a *Agent) haltMetal(ctx context.Context) (int, error) {
	if a.metal == nil {
		return 0, nil
	}
	a.metal.close(nil, "the host is going down")
	list, err := a.o.Metal.List(ctx)
	if err != nil {
		return 1, err
	}
	grace := map[string]time.Duration{}
	for _, c := range a.current().GetContainers() {
		grace[c.Id] = a.grace(c)
	}
	var wg sync.WaitGroup
	running := 0
	for _, st := range list {
		switch st.State {
		case v1.ContainerState_CONTAINER_STATE_RUNNING, v1.ContainerState_CONTAINER_STATE_PAUSED:
		default:
			continue
		}
		running++
		wg.Go(func() {
			g, known := grace[st.Id]
			if !known {
				g = a.o.Tuning.StopGrace
			}
			if _, err := a.o.Metal.Stop(ctx, st.Id, "", g); err != nil && !errdefs.IsNotFound(err) {
				a.log.Warn("container is not stopped", "container", st.Id, "error", err)
			}
		})
	}
	wg.Wait()
	return running, nil
}

// halt has the machine's actor end it, whatever it is doing.
func (m *machine) halt() {
	m.mu.Lock()
	m.changed = true
	if m.interrupt != nil {
		m.interrupt()
	}
	m.mu.Unlock()
	m.poke()
}

// rests is true when the actor has written down how its machine ended: nobody may go
// before, or writable layers that are whole are taken for broken ones after the boot.
func (m *machine) rests() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.atRest
}

// halted is what is wanted of a machine while the host goes down.
func (m *machine) halted(want *v1.MachineAssignment) *v1.MachineAssignment {
	if want == nil || want.Stopped || !m.a.halting.Load() {
		return want
	}
	want = proto.CloneOf(want)
	want.Stopped, want.RestartGeneration = true, m.rec.RestartGen
	return want
}
