package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

const (
	// unplugPatience is how long a guest may take to give a CPU back.
	unplugPatience = 15 * time.Second
	// memoryPatience is how long memory may stand still before what was got is it.
	memoryPatience = 4 * time.Second
)

// Resize implements hypervisor.Driver. A zero field of want leaves that
// dimension as it is; memory is rounded up to Capabilities().MemoryStep.
func (d *Driver) Resize(ctx context.Context, id string, want hypervisor.Size) (hypervisor.Size, error) {
	var got hypervisor.Size
	err := d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		var err error
		got, err = m.resize(ctx, q, want)
		if err != nil {
			return fmt.Errorf("resize machine %s: %w", id, err)
		}
		return nil
	})
	return got, err
}

func (m *machine) resize(ctx context.Context, q *qmp.Client, want hypervisor.Size) (hypervisor.Size, error) {
	now, err := querySize(ctx, q, m.spec.Ceiling)
	if err != nil {
		return now, err
	}
	if want.CPUs == 0 {
		want.CPUs = now.CPUs
	}
	if want.Memory == 0 {
		want.Memory = now.Memory
	}
	want.Memory = (want.Memory + memoryStep - 1) / memoryStep * memoryStep
	if c := m.spec.Ceiling; want.CPUs < baseCPUs || want.CPUs > c.CPUs || want.Memory < baseMemory || want.Memory > c.Memory {
		return now, fmt.Errorf("%d CPUs and %d MiB do not lie between %d, %d MiB and the machine's ceiling of %d, %d MiB: %w",
			want.CPUs, want.Memory/mib, baseCPUs, baseMemory/mib, c.CPUs, c.Memory/mib, errdefs.ErrOutOfRange)
	}
	if m.forTemplate() && want != now {
		return now, fmt.Errorf("a machine that will be a template stays as it is: %w", errdefs.ErrFailedPrecondition)
	}
	if !m.d.canShrinkCPU() {
		want.CPUs = max(want.CPUs, now.CPUs)
	}
	// The VMM's limit must never be below what the guest may use.
	m.setLimits(max(now.Memory, want.Memory), max(now.CPUs, want.CPUs))
	got := now
	var errs []error
	if got.Memory, err = setMemory(ctx, q, now.Memory, want.Memory); err != nil {
		errs = append(errs, err)
	}
	if got.CPUs, err = m.setCPUs(ctx, q, want.CPUs); err != nil {
		errs = append(errs, err)
	}
	// Look again: also after an error the size is what it is.
	if s, err := querySize(ctx, q, m.spec.Ceiling); err == nil {
		got = s
	}
	m.mu.Lock()
	m.size = got
	m.mu.Unlock()
	m.setLimits(got.Memory, got.CPUs)
	return got, errors.Join(errs...)
}

// canShrinkCPU is false under TCG: QEMU 7.2 corrupts its heap when a translated
// CPU is unplugged, and dies of it later, or when the next one is plugged in.
func (d *Driver) canShrinkCPU() bool { return d.host.accel == "kvm" }

func (m *machine) forTemplate() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.run.ForTemplate
}

func (m *machine) setLimits(memory int64, cpus int) {
	if g := m.d.groups; g != nil {
		if err := g.update(m.id, m.limits(memory, cpus)); err != nil {
			// A limit below what is used now is refused (v1): it stays as it was.
			m.d.log.Warn("limits of a machine's cgroup", "machine", m.id, "error", err)
		}
	}
}

// querySize asks QEMU for the machine's present size.
func querySize(ctx context.Context, q *qmp.Client, ceiling hypervisor.Size) (hypervisor.Size, error) {
	cpus, err := queryCPUs(ctx, q)
	if err != nil {
		return hypervisor.Size{}, err
	}
	s := hypervisor.Size{Memory: baseMemory}
	for _, c := range cpus {
		if c.Path != "" {
			s.CPUs++
		}
	}
	if ceiling.Memory > baseMemory {
		n, err := getMemory(ctx, q, "size")
		if err != nil {
			return s, err
		}
		s.Memory += n
	}
	return s, nil
}

type cpuSlot struct {
	Type  string         `json:"type"`
	Props map[string]any `json:"props"`
	Path  string         `json:"qom-path"` // empty: nothing is plugged in here
}

func (c cpuSlot) core() int {
	n, _ := c.Props["core-id"].(float64)
	return int(n)
}

// id is the device's name; the CPU that the machine starts with has none.
func (c cpuSlot) id() string { return fmt.Sprintf("cpu%d", c.core()) }

// queryCPUs returns the places for CPUs by core number.
func queryCPUs(ctx context.Context, q *qmp.Client) ([]cpuSlot, error) {
	var cpus []cpuSlot
	if err := q.Do(ctx, "query-hotpluggable-cpus", nil, &cpus); err != nil {
		return nil, err
	}
	sort.Slice(cpus, func(i, j int) bool { return cpus[i].core() < cpus[j].core() })
	return cpus, nil
}

