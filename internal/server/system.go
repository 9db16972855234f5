package server

import (
	"cmp"
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

type system struct{ s *Server }

// Version implements SystemService.
func (k *system) Version(context.Context, *connect.Request[v1.VersionRequest]) (*connect.Response[v1.VersionResponse], error) {
	return connect.NewResponse(&v1.VersionResponse{Version: k.s.opts.Version, ClusterId: k.s.store.ClusterID(), Protocol: control.ProtocolVersion,
		GoVersion: runtime.Version(), Revision: k.s.store.Revision()}), nil
}

// Doctor implements SystemService: what every host says of itself, and what the
// server knows to be wrong.
func (k *system) Doctor(ctx context.Context, _ *connect.Request[v1.DoctorRequest]) (*connect.Response[v1.DoctorResponse], error) {
	s := k.s
	out := &v1.DoctorResponse{}
	bad := s.store.Corrupt()
	for key, err := range bad {
		out.Findings = append(out.Findings, &v1.Finding{Code: "record-corrupt", Severity: "error", Title: key.String() + " is corrupt", Detail: err.Error(),
			Remedy: "`tandem state purge " + string(key.Kind) + " " + strings.TrimPrefix(key.Project+"/"+key.Name, "/") + "` removes the record; or restore a backup of the state"})
	}
	slices.SortFunc(out.Findings, func(a, b *v1.Finding) int { return strings.Compare(a.Title, b.Title) })
	if sp, _ := s.store.Space(); sp.Short {
		out.Findings = append(out.Findings, &v1.Finding{Code: "state-disk-full", Severity: "error", Title: "the disk of the state directory is full",
			Detail: fmt.Sprintf("no space left: %d MiB of %d are free in %s; nothing new is taken, what runs goes on", sp.Free>>20, sp.Need>>20, sp.Dir),
			Remedy: "free some space on it (`tandem image prune`, `tandem volume rm`); a restart is not needed"})
	}
	for _, h := range store.List[*v1.Host](s.store, "") {
		if !h.Connected {
			out.Findings = append(out.Findings, &v1.Finding{Code: "host-away", Severity: "error", Title: "host " + h.Meta.Name + " is not connected",
				Detail: "last seen " + h.LastSeen.AsTime().Format(time.RFC3339), Remedy: "start `tandem agent` on it"})
		}
	}
	ts, err := s.targets(ctx, "")
	if err != nil {
		out.Findings = append(out.Findings, &v1.Finding{Code: "no-host", Severity: "error", Title: "no host is connected", Remedy: "start `tandem agent`, or `tandem serve` with its own agent"})
		return connect.NewResponse(out), nil
	}
	var mu sync.Mutex
	err = each(ts, false, func(t target) error {
		res, err := t.client.Doctor(ctx, connect.NewRequest(&v1.DoctorRequest{}))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, f := range res.Msg.Findings {
			if len(ts) > 1 {
				f.Title = t.name + ": " + f.Title
			}
			out.Findings = append(out.Findings, f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// Events implements SystemService: what is kept, from since on, and with follow
// what comes.
func (k *system) Events(ctx context.Context, req *connect.Request[v1.EventsRequest], out *connect.ServerStream[v1.Event]) error {
	s, r := k.s, req.Msg
	next := uint64(0)
	if r.Since == nil && r.Follow {
		next = s.ctl.Events.End()
	}
	var deadline <-chan time.Time
	if r.Until != nil {
		d := r.Until.AsTime().Sub(s.clock.Now())
		if d > 0 && r.Follow {
			deadline = s.clock.After(d)
		}
	}
	for {
		evs, n, more := s.ctl.Events.From(next)
		next = n
		for _, e := range evs {
			at := e.At.AsTime()
			if r.Since != nil && at.Before(r.Since.AsTime()) || r.Until != nil && at.After(r.Until.AsTime()) || r.Project != "" && e.Project != r.Project {
				continue
			}
			if err := out.Send(e); err != nil {
				return err
			}
		}
		if !r.Follow || r.Until != nil && deadline == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline:
			return nil
		case <-more:
		}
	}
}

// Hosts implements SystemService.
func (k *system) Hosts(context.Context, *connect.Request[v1.ListHostsRequest]) (*connect.Response[v1.ListHostsResponse], error) {
	l := store.List[*v1.Host](k.s.store, "")
	for i, h := range l {
		if t, ok := k.s.ctl.Hosts.LastSeen(h.Meta.Id); ok {
			h = proto.Clone(h).(*v1.Host)
			h.LastSeen = timestamppb.New(t)
			l[i] = h
		}
	}
	return connect.NewResponse(&v1.ListHostsResponse{Hosts: l}), nil
}

// Plan implements SystemService: where the planner would put what has no place.
func (k *system) Plan(ctx context.Context, req *connect.Request[v1.PlanRequest]) (*connect.Response[v1.Plan], error) {
	s := k.s
	out := &v1.Plan{Revision: s.store.Revision()}
	var fresh []*v1.Container
	for _, c := range store.List[*v1.Container](s.store, req.Msg.GetProject()) {
		if c.GetAssignment().GetHostId() == "" && !c.Stopped && !c.Meta.Deleting {
			fresh = append(fresh, c)
		}
	}
	p, err := s.ctl.Preview(ctx, fresh, nil)
	if err != nil {
		return nil, err
	}
	s.addPlan(out, p, nil)
	return connect.NewResponse(out), nil
}

// Explain implements SystemService: why a container is where it is, or nowhere.
func (k *system) Explain(_ context.Context, req *connect.Request[v1.ContainerRequest]) (*connect.Response[v1.ExplainResponse], error) {
	s := k.s
	c, err := s.container(req.Msg.GetContainer(), req.Msg.GetProject())
	if err != nil {
		return nil, err
	}
	out := &v1.ExplainResponse{Container: public(c), Reason: c.GetAssignment().GetReason()}
	if a := c.GetAssignment(); a.GetHostId() != "" {
		out.Machine, _ = store.ByID[*v1.Machine](s.store, store.Machines, a.MachineId)
		if out.Machine != nil {
			out.Machine = s.ctl.Hosts.MachineStatus(out.Machine)
		}
		out.Host, _ = store.ByID[*v1.Host](s.store, store.Hosts, a.HostId)
	} else {
		out.Reason = s.ctl.Unplaced(c.Meta.Id)
	}
	for _, id := range s.ctl.Standby(c.Meta.Id) {
		if h, err := store.ByID[*v1.Host](s.store, store.Hosts, id); err == nil {
			out.Standby = append(out.Standby, h.Meta.Name)
		}
	}
	out.Scale = s.ctl.ScaleOf(c)
	out.Text = explain(out, s.ctl.WaitsFor(c, s.store.Snapshot()))
	return connect.NewResponse(out), nil
}

// explain puts it into words for people.
func explain(r *v1.ExplainResponse, waits string) string {
	var b strings.Builder
	c := r.Container
	st := c.GetStatus()
	fmt.Fprintf(&b, "%s is %s", c.Meta.Name, stateWord(c))
	switch {
	case r.Machine != nil && r.Host != nil:
		fmt.Fprintf(&b, " in machine %s (%s) on host %s", r.Machine.Meta.Name, sizeText(cmp.Or(r.Machine.GetStatus().GetSize(), r.Machine.Size)), r.Host.Meta.Name)
	case r.Host != nil:
		fmt.Fprintf(&b, " on host %s itself", r.Host.Meta.Name)
	case c.Stopped:
		b.WriteString(": it gets a place when it is started")
	default:
		b.WriteString(" and has no place")
	}
	b.WriteString(".\n")
	if st.GetMessage() != "" {
		fmt.Fprintf(&b, "It says: %s.\n", strings.TrimSuffix(st.Message, "."))
	}
	if waits != "" && !c.Stopped {
		fmt.Fprintf(&b, "It waits for %s.\n", waits)
	}
	if r.Scale != nil {
		b.WriteString(scaleText(r.Scale))
	}
	if len(r.Standby) > 0 {
		fmt.Fprintf(&b, "When its host is lost it starts again on %s: the room is kept.\n", strings.Join(r.Standby, ", then "))
	}
	if r.Reason == nil {
		return b.String()
	}
	if r.Reason.Summary != "" {
		fmt.Fprintf(&b, "Why: %s\n", r.Reason.Summary)
	}
	if len(r.Reason.Options) > 0 {
		b.WriteString("Weighed, least cost first:\n")
		for _, o := range r.Reason.Options {
			mark := " "
			if o.Chosen {
				mark = "*"
			}
			where := o.Host
			if o.Machine != "" {
				where = o.Machine + " on " + o.Host
			}
			fmt.Fprintf(&b, " %s %-6s %-24s cost %8.2f  (", mark, o.Action, where, o.Cost)
			for i, t := range sortedKeys(o.Terms) {
				if i > 0 {
					b.WriteString(", ")
				}
				fmt.Fprintf(&b, "%s %.2f", t, o.Terms[t])
			}
			b.WriteString(")\n")
		}
	}
	for _, e := range r.Reason.Exclusions {
		fmt.Fprintf(&b, "Turned away by %s: %d %ss", e.Rule, e.Count, e.Layer)
		if e.Detail != "" {
			fmt.Fprintf(&b, " (%s)", e.Detail)
		}
		b.WriteString("\n")
	}
	return b.String()
}
