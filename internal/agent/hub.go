package agent

import (
	"context"
	"maps"
	"slices"
	"sync"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// maxEvents bounds what one reader may be behind in events; older ones go.
const maxEvents = 1000

// hub keeps the latest status of everything and tells its readers what changed.
// A reader holds the ids of what it has not seen, never copies: a slow one gets
// several changes folded into one and costs no more than a fast one.
type hub struct {
	mu         sync.Mutex
	facts      *v1.HostFacts
	machines   map[string]*v1.MachineStatus
	containers map[string]*v1.ContainerStatus
	volumes    map[string]*v1.VolumeStatus
	deleted    map[string]bool // volumes that were to be removed and are gone
	progress   map[string]*v1.Progress
	revision   uint64
	readers    map[*reader]bool
}

// reader is one Watch stream's view.
type reader struct {
	h    *hub
	wake chan struct{}

	full                          bool
	facts                         bool
	machines, containers, volumes map[string]bool
	progress                      map[string]*v1.Progress
	events                        []*v1.Event
	revision                      bool
}

func newHub() *hub {
	return &hub{
		machines: map[string]*v1.MachineStatus{}, containers: map[string]*v1.ContainerStatus{},
		volumes: map[string]*v1.VolumeStatus{}, deleted: map[string]bool{}, progress: map[string]*v1.Progress{}, readers: map[*reader]bool{},
	}
}

// each marks something as changed for every reader. The caller holds h.mu.
func (h *hub) each(fn func(*reader)) {
	for r := range h.readers {
		fn(r)
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

func (h *hub) setFacts(f *v1.HostFacts) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !proto.Equal(h.facts, f) {
		h.facts = f
		h.each(func(r *reader) { r.facts = true })
	}
}

func (h *hub) setRevision(rev uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.revision = rev
	h.each(func(r *reader) { r.revision = true })
}

// set stores a status; nil means that the thing is gone for good.
func set[T proto.Message](h *hub, all map[string]T, id string, st T, gone bool, dirty func(*reader) map[string]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, had := all[id]
	switch {
	case gone && !had, !gone && had && proto.Equal(old, st):
		return
	case gone:
		delete(all, id)
	default:
		all[id] = st
	}
	h.each(func(r *reader) { dirty(r)[id] = true })
}

func (h *hub) setMachine(st *v1.MachineStatus) {
	set(h, h.machines, st.Id, st, false, func(r *reader) map[string]bool { return r.machines })
}
func (h *hub) removeMachine(id string) {
	set(h, h.machines, id, nil, true, func(r *reader) map[string]bool { return r.machines })
}
func (h *hub) setContainer(st *v1.ContainerStatus) {
	set(h, h.containers, st.Id, st, false, func(r *reader) map[string]bool { return r.containers })
}
func (h *hub) removeContainer(id string) {
	set(h, h.containers, id, nil, true, func(r *reader) map[string]bool { return r.containers })
}
func (h *hub) setVolume(st *v1.VolumeStatus) {
	set(h, h.volumes, st.Id, st, false, func(r *reader) map[string]bool { return r.volumes })
}

// removeVolume tells, also those who come later, that a volume is gone as it was
// asked for.
func (h *hub) removeVolume(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.deleted[id] {
		return
	}
	h.deleted[id] = true
	delete(h.volumes, id)
	h.each(func(r *reader) { r.volumes[id] = true })
}

// forgetVolumes drops what is neither kept nor to be removed, as far as anybody
// asks.
func (h *hub) forgetVolumes(wanted, deleted map[string]bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(h.deleted, func(id string, _ bool) bool { return !deleted[id] })
	maps.DeleteFunc(h.volumes, func(id string, _ *v1.VolumeStatus) bool { return !wanted[id] && !deleted[id] })
}

// setProgress stores a step of long work; a done one is told once and forgotten.
func (h *hub) setProgress(p *v1.Progress) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.Done || p.Failed {
		delete(h.progress, p.Id)
	} else {
		h.progress[p.Id] = p
	}
	h.each(func(r *reader) { r.progress[p.Id] = p })
}

func (h *hub) event(e *v1.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.each(func(r *reader) {
		if len(r.events) >= maxEvents {
			r.events = slices.Delete(r.events, 0, maxEvents/10)
		}
		r.events = append(r.events, e)
	})
}

// watch begins a reader; close it with leave.
func (h *hub) watch() *reader {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := &reader{h: h, wake: make(chan struct{}, 1), full: true}
	r.clear()
	r.wake <- struct{}{}
	h.readers[r] = true
	return r
}

func (r *reader) leave() {
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	delete(r.h.readers, r)
}

func (r *reader) clear() {
	r.facts, r.revision, r.events = false, false, nil
	r.machines, r.containers, r.volumes = map[string]bool{}, map[string]bool{}, map[string]bool{}
	r.progress = map[string]*v1.Progress{}
}

// next waits for changes and returns them as one message.
func (r *reader) next(ctx context.Context) (*v1.HostStatus, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-r.wake:
	}
	h := r.h
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &v1.HostStatus{AppliedRevision: h.revision, Events: r.events}
	if r.full {
		out.Full, out.Facts = true, h.facts
		out.Machines = sortedValues(h.machines)
		out.Containers = sortedValues(h.containers)
		out.Volumes, out.RemovedVolumes = sortedValues(h.volumes), slices.Sorted(maps.Keys(h.deleted))
		out.Progress = sortedValues(h.progress)
		r.full = false
		r.clear()
		return out, nil
	}
	if r.facts {
		out.Facts = h.facts
	}
	out.Machines, out.RemovedMachines = pick(h.machines, r.machines)
	out.Containers, out.RemovedContainers = pick(h.containers, r.containers)
	out.Volumes, out.RemovedVolumes = pick(h.volumes, r.volumes)
	out.RemovedVolumes = slices.DeleteFunc(out.RemovedVolumes, func(id string) bool { return !h.deleted[id] })
	out.Progress = sortedValues(r.progress)
	r.clear()
	return out, nil
}

func pick[T any](all map[string]T, dirty map[string]bool) (changed []T, removed []string) {
	for _, id := range slices.Sorted(maps.Keys(dirty)) {
		if v, ok := all[id]; ok {
			changed = append(changed, v)
		} else {
			removed = append(removed, id)
		}
	}
	return changed, removed
}

func sortedValues[T any](m map[string]T) []T {
	out := make([]T, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}
