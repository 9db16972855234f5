package qemu

import (
	"context"
	"fmt"
	"time"

	"tandem/internal/hypervisor"
)

// Stop implements hypervisor.Driver. Stopping a machine that does not run is no
// error; one that crashed is then merely stopped.
func (d *Driver) Stop(ctx context.Context, id string, o hypervisor.StopOptions) error {
	m, err := d.find(id)
	if err != nil {
		return err
	}
	unlock, err := m.acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := m.stop(ctx, o); err != nil {
		return fmt.Errorf("stop machine %s: %w", id, err)
	}
	return nil
}

// stop ends the VMM. The caller holds ops.
func (m *machine) stop(ctx context.Context, o hypervisor.StopOptions) error {
	m.mu.Lock()
	h, exited, q := m.proc, m.exited, m.monitor
	m.mu.Unlock()
	if h == nil {
		if ph, _ := m.phase(); ph == phaseCrashed {
			return m.change(func(r *run) { r.Phase, r.Message = phaseStopped, "" })
		}
		return nil
	}
	// Said before it is done: whoever finds the VMM dead knows that it was wanted.
	if err := m.change(func(r *run) { r.Phase = phaseStopping }); err != nil {
		m.d.log.Error("record that a machine is to stop", "machine", m.id, "error", err) // a full disk must not keep machines running
	}
	if o.Grace > 0 && q != nil {
		grace, cancel := context.WithTimeout(ctx, o.Grace)
		defer cancel()
		if err := q.Do(grace, "system_powerdown", nil, nil); err == nil {
			select {
			case <-exited:
				return nil
			case <-grace.Done():
			}
		}
		// Let the VMM write out what it holds; a disk image is then as the guest left it.
		quit, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if q.Do(quit, "quit", nil, nil) == nil {
			select {
			case <-exited:
				return nil
			case <-quit.Done():
			}
		}
	}
	if err := h.kill(); err != nil {
		return fmt.Errorf("kill QEMU: %w", err)
	}
	select {
	case <-exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("QEMU does not end: %w", ctx.Err())
	}
}

// awaitEnd waits until the end of a VMM that is dead or dying has been dealt with.
func (m *machine) awaitEnd(ctx context.Context) error {
	m.mu.Lock()
	h, exited := m.proc, m.exited
	m.mu.Unlock()
	if h == nil || exited == nil {
		return nil
	}
	if err := h.kill(); err != nil {
		return fmt.Errorf("kill QEMU of machine %s: %w", m.id, err)
	}
	select {
	case <-exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("end of machine %s: %w", m.id, ctx.Err())
	}
}
