package control

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
)

// measureTimeout bounds how long hosts are waited for that are asked what their
// containers use.
const measureTimeout = 10 * time.Second

// measure asks the hosts of containers that run, all at once, what these use. What
// does not answer is left out.
func (c *Controller) measure(ctx context.Context, list []*v1.Container) map[string]*v1.Usage {
	byHost := map[string][]string{}
	for _, x := range list {
		if x.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING && x.GetAssignment().GetHostId() != "" {
			byHost[x.Assignment.HostId] = append(byHost[x.Assignment.HostId], x.Meta.Id)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, measureTimeout)
	defer cancel()
	out := map[string]*v1.Usage{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for host, ids := range byHost {
		agent, err := c.Hosts.Client(host)
		if err != nil {
			continue
		}
		asked := make(map[string]bool, len(ids))
		for _, id := range ids {
			asked[id] = true
		}
		wg.Go(func() {
			res, err := agent.Stats(ctx, connect.NewRequest(&v1.AgentStatsRequest{ContainerIds: ids}))
			if err != nil {
				c.log.Debug("no usage of a host's containers", "host", host, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for id, u := range res.Msg.Containers {
				if asked[id] && u.GetAt() != nil {
					out[id] = u
				}
			}
		})
	}
	wg.Wait()
	return out
}

// rate is the CPU that was used between two measurements, in thousandths of a core;
// false when they don't tell: too close, or of different starts.
func rate(a, b *v1.Usage) (milli float64, ok bool) {
	dt := b.GetAt().AsTime().Sub(a.GetAt().AsTime())
	if a.GetAt() == nil || b.GetAt() == nil || dt < time.Second || b.CpuUsageNs < a.CpuUsageNs {
		return 0, false
	}
	return float64(b.CpuUsageNs-a.CpuUsageNs) / float64(dt) * 1000, true
}
