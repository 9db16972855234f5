package fakehost

import (
	"time"

	v1 "tandem/api/tandem/v1"
)

// Load is what the running containers of an image use.
type Load struct {
	CPUMilli    int64   // all of them together, in thousandths of a core
	MemoryBytes int64   // each
	Pressure    float64 // each, percent
	NoPressure  bool    // the kernel tells none
	Silent      bool    // nothing is told of them at all
}

type load struct {
	images map[string]Load
	used   map[string]time.Duration // CPU time by container's id
	at     time.Time                // up to then
}

// Load sets what an image's containers use from now on.
func (h *Host) Load(image string, l Load) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.work(h.opts.Clock.Now())
	if h.load.images == nil {
		h.load.images = map[string]Load{}
	}
	h.load.images[image] = l
}

// work lets the containers work until now.
func (h *Host) work(now time.Time) {
	if h.load.used == nil {
		h.load.used = map[string]time.Duration{}
	}
	d := now.Sub(h.load.at)
	h.load.at = now
	running := map[string][]string{}
	for id, c := range h.containers {
		if c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING {
			running[c.a.Spec.Image] = append(running[c.a.Spec.Image], id)
		}
	}
	for image, l := range h.load.images {
		for _, id := range running[image] {
			h.load.used[id] += time.Duration(float64(d) * float64(l.CPUMilli) / 1000 / float64(len(running[image])))
		}
	}
}

// loaded is what a container with a load has used; nil for one without.
func (h *Host) loaded(id string, c *container) *v1.Usage {
	l, ok := h.load.images[c.a.Spec.Image]
	if !ok {
		return nil
	}
	if l.Silent {
		return &v1.Usage{}
	}
	return &v1.Usage{At: h.now(), CpuUsageNs: uint64(h.load.used[id]), MemoryBytes: l.MemoryBytes, CpuPressure: l.Pressure, PressureKnown: !l.NoPressure}
}
