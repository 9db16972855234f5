package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

type state struct{ s *Server }

// List implements StateService.
func (k *state) List(context.Context, *connect.Request[v1.ListStateRequest]) (*connect.Response[v1.ListStateResponse], error) {
	st := k.s.store
	sp, _ := st.Space()
	out := &v1.ListStateResponse{Directory: sp.Dir, FreeBytes: sp.Free, Full: sp.Short}
	copies := map[store.Key]bool{}
	for _, r := range st.Snapshot().Last {
		copies[store.KeyOf(r)] = true
	}
	for key, err := range st.Corrupt() {
		out.Unreadable = append(out.Unreadable, &v1.UnreadableRecord{Kind: string(key.Kind), Project: key.Project, Name: key.Name, Error: err.Error(), OlderCopy: copies[key]})
	}
	slices.SortFunc(out.Unreadable, func(a, b *v1.UnreadableRecord) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Project, b.Project), cmp.Compare(a.Name, b.Name))
	})
	return connect.NewResponse(out), nil
}

// Purge implements StateService: only what can't be read goes this way.
func (k *state) Purge(ctx context.Context, req *connect.Request[v1.PurgeStateRequest]) (*connect.Response[v1.PurgeStateResponse], error) {
	s, r := k.s, req.Msg
	if !slices.Contains(store.Kinds, store.Kind(r.Kind)) {
		return nil, fmt.Errorf("%.80q is no kind of record (there are %v): %w", r.Kind, store.Kinds, errdefs.ErrInvalidArgument)
	}
	bad := s.store.Corrupt()
	var keys []store.Key
	for key := range bad {
		if key.Kind == store.Kind(r.Kind) && key.Name == r.Name && (r.Project == "" || key.Project == r.Project) {
			keys = append(keys, key)
		}
	}
	switch len(keys) {
	case 0:
		return nil, fmt.Errorf("no %s %.200q that can't be read: `tandem state ls` shows those there are; others are removed as usual: %w",
			r.Kind, strings.TrimPrefix(r.Project+"/"+r.Name, "/"), errdefs.ErrNotFound)
	case 1:
	default:
		return nil, fmt.Errorf("there are %d of that name that can't be read: give PROJECT/%s: %w", len(keys), r.Name, errdefs.ErrInvalidArgument)
	}
	key := keys[0]
	if err := s.store.Purge(ctx, key); err != nil {
		return nil, err
	}
	s.log.Warn("a record that could not be read was removed", "record", key.String(), "err", bad[key])
	s.ctl.Events.Add(&v1.Event{At: timestamppb.New(s.clock.Now()), Kind: string(key.Kind), Action: "purge", Name: key.Name, Project: key.Project})
	return connect.NewResponse(&v1.PurgeStateResponse{}), nil
}

// Backup implements StateService.
func (k *state) Backup(ctx context.Context, _ *connect.Request[v1.BackupStateRequest], out *connect.ServerStream[v1.BackupStateResponse]) error {
	w := &pieces{out: out}
	if err := k.s.store.Backup(ctx, w, k.s.opts.Version); err != nil {
		return err
	}
	return w.flush()
}

// pieces sends what is written in pieces of a size that streams like.
type pieces struct {
	out *connect.ServerStream[v1.BackupStateResponse]
	buf []byte
}

const pieceBytes = 256 << 10

func (p *pieces) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		n := min(len(rest), pieceBytes-len(p.buf))
		p.buf, rest = append(p.buf, rest[:n]...), rest[n:]
		if len(p.buf) == pieceBytes {
			if err := p.flush(); err != nil {
				return 0, err
			}
		}
	}
	return len(b), nil
}

func (p *pieces) flush() error {
	if len(p.buf) == 0 {
		return nil
	}
	err := p.out.Send(&v1.BackupStateResponse{Data: p.buf})
	p.buf = p.buf[:0]
	return err
}

// watchSpace makes an event each time the disk of the state directory has become
// full, or has space again.
func (s *Server) watchSpace(ctx context.Context) {
	for was := false; ; {
		sp, moved := s.store.Space()
		if sp.Short != was {
			was = sp.Short
			action := "space"
			if sp.Short {
				action = "full"
			}
			s.ctl.Events.Add(&v1.Event{At: timestamppb.New(s.clock.Now()), Kind: "state", Action: action, Name: sp.Dir,
				Attributes: map[string]string{"free": fmt.Sprintf("%d MiB", sp.Free>>20), "needed": fmt.Sprintf("%d MiB", sp.Need>>20)}})
		}
		select {
		case <-ctx.Done():
			return
		case <-moved:
		}
	}
}
