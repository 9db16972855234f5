package control

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/docker/go-units"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/files"
	"tandem/internal/store"
)

const (
	observeEvery = time.Minute
	saveEvery    = 10 * time.Minute
	// A recommendation is one to rely on after so many samples and so long.
	enoughSamples = 60
	enoughSpan    = time.Hour
	// What is recommended is so much more than what was seen, and not less than a
	// container can start with.
	usageMargin     = 1.15
	oomMargin       = 1.2 // more than its limit, for a container that died of it
	leastCPU        = 10  // thousandths of a core; also the step
	leastMemory     = 8 << 20
	maxHistories    = 10_000
	maxHistoryBytes = 256 << 20 // of the file
)

// usages keeps what services use, within bounds, and writes it down now and then: a
// restart loses ten minutes of it at most.
type usages struct {
	mu       sync.Mutex
	loaded   bool
	next     time.Time
	saved    time.Time
	services map[string]*usageHistory // by service's id
	last     map[string]*v1.Usage     // by container's id
}

// observe measures what all services use, once a minute.
func (c *Controller) observe(ctx context.Context) (time.Duration, error) {
	k := &c.usages
	k.mu.Lock()
	defer k.mu.Unlock()
	now := c.clock.Now()
	if !k.loaded {
		c.loadUsage(now)
	}
	snap := c.store.Snapshot()
	services := map[svcKey]*v1.Service{}
	known := map[string]bool{}
	for _, s := range snap.Services {
		services[svcKey{s.Meta.Project, s.Meta.Name}] = s
		known[s.Meta.Id] = true
	}
	if !snap.Unreadable(store.Services) {
		maps.DeleteFunc(k.services, func(id string, _ *usageHistory) bool { return !known[id] })
	}
	if len(snap.Services) == 0 {
		k.last = nil
		return 0, nil
	}
	if left := k.next.Sub(now); left > 0 && left <= observeEvery {
		return left, nil
	}
	k.next = now.Add(observeEvery)
	var list []*v1.Container
	for _, x := range snap.Containers {
		if services[svcKey{x.Meta.Project, x.Service}] != nil && !x.OneOff && !x.Meta.Deleting && !x.Paused {
			list = append(list, x)
		}
	}
	k.mu.Unlock() // hosts may take long to answer
	use := c.measure(ctx, list)
	k.mu.Lock()
	for _, x := range list {
		a, b := k.last[x.Meta.Id], use[x.Meta.Id]
		milli, ok := rate(a, b)
		if !ok || b.MemoryBytes < 0 {
			continue
		}
		s := services[svcKey{x.Meta.Project, x.Service}]
		h := k.services[s.Meta.Id]
		if h == nil {
			if len(k.services) >= maxHistories {
				continue
			}
			h = newUsageHistory(s.Meta.Project, s.Meta.Name, now)
			k.services[s.Meta.Id] = h
		}
		memory := b.MemoryBytes
		if b.OomKills > a.OomKills {
			memory = max(memory, int64(oomMargin*float64(b.MemoryLimitBytes)))
		}
		h.add(now, milli, memory)
	}
	k.last = use
	if now.Sub(k.saved) >= saveEvery || now.Before(k.saved) {
		k.saved = now
		if err := c.saveUsage(); err != nil {
			c.log.Warn("what services use can't be written down; recommendations begin anew after a restart", "err", err)
		}
	}
	return observeEvery, nil
}

// usageFile is how histories are written down.
type usageFile struct {
	Format   int                      `json:"format"`
	Services map[string]*usageHistory `json:"services"`
}

const usageFormat = 1

func (c *Controller) saveUsage() error {
	if c.opts.UsageFile == "" {
		return nil
	}
	b, err := json.Marshal(usageFile{usageFormat, c.usages.services})
	if err != nil {
		return err
	}
	return files.Replace(c.opts.UsageFile, b, 0o600)
}

