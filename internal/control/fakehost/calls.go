package fakehost

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func (h *Host) find(id string) (*container, error) {
	if c := h.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
}

// Logs implements AgentService.
func (h *Host) Logs(ctx context.Context, req *connect.Request[v1.LogOptions], out *connect.ServerStream[v1.LogEntry]) error {
	o := req.Msg
	next := 0
	for first := true; ; first = false {
		h.mu.Lock()
		c, err := h.find(o.ContainerId)
		if err != nil {
			h.mu.Unlock()
			if first {
				return err
			}
			return nil
		}
		all := c.log
		changed := h.changed
		h.mu.Unlock()
		if first && o.Tail > 0 {
			next = max(len(all)-int(o.Tail), 0)
		}
		for ; next < len(all); next++ {
			if t := o.GetSince(); t != nil && all[next].Time.AsTime().Before(t.AsTime()) {
				continue
			}
			if err := out.Send(all[next]); err != nil {
				return err
			}
		}
		if !o.Follow {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Attach implements AgentService: it tells the log and, at the end, the exit code.
// Input is written to the log behind "in: ".
func (h *Host) Attach(ctx context.Context, st *connect.BidiStream[v1.StreamInput, v1.StreamOutput]) error {
	first, err := st.Receive()
	if err != nil {
		return err
	}
	id := first.GetAttach().GetContainerId()
	go func() {
		for {
			m, err := st.Receive()
			if err != nil {
				return
			}
			if b := m.GetStdin(); len(b) > 0 {
				h.mu.Lock()
				if c := h.containers[id]; c != nil {
					c.log = append(c.log, &v1.LogEntry{Time: h.now(), Stream: "stdout", Line: append([]byte("in: "), b...)})
					h.touch(id)
				}
				h.mu.Unlock()
			}
		}
	}()
	next := -1
	for {
		h.mu.Lock()
		c, err := h.find(id)
		if err != nil {
			h.mu.Unlock()
			return err
		}
		log, state, code, changed := c.log, c.st.State, c.st.ExitCode, h.changed
		h.mu.Unlock()
		if next < 0 {
			if next = len(log); first.GetAttach().Logs {
				next = 0
			}
		}
		for ; next < len(log); next++ {
			if err := st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: log[next].Line}}); err != nil {
				return err
			}
		}
		if state == v1.ContainerState_CONTAINER_STATE_EXITED {
			return st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: code}})
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Exec implements AgentService: "echo" echoes its arguments, "cat" its input,
// "exit N" ends with N.
func (h *Host) Exec(_ context.Context, st *connect.BidiStream[v1.StreamInput, v1.StreamOutput]) error {
	first, err := st.Receive()
	if err != nil {
		return err
	}
	e := first.GetExec()
	h.mu.Lock()
	_, err = h.find(e.GetContainerId())
	h.mu.Unlock()
	if err != nil {
		return err
	}
	if err := st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Started{Started: true}}); err != nil {
		return err
	}
	code := int32(0)
	switch e.Args[0] {
	case "echo":
		err = st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: []byte(strings.Join(e.Args[1:], " ") + "\n")}})
	case "exit":
		fmt.Sscan(e.Args[1], &code)
	case "cat":
		for err == nil {
			m, rerr := st.Receive()
			if rerr != nil || m.GetCloseStdin() {
				break
			}
			err = st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: m.GetStdin()}})
		}
	default:
		code = 127
	}
	if err != nil {
		return err
	}
	return st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: code}})
}

// Console implements AgentService: it greets and echoes.
func (h *Host) Console(_ context.Context, st *connect.BidiStream[v1.StreamInput, v1.StreamOutput]) error {
	m, err := st.Receive()
	if err != nil {
		return err
	}
	if err := st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: []byte("console of " + m.GetConsole().GetMachineId() + "\n")}}); err != nil {
		return err
	}
	for {
		m, err := st.Receive()
		if err != nil || m.GetCloseStdin() {
			return nil
		}
		if err := st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: m.GetStdin()}}); err != nil {
			return err
		}
	}
}

