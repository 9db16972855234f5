package main

import (
	"fmt"
	"time"

	"tandem/internal/planner"
)

const gib = 1 << 30

// tandem is the planner with all hosts, machines and containers.
type tandem struct {
	s     *planner.State
	boots int
}

func newTandem(hosts, perHost int) (*tandem, error) {
	t := &tandem{s: planner.New()}
	for h := range hosts {
		err := t.s.SetHost(planner.Host{
			ID:           hostName(h),
			Capacity:     planner.Size{CPU: hostCPU, Memory: hostMemory},
			MachineExtra: planner.Size{CPU: 100, Memory: 80 << 20},
			GuestExtra:   planner.Size{CPU: 50, Memory: 63 << 20},
			Base:         planner.Size{CPU: 1000, Memory: 256 << 20},
			Capabilities: planner.Capabilities{Grow: true, Shrink: true, MemoryStep: 2 << 20, CPUStep: 1000, BootSeconds: 0.6, GrowSeconds: 0.1},
		})
		if err != nil {
			return nil, err
		}
		for m := range machines {
			id := fmt.Sprintf("m-%05d-%d", h, m)
			err := t.s.SetMachine(planner.Machine{ID: id, Host: hostName(h), Project: project(h, m, hosts),
				Size: planner.Size{CPU: 8000, Memory: 16 * gib}, Ceiling: planner.Size{CPU: 32000, Memory: 64 * gib}})
			if err != nil {
				return nil, err
			}
			for c := range perHost / machines {
				r := resident(h, m, c, hosts)
				if err := t.s.SetContainer(planner.Container{ID: r.id, Project: r.project, Service: r.service, Machine: id,
					Request: planner.Size{CPU: r.cpu, Memory: r.memory}}); err != nil {
					return nil, err
				}
			}
		}
	}
	return t, nil
}

func (t *tandem) place(r request, shape string) (decision, whole time.Duration, err error) {
	c := planner.Container{ID: r.id, Project: r.project, Request: planner.Size{CPU: r.cpu, Memory: r.memory}}
	switch shape {
	case "spread":
		c.Service, c.Spread = r.service, "host"
	case "anti":
		c.Service = "alone"
		c.Anti = []planner.AntiRule{{Service: "alone", Layer: "host"}}
	}
	start := time.Now()
	if err := t.s.SetContainer(c); err != nil {
		return 0, 0, err
	}
	asked := time.Now()
	p, err := t.s.Decide(planner.Question{Place: []string{r.id}})
	decision = time.Since(asked)
	if err != nil {
		return 0, 0, err
	}
	if len(p.Unplaced) > 0 {
		return 0, 0, fmt.Errorf("%s: %s", r.id, p.Unplaced[0].Reason.Summary)
	}
	var names map[string]string
	for _, a := range p.Actions {
		if a.Kind == planner.Boot {
			t.boots++
			names = map[string]string{a.Machine: fmt.Sprintf("booted-%d", t.boots)}
		}
	}
	err = t.s.Commit(p, names)
	return decision, time.Since(start), err
}

func (t *tandem) remove(id string) error {
	t.s.RemoveContainer(id)
	return nil
}