// loadUsage reads what an earlier server wrote. What can't be read is left out, said,
// and begins anew.
func (c *Controller) loadUsage(now time.Time) {
	k := &c.usages
	k.loaded, k.saved, k.services = true, now, map[string]*usageHistory{}
	if c.opts.UsageFile == "" {
		return
	}
	f, err := readUsage(c.opts.UsageFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		c.log.Warn("what services used can't be read; recommendations begin anew", "file", c.opts.UsageFile, "err", err)
		return
	}
	for id, h := range f.Services {
		if err := h.check(); err != nil {
			c.log.Warn("what a service used can't be read; it begins anew", "file", c.opts.UsageFile, "service", id, "err", err)
			continue
		}
		k.services[id] = h
	}
}

func readUsage(path string) (*usageFile, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, maxHistoryBytes+1))
	if err != nil {
		return nil, err
	}
	f := &usageFile{}
	if len(b) > maxHistoryBytes {
		return nil, fmt.Errorf("%s has more than %d bytes", filepath.Base(path), maxHistoryBytes)
	}
	if err := json.Unmarshal(b, f); err != nil {
		return nil, err
	}
	if f.Format != usageFormat || len(f.Services) > maxHistories {
		return nil, fmt.Errorf("format %d with %d services is not known", f.Format, len(f.Services))
	}
	return f, nil
}

// closeUsage writes down what was seen since the last time.
func (c *Controller) closeUsage() {
	c.usages.mu.Lock()
	defer c.usages.mu.Unlock()
	if c.usages.loaded {
		if err := c.saveUsage(); err != nil {
			c.log.Warn("what services use can't be written down", "err", err)
		}
	}
}

// Recommend says what each container of a service should reserve.
func (c *Controller) Recommend(s *v1.Service) *v1.Recommendation {
	c.usages.mu.Lock()
	defer c.usages.mu.Unlock()
	r := recommend(s.Meta, s.GetTemplate().GetResources(), c.usages.services[s.Meta.Id])
	r.InForce = s.Applied
	return r
}

func recommend(meta *v1.Meta, r *v1.Resources, h *usageHistory) *v1.Recommendation {
	out := &v1.Recommendation{Project: meta.GetProject(), Service: meta.GetName(), Reserved: Request(r), Recommended: &v1.Size{}, Span: durationpb.New(0)}
	if h == nil {
		out.Text = "nothing was seen of it yet: ask again when it has run for a while"
		return out
	}
	span := h.Last.Sub(h.Begin)
	out.Samples, out.Span = h.Samples, durationpb.New(span)
	out.Enough = h.Samples >= enoughSamples && span >= enoughSpan
	out.CpuP50Milli, out.CpuP95Milli = int64(math.Ceil(h.CPU.percentile(0.5))), int64(math.Ceil(h.CPU.percentile(0.95)))
	out.MemoryP99Bytes, out.MemoryMaxBytes = int64(h.Memory.percentile(0.99)), h.top()
	up := func(n float64, least, step int64) int64 {
		return max(least, (int64(math.Ceil(n-1e-6))+step-1)/step*step)
	}
	// A bucket's end may lie above all that was ever seen; the largest does not.
	memory := cmp.Or(h.top(), out.MemoryP99Bytes)
	out.Recommended.CpuMilli = up(usageMargin*float64(out.CpuP95Milli), leastCPU, leastCPU)
	out.Recommended.MemoryBytes = up(usageMargin*float64(memory), leastMemory, 1<<20)
	out.MemoryP99Bytes = min(out.MemoryP99Bytes, memory)
	capped := ""
	if l := r.GetCpuMilliLimit(); l > 0 && out.Recommended.CpuMilli > l {
		out.Recommended.CpuMilli, capped = l, "; its CPU limit is the bound"
	}
	if l := r.GetMemoryBytesLimit(); l > 0 && out.Recommended.MemoryBytes > l {
		out.Recommended.MemoryBytes, capped = l, capped+"; its memory limit is the bound, and may be too low"
	}
	out.Text = fmt.Sprintf("reserve %s: it used at most %s in 95 %% of the time and never more than %s, in %d samples over %s%s",
		text(out.Recommended), cpuWord(out.CpuP95Milli), units.BytesSize(float64(memory)), h.Samples, span.Round(time.Minute), capped)
	if !out.Enough {
		out.Text += fmt.Sprintf("; that is too little to rely on (%d samples over %s are enough)", enoughSamples, enoughSpan)
	}
	return out
}

func cpuWord(milli int64) string { return fmt.Sprintf("%g CPU", float64(milli)/1000) }