// Stats implements AgentService: every container uses half a core and 10 MiB.
func (h *Host) Stats(_ context.Context, req *connect.Request[v1.AgentStatsRequest]) (*connect.Response[v1.AgentStatsResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &v1.AgentStatsResponse{Containers: map[string]*v1.Usage{}, Machines: map[string]*v1.Usage{}}
	now := h.opts.Clock.Now()
	h.work(now)
	use := func(since time.Time) *v1.Usage {
		return &v1.Usage{At: h.now(), CpuUsageNs: uint64(now.Sub(since) / 2), MemoryBytes: 10 << 20}
	}
	for id, c := range h.containers {
		if c.st.State == v1.ContainerState_CONTAINER_STATE_RUNNING && (req.Msg.All || slices.Contains(req.Msg.ContainerIds, id)) {
			if out.Containers[id] = h.loaded(id, c); out.Containers[id] == nil {
				out.Containers[id] = use(c.st.StartedAt.AsTime())
			}
		}
	}
	for id, m := range h.machines {
		if m.up {
			out.Machines[id] = use(m.st.StartedAt.AsTime())
		}
	}
	return connect.NewResponse(out), nil
}

// Top implements AgentService.
func (h *Host) Top(_ context.Context, req *connect.Request[v1.RuntimeTopRequest]) (*connect.Response[v1.RuntimeTopResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, err := h.find(req.Msg.Id); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.RuntimeTopResponse{Processes: []*v1.Process{{Pid: 1, Command: "fake"}}}), nil
}

// Kill implements AgentService: KILL, TERM and INT end the container.
func (h *Host) Kill(_ context.Context, req *connect.Request[v1.RuntimeKillRequest]) (*connect.Response[v1.RuntimeKillResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c, err := h.find(req.Msg.Id)
	if err != nil {
		return nil, err
	}
	if code := map[string]int32{"KILL": 137, "TERM": 143, "INT": 130}[strings.TrimPrefix(req.Msg.Signal, "SIG")]; code != 0 {
		h.exit(c, code)
	}
	return connect.NewResponse(&v1.RuntimeKillResponse{}), nil
}

// PullImage implements AgentService.
func (h *Host) PullImage(_ context.Context, req *connect.Request[v1.AgentPullImageRequest], out *connect.ServerStream[v1.Progress]) error {
	ref := req.Msg.Ref
	if err := out.Send(&v1.Progress{Id: ref, Action: "pulling", Current: 10, Total: 100, Unit: "bytes"}); err != nil {
		return err
	}
	h.mu.Lock()
	h.images[ref] = &v1.Image{Id: "sha256:fake-" + ref, Names: []string{ref}}
	h.mu.Unlock()
	return out.Send(&v1.Progress{Id: ref, Action: "pulled", Done: true})
}

// ListImages implements AgentService.
func (h *Host) ListImages(context.Context, *connect.Request[v1.AgentListImagesRequest]) (*connect.Response[v1.AgentListImagesResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := &v1.AgentListImagesResponse{}
	for _, n := range slices.Sorted(maps.Keys(h.images)) {
		out.Images = append(out.Images, h.images[n])
	}
	return connect.NewResponse(out), nil
}

// LoadImage implements AgentService: the bytes are the image's name.
func (h *Host) LoadImage(_ context.Context, st *connect.BidiStream[v1.ImageChunk, v1.LoadProgress]) error {
	var name strings.Builder
	for {
		m, err := st.Receive()
		if err != nil {
			break
		}
		name.Write(m.GetData())
	}
	i := &v1.Image{Id: "sha256:fake-" + name.String(), Names: []string{name.String()}}
	h.mu.Lock()
	h.images[name.String()] = i
	h.mu.Unlock()
	return st.Send(&v1.LoadProgress{Images: []*v1.Image{i}})
}

// SaveImage implements AgentService: the inverse of LoadImage.
func (h *Host) SaveImage(_ context.Context, req *connect.Request[v1.AgentSaveImageRequest], out *connect.ServerStream[v1.ImageChunk]) error {
	for _, r := range req.Msg.Refs {
		h.mu.Lock()
		i := h.images[r]
		h.mu.Unlock()
		if i == nil {
			return fmt.Errorf("image %s: %w", r, errdefs.ErrNotFound)
		}
		if err := out.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Data{Data: []byte(r)}}); err != nil {
			return err
		}
	}
	return nil
}

// RemoveImage implements AgentService.
func (h *Host) RemoveImage(_ context.Context, req *connect.Request[v1.AgentRemoveImageRequest]) (*connect.Response[v1.AgentRemoveImageResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.images[req.Msg.Ref] == nil {
		return nil, fmt.Errorf("image %s: %w", req.Msg.Ref, errdefs.ErrNotFound)
	}
	delete(h.images, req.Msg.Ref)
	return connect.NewResponse(&v1.AgentRemoveImageResponse{Untagged: []string{req.Msg.Ref}}), nil
}

// TagImage implements AgentService.
func (h *Host) TagImage(_ context.Context, req *connect.Request[v1.AgentTagImageRequest]) (*connect.Response[v1.AgentTagImageResponse], error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := h.images[req.Msg.Source]
	if i == nil {
		return nil, fmt.Errorf("image %s: %w", req.Msg.Source, errdefs.ErrNotFound)
	}
	h.images[req.Msg.Target] = i
	return connect.NewResponse(&v1.AgentTagImageResponse{}), nil
}

// PruneImages implements AgentService.
func (h *Host) PruneImages(context.Context, *connect.Request[v1.AgentPruneImagesRequest]) (*connect.Response[v1.AgentPruneImagesResponse], error) {
	return connect.NewResponse(&v1.AgentPruneImagesResponse{}), nil
}

// Doctor implements AgentService.
func (h *Host) Doctor(context.Context, *connect.Request[v1.DoctorRequest]) (*connect.Response[v1.DoctorResponse], error) {
	return connect.NewResponse(&v1.DoctorResponse{Findings: []*v1.Finding{{Code: "fake", Severity: "info", Title: "this host is not real"}}}), nil
}