// setCPUs plugs or unplugs until there are want; a guest that keeps a CPU longer
// than unplugPatience ends it without error, and so does a translator that has no
// room for another CPU now.
func (m *machine) setCPUs(ctx context.Context, q *qmp.Client, want int) (int, error) {
	cpus, err := queryCPUs(ctx, q)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, c := range cpus {
		if c.Path != "" {
			n++
		}
	}
	for i := 0; i < len(cpus) && n < want; i++ {
		c := cpus[i]
		if c.Path != "" {
			continue
		}
		if !m.mayPlug(ctx, q, n) {
			m.d.log.Info("no CPU is plugged in while the translation cache is nearly full", "machine", m.id, "cpus", n, "wanted", want)
			return n, nil
		}
		args := qmp.Args{"driver": c.Type, "id": c.id()}
		for k, v := range c.Props {
			args[k] = v
		}
		if err := q.Do(ctx, "device_add", args, nil); err != nil {
			return n, fmt.Errorf("add a CPU: %w", err)
		}
		n++
	}
	for i := len(cpus) - 1; i >= baseCPUs && n > want; i-- {
		c := cpus[i]
		if c.Path == "" {
			continue
		}
		patience, cancel := context.WithTimeout(ctx, unplugPatience)
		err := unplug(patience, q, c.id())
		over := patience.Err() != nil && ctx.Err() == nil
		cancel()
		if over {
			return n, nil // the guest has not given it back: ask again
		}
		if err != nil {
			return n, fmt.Errorf("remove a CPU: %w", err)
		}
		n--
	}
	return n, nil
}

func getMemory(ctx context.Context, q *qmp.Client, property string) (int64, error) {
	var n json.Number
	if err := q.Do(ctx, "qom-get", qmp.Args{"path": "/machine/peripheral/vm0", "property": property}, &n); err != nil {
		return 0, err
	}
	return n.Int64()
}

func requestMemory(ctx context.Context, q *qmp.Client, n int64) error {
	return q.Do(ctx, "qom-set", qmp.Args{"path": "/machine/peripheral/vm0", "property": "requested-size", "value": n}, nil)
}

// setMemory asks the guest for a size and waits for as long as it makes progress.
// When it stops short, the request is taken back to what was got: so nothing
// changes behind our back later, and asking again is a new request, which a
// guest follows at once.
func setMemory(ctx context.Context, q *qmp.Client, now, want int64) (int64, error) {
	if now == want {
		return now, nil
	}
	target := want - baseMemory
	if asked, err := getMemory(ctx, q, "requested-size"); err != nil {
		return now, err
	} else if asked == target { // left by a driver that was killed: make it new again
		if err := requestMemory(ctx, q, now-baseMemory); err != nil {
			return now, err
		}
	}
	sub := q.Subscribe()
	defer sub.Close()
	if err := requestMemory(ctx, q, target); err != nil {
		return now, fmt.Errorf("ask for %d MiB: %w", want/mib, err)
	}
	last, since := now-baseMemory, time.Now()
	var waitErr error
	for {
		n, err := getMemory(ctx, q, "size")
		if err != nil {
			waitErr = err
			break
		}
		if n == target {
			return want, nil
		}
		if n != last {
			last, since = n, time.Now()
		} else if time.Since(since) > memoryPatience {
			break
		}
		tick, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		_, _ = sub.Wait(tick, func(e qmp.Event) bool { return e.Name == "MEMORY_DEVICE_SIZE_CHANGE" })
		cancel()
		if ctx.Err() != nil {
			break
		}
	}
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if n, err := getMemory(rctx, q, "size"); err == nil {
		last = n
		if err := requestMemory(rctx, q, n); err != nil && waitErr == nil {
			waitErr = err
		}
	}
	return baseMemory + last, waitErr
}

// unplug removes a device and waits until the guest has let go of it.
func unplug(ctx context.Context, q *qmp.Client, id string) error {
	sub := q.Subscribe()
	defer sub.Close()
	for {
		err := q.Do(ctx, "device_del", qmp.Args{"id": id}, nil)
		if qmp.IsNotFound(err) {
			return nil
		}
		if err != nil && !qmp.IsRefused(err) { // refused: an unplug is under way already
			return err
		}
		for asked := time.Now(); time.Since(asked) < 3*time.Second; {
			tick, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			_, err := sub.Wait(tick, func(e qmp.Event) bool { return e.Name == "DEVICE_DELETED" && named(e, id) })
			cancel()
			if err == nil {
				return nil
			}
			if ctx.Err() != nil {
				return fmt.Errorf("the guest has not released %s: %w", id, ctx.Err())
			}
			if there, err := deviceExists(ctx, q, id); err != nil {
				return err
			} else if !there {
				return nil
			}
		}
	}
}

func named(e qmp.Event, id string) bool {
	var data struct {
		Device string `json:"device"` // absent for parts of a device
	}
	return e.Decode(&data) == nil && data.Device == id
}

func deviceExists(ctx context.Context, q *qmp.Client, id string) (bool, error) {
	names, err := devices(ctx, q)
	return names[id], err
}

// devices are the ids of all devices that were given one.
func devices(ctx context.Context, q *qmp.Client) (map[string]bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	if err := q.Do(ctx, "qom-list", qmp.Args{"path": "/machine/peripheral"}, &list); err != nil {
		return nil, err
	}
	names := make(map[string]bool, len(list))
	for _, e := range list {
		names[e.Name] = true
	}
	return names, nil
}
