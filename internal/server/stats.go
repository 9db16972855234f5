package server

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// Stats implements ContainerService: one row a container (and machine, when
// asked for), once or every second.
func (k *containers) Stats(ctx context.Context, req *connect.Request[v1.StatsRequest], out *connect.ServerStream[v1.StatsResponse]) error {
	s, r := k.s, req.Msg
	before := map[string]*v1.Usage{}
	for first := true; ; first = false {
		cs := store.List[*v1.Container](s.store, "")
		if sel := r.GetSelector(); sel != nil && (len(sel.Containers) > 0 || sel.Project != "") {
			var err error
			if cs, err = s.selected(sel); err != nil {
				return err
			}
		}
		rows := s.usage(ctx, cs, r.Machines, first)
		for _, row := range rows {
			if b := before[row.Id]; b != nil {
				row.CpuPercent = percent(b, row.Usage)
			}
			before[row.Id] = row.Usage
		}
		if first && !r.Stream {
			// One row needs two measurements for its rate.
			if err := sleep(ctx, 300*time.Millisecond); err != nil {
				return err
			}
			rows = s.usage(ctx, cs, r.Machines, false)
			for _, row := range rows {
				row.CpuPercent = percent(before[row.Id], row.Usage)
			}
		}
		if err := out.Send(&v1.StatsResponse{Rows: rows}); err != nil {
			return err
		}
		if !r.Stream {
			return nil
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// percent is the CPU time between two measurements, of one core.
func percent(a, b *v1.Usage) float64 {
	dt := b.GetAt().AsTime().Sub(a.GetAt().AsTime())
	if a == nil || dt <= 0 || b.GetCpuUsageNs() < a.GetCpuUsageNs() {
		return 0
	}
	return float64(b.CpuUsageNs-a.CpuUsageNs) / float64(dt) * 100
}

// usage asks all hosts at once; one that does not answer is left out. With patient
// those that are away are waited for.
func (s *Server) usage(ctx context.Context, cs []*v1.Container, machines, patient bool) []*v1.StatsRow {
	byHost := map[string][]string{}
	byID := map[string]*v1.Container{}
	for _, c := range cs {
		st := c.GetStatus().GetState()
		if st == v1.ContainerState_CONTAINER_STATE_RUNNING || st == v1.ContainerState_CONTAINER_STATE_PAUSED {
			h := c.Assignment.GetHostId()
			byHost[h] = append(byHost[h], c.Meta.Id)
			byID[c.Meta.Id] = c
		}
	}
	names := map[string]string{}
	for _, m := range store.List[*v1.Machine](s.store, "") {
		names[m.Meta.Id] = m.Meta.Name
		if machines && byHost[m.HostId] == nil {
			byHost[m.HostId] = []string{}
		}
	}
	var mu sync.Mutex
	var rows []*v1.StatsRow
	var wg sync.WaitGroup
	for host, ids := range byHost {
		wg.Go(func() {
			patience := time.Duration(0)
			if patient {
				patience = hostPatience
			}
			agent, err := s.ctl.Hosts.Await(ctx, host, patience)
			if err != nil {
				return
			}
			actx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			res, err := agent.Stats(actx, connect.NewRequest(&v1.AgentStatsRequest{ContainerIds: ids, All: machines}))
			if err != nil {
				s.log.Debug("no stats of a host", "host", host, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for id, u := range res.Msg.Containers {
				if c := byID[id]; c != nil && u != nil {
					rows = append(rows, &v1.StatsRow{Id: id, Name: c.Meta.Name, Kind: "container", Machine: names[c.Assignment.GetMachineId()], Usage: u})
				}
			}
			for id, u := range res.Msg.Machines {
				if n := names[id]; machines && n != "" && u != nil {
					rows = append(rows, &v1.StatsRow{Id: id, Name: n, Kind: "machine", Machine: n, Usage: u})
				}
			}
		})
	}
	wg.Wait()
	slices.SortFunc(rows, func(a, b *v1.StatsRow) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Id, b.Id))
	})
	return rows
}
