package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/store"
)

type images struct{ s *Server }

type target struct {
	id, name string
	client   tandemv1connect.AgentServiceClient
}

// targets are the connected hosts that a request means: the one named, or all.
func (s *Server) targets(ctx context.Context, word string) ([]target, error) {
	s.firstHost(ctx)
	if word != "" {
		h, err := s.host(word)
		if err != nil {
			return nil, err
		}
		c, err := s.ctl.Hosts.Await(ctx, h.Meta.Id, hostPatience)
		if err != nil {
			return nil, err
		}
		return []target{{h.Meta.Id, h.Meta.Name, c}}, nil
	}
	var out []target
	for _, h := range store.List[*v1.Host](s.store, "") {
		if c, err := s.ctl.Hosts.Client(h.Meta.Id); err == nil {
			out = append(out, target{h.Meta.Id, h.Meta.Name, c})
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no host is connected: start `tandem agent`: %w", errdefs.ErrUnavailable)
	}
	return out, nil
}

// each asks all of them at once; the first error counts when none could answer,
// or when all is set.
func each(ts []target, all bool, fn func(target) error) error {
	errs := make([]error, len(ts))
	var wg sync.WaitGroup
	for i, t := range ts {
		wg.Go(func() {
			if err := fn(t); err != nil {
				errs[i] = fmt.Errorf("host %s: %w", t.name, err)
				if len(ts) == 1 {
					errs[i] = err
				}
			}
		})
	}
	wg.Wait()
	bad := slices.DeleteFunc(errs, func(e error) bool { return e == nil })
	if len(bad) > 0 && (all || len(bad) == len(ts)) {
		return bad[0]
	}
	return nil
}

// List implements ImageService.
func (k *images) List(ctx context.Context, req *connect.Request[v1.ListImagesRequest]) (*connect.Response[v1.ListImagesResponse], error) {
	ts, err := k.s.targets(ctx, req.Msg.GetHost())
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	out := &v1.ListImagesResponse{}
	err = each(ts, false, func(t target) error {
		res, err := t.client.ListImages(ctx, connect.NewRequest(&v1.AgentListImagesRequest{}))
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, i := range res.Msg.Images {
			i.HostId = t.id
			out.Images = append(out.Images, i)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(out.Images, func(a, b *v1.Image) int {
		an, bn := "", ""
		if len(a.Names) > 0 {
			an = a.Names[0]
		}
		if len(b.Names) > 0 {
			bn = b.Names[0]
		}
		return cmp.Or(cmp.Compare(an, bn), cmp.Compare(a.Id, b.Id), cmp.Compare(a.HostId, b.HostId))
	})
	return connect.NewResponse(out), nil
}

// Pull implements ImageService.
func (k *images) Pull(ctx context.Context, req *connect.Request[v1.PullImageRequest], out *connect.ServerStream[v1.Progress]) error {
	r := req.Msg
	if r.Ref == "" || len(r.Ref) > 512 {
		return fmt.Errorf("an image is needed: %w", errdefs.ErrInvalidArgument)
	}
	ts, err := k.s.targets(ctx, r.Host)
	if err != nil {
		return err
	}
	t := ts[0]
	st, err := t.client.PullImage(ctx, connect.NewRequest(&v1.AgentPullImageRequest{Ref: r.Ref, Platform: r.Platform, Auth: r.Auth}))
	if err != nil {
		return err
	}
	defer st.Close()
	for st.Receive() {
		if err := out.Send(st.Msg()); err != nil {
			return err
		}
	}
	return st.Err()
}

// Load implements ImageService: what comes goes to all hosts meant at once, at the pace
// of the slowest. Progress is the first one's; when one of them fails, the whole does.
func (k *images) Load(ctx context.Context, in *connect.BidiStream[v1.ImageChunk, v1.LoadProgress]) error {
	first, err := in.Receive()
	if err != nil {
		return fmt.Errorf("load: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	ts, err := k.s.targets(ctx, first.GetOptions().GetHost())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	streams := make(map[string]*connect.BidiStreamForClient[v1.ImageChunk, v1.LoadProgress], len(ts))
	for _, t := range ts {
		streams[t.id] = t.client.LoadImage(ctx)
	}
	go func() {
		for m := first; ; {
			for _, t := range ts {
				if streams[t.id].Send(m) != nil {
					return // why, it says in its answer
				}
			}
			next, err := in.Receive()
			if errors.Is(err, io.EOF) {
				for _, t := range ts {
					streams[t.id].CloseRequest()
				}
				return
			}
			if err != nil {
				cancel() // half an image is none
				return
			}
			m = next
		}
	}()
	var (
		why  error // the first that failed, which ended the others
		once sync.Once
	)
	var last []*v1.LoadProgress // the first one's, kept until all are done
	err = each(ts, true, func(t target) error {
		st := streams[t.id]
		defer st.CloseResponse()
		for {
			m, err := st.Receive()
			switch {
			case errors.Is(err, io.EOF):
				return nil
			case err != nil:
				once.Do(func() {
					why = err
					if len(ts) > 1 {
						why = fmt.Errorf("host %s: %w", t.name, err)
					}
				})
				cancel() // the others need not wait for more
				return err
			case t.id != ts[0].id:
			case len(m.Images) > 0:
				last = append(last, m)
			default:
				if err := in.Send(m); err != nil {
					return err
				}
			}
		}
	})
	if why != nil {
		return why
	}
	if err != nil {
		return err
	}
	for _, m := range last {
		if err := in.Send(m); err != nil {
			return err
		}
	}
	return nil
}

// Save implements ImageService: from the host named, or the first that has all.
func (k *images) Save(ctx context.Context, req *connect.Request[v1.SaveImageRequest], out *connect.ServerStream[v1.ImageChunk]) error {
	r := req.Msg
	if len(r.Refs) == 0 || len(r.Refs) > 100 {
		return fmt.Errorf("name between 1 and 100 images: %w", errdefs.ErrInvalidArgument)
	}
	ts, err := k.s.targets(ctx, r.Host)
	if err != nil {
		return err
	}
	for i, t := range ts {
		sent := false
		err = func() error {
			st, err := t.client.SaveImage(ctx, connect.NewRequest(&v1.AgentSaveImageRequest{Refs: r.Refs, Format: r.Format}))
			if err != nil {
				return err
			}
			defer st.Close()
			for st.Receive() {
				sent = true
				if err := out.Send(st.Msg()); err != nil {
					return err
				}
			}
			return st.Err()
		}()
		if err == nil || sent || !errdefs.IsNotFound(err) || i == len(ts)-1 {
			return err
		}
	}
	return err
}

// some asks hosts for a change that NotFound on some of them does not spoil.
func some(ts []target, fn func(target) error) error {
	var mu sync.Mutex
	did := 0
	var missing error
	err := each(ts, true, func(t target) error {
		err := fn(t)
		mu.Lock()
		defer mu.Unlock()
		if errdefs.IsNotFound(err) {
			missing = err
			return nil
		}
		if err == nil {
			did++
		}
		return err
	})
	if err == nil && did == 0 {
		return missing
	}
	return err
}

// Remove implements ImageService.
func (k *images) Remove(ctx context.Context, req *connect.Request[v1.RemoveImageRequest]) (*connect.Response[v1.AgentRemoveImageResponse], error) {
	r := req.Msg
	ts, err := k.s.targets(ctx, r.GetHost())
	if err != nil {
		return nil, err
	}
	out := &v1.AgentRemoveImageResponse{}
	var mu sync.Mutex
	err = some(ts, func(t target) error {
		res, err := t.client.RemoveImage(ctx, connect.NewRequest(&v1.AgentRemoveImageRequest{Ref: r.Ref, Force: r.Force}))
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			proto.Merge(out, res.Msg)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}

// Tag implements ImageService.
func (k *images) Tag(ctx context.Context, req *connect.Request[v1.AgentTagImageRequest]) (*connect.Response[v1.AgentTagImageResponse], error) {
	ts, err := k.s.targets(ctx, "")
	if err != nil {
		return nil, err
	}
	err = some(ts, func(t target) error {
		_, err := t.client.TagImage(ctx, connect.NewRequest(req.Msg))
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.AgentTagImageResponse{}), nil
}

// Prune implements ImageService.
func (k *images) Prune(ctx context.Context, req *connect.Request[v1.AgentPruneImagesRequest]) (*connect.Response[v1.AgentPruneImagesResponse], error) {
	ts, err := k.s.targets(ctx, "")
	if err != nil {
		return nil, err
	}
	out := &v1.AgentPruneImagesResponse{}
	var mu sync.Mutex
	err = each(ts, true, func(t target) error {
		res, err := t.client.PruneImages(ctx, connect.NewRequest(req.Msg))
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			out.Deleted = append(out.Deleted, res.Msg.Deleted...)
			out.ReclaimedBytes += res.Msg.ReclaimedBytes
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(out), nil
}
