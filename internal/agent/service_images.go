package agent

import (
	"context"
	"fmt"
	"io"
	"sync"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/image"
)

func (s service) ListImages(ctx context.Context, _ *connect.Request[v1.AgentListImagesRequest]) (*connect.Response[v1.AgentListImagesResponse], error) {
	list, err := s.a.o.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, img := range list {
		img.HostId = s.a.hostID
	}
	return connect.NewResponse(&v1.AgentListImagesResponse{Images: list}), nil
}

// imageChanged makes containers that wait for an image look again.
func (a *Agent) imageChanged(action, id, ref string) {
	a.hub.event(a.newEvent("image", action, id, ref, ""))
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.containers {
		c.hurry()
	}
}

func (s service) PullImage(ctx context.Context, r *connect.Request[v1.AgentPullImageRequest], out *connect.ServerStream[v1.Progress]) error {
	send := progressTo(out.Send)
	img, err := s.a.o.Images.Pull(ctx, r.Msg.Ref, image.PullOptions{Platform: r.Msg.Platform, Auth: r.Msg.Auth, Progress: send.put})
	if err := send.end(); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	s.a.imageChanged("pull", img.Id, r.Msg.Ref)
	return out.Send(&v1.Progress{Id: r.Msg.Ref, Action: "pulled", Message: img.Id, Done: true, At: timestamppb.New(s.a.o.Clock.Now())})
}

// LoadImage takes an archive; the store converts its layers as they come, so that
// the first container starts at once.
func (s service) LoadImage(ctx context.Context, st *connect.BidiStream[v1.ImageChunk, v1.LoadProgress]) error {
	first, err := st.Receive()
	if err != nil {
		return err
	}
	o := first.GetOptions()
	if o == nil {
		return fmt.Errorf("load: the first message must carry options: %w", errdefs.ErrInvalidArgument)
	}
	pr, pw := io.Pipe()
	defer pr.Close()
	go func() {
		for {
			in, err := st.Receive()
			if err != nil {
				pw.CloseWithError(err) // io.EOF: the archive is complete
				return
			}
			if _, err := pw.Write(in.GetData()); err != nil {
				return
			}
		}
	}()
	send := progressTo(func(p *v1.Progress) error { return st.Send(&v1.LoadProgress{Progress: p}) })
	images, err := s.load(ctx, pr, o, send.put)
	if err := send.end(); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	for _, img := range images {
		s.a.imageChanged(map[bool]string{true: "import", false: "load"}[o.Import], img.Id, firstName(img))
	}
	return st.Send(&v1.LoadProgress{Images: images, Progress: &v1.Progress{Id: "load", Action: "loaded", Done: true, At: timestamppb.New(s.a.o.Clock.Now())}})
}

func (s service) load(ctx context.Context, r io.Reader, o *v1.LoadOptions, p image.ProgressFunc) ([]*v1.Image, error) {
	if !o.Import {
		return s.a.o.Images.Load(ctx, r, p)
	}
	img, err := s.a.o.Images.Import(ctx, r, o.Ref, image.ImportOptions{Changes: o.Changes, Progress: p})
	if err != nil {
		return nil, err
	}
	return []*v1.Image{img}, nil
}

func firstName(img *v1.Image) string {
	if len(img.Names) > 0 {
		return img.Names[0]
	}
	return img.Id
}

func (s service) SaveImage(ctx context.Context, r *connect.Request[v1.AgentSaveImageRequest], out *connect.ServerStream[v1.ImageChunk]) error {
	format := first(r.Msg.Format, "docker")
	return s.a.o.Images.Save(ctx, writerFunc(func(p []byte) error {
		return out.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Data{Data: p}})
	}), r.Msg.Refs, format)
}

func (s service) RemoveImage(ctx context.Context, r *connect.Request[v1.AgentRemoveImageRequest]) (*connect.Response[v1.AgentRemoveImageResponse], error) {
	untagged, deleted, err := s.a.o.Images.Remove(ctx, r.Msg.Ref, r.Msg.Force)
	if err != nil {
		return nil, err
	}
	s.a.hub.event(s.a.newEvent("image", "remove", "", r.Msg.Ref, ""))
	return connect.NewResponse(&v1.AgentRemoveImageResponse{Untagged: untagged, Deleted: deleted}), nil
}

func (s service) TagImage(ctx context.Context, r *connect.Request[v1.AgentTagImageRequest]) (*connect.Response[v1.AgentTagImageResponse], error) {
	if err := s.a.o.Images.Tag(ctx, r.Msg.Source, r.Msg.Target); err != nil {
		return nil, err
	}
	s.a.imageChanged("tag", r.Msg.Source, r.Msg.Target)
	return connect.NewResponse(&v1.AgentTagImageResponse{}), nil
}

func (s service) PruneImages(ctx context.Context, r *connect.Request[v1.AgentPruneImagesRequest]) (*connect.Response[v1.AgentPruneImagesResponse], error) {
	deleted, n, err := s.a.o.Images.Prune(ctx, r.Msg.All)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.AgentPruneImagesResponse{Deleted: deleted, ReclaimedBytes: n}), nil
}

// progressSender sends progress without ever making the worker wait: what a
// slow client has not taken is folded, the latest of each id is kept.
type progressSender struct {
	send func(*v1.Progress) error
	mu   sync.Mutex
	last map[string]*v1.Progress
	ids  []string
	wake chan struct{}
	stop chan struct{}
	done chan error
}

func progressTo(send func(*v1.Progress) error) *progressSender {
	p := &progressSender{send: send, last: map[string]*v1.Progress{}, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan error, 1)}
	go p.run()
	return p
}

func (p *progressSender) put(m *v1.Progress) {
	p.mu.Lock()
	if _, ok := p.last[m.Id]; !ok {
		p.ids = append(p.ids, m.Id)
	}
	p.last[m.Id] = m
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *progressSender) run() {
	var err error
	flush := func() {
		p.mu.Lock()
		ids, last := p.ids, p.last
		p.ids, p.last = nil, map[string]*v1.Progress{}
		p.mu.Unlock()
		for _, id := range ids {
			if err == nil {
				err = p.send(last[id])
			}
		}
	}
	for {
		select {
		case <-p.wake:
			flush()
		case <-p.stop:
			flush()
			p.done <- err
			return
		}
	}
}

// end sends what is left and returns the first error of sending.
func (p *progressSender) end() error {
	close(p.stop)
	return <-p.done
}
