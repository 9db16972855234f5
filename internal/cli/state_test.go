package cli

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
)

type stateService struct {
	tandemv1connect.UnimplementedStateServiceHandler
	*fakeServer
}

func (stateService) List(context.Context, *connect.Request[v1.ListStateRequest]) (*connect.Response[v1.ListStateResponse], error) {
	return connect.NewResponse(&v1.ListStateResponse{Unreadable: []*v1.UnreadableRecord{
		{Kind: "container", Project: "shop", Name: "web-1", Error: "it is corrupt", OlderCopy: true}, {Kind: "host", Name: "alpha", Error: "it is corrupt"}}}), nil
}

func (f stateService) Purge(_ context.Context, r *connect.Request[v1.PurgeStateRequest]) (*connect.Response[v1.PurgeStateResponse], error) {
	f.purged = r.Msg
	return connect.NewResponse(&v1.PurgeStateResponse{}), nil
}

func (f stateService) Backup(_ context.Context, _ *connect.Request[v1.BackupStateRequest], st *connect.ServerStream[v1.BackupStateResponse]) error {
	for _, s := range []string{"one ", "two"} {
		if err := st.Send(&v1.BackupStateResponse{Data: []byte(s)}); err != nil {
			return err
		}
	}
	if f.broken {
		return fmt.Errorf("the store has failed: %w", errdefs.ErrUnavailable)
	}
	return nil
}

func TestState(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	out, _, code := tandem("", "state", "ls")
	for _, want := range []string{"KIND", "container", "shop/web-1", "yes", "host", "alpha", "it is corrupt"} {
		if !strings.Contains(out, want) || code != 0 {
			t.Errorf("state ls lacks %q: %d\n%s", want, code, out)
		}
	}
	if _, errs, code := tandem("", "state", "purge", "container", "shop/web-1"); code != ExitFailed || !strings.Contains(errs, "--yes") || f.purged != nil {
		t.Error(errs, code, f.purged)
	}
	if out, errs, code := tandem("", "state", "purge", "container", "shop/web-1", "--yes"); code != 0 || out != "shop/web-1\n" || f.purged.Kind != "container" || f.purged.Project != "shop" || f.purged.Name != "web-1" {
		t.Error(out, errs, code, f.purged)
	}
	if _, errs, code := tandem("", "state", "backup", "b"); code != 0 {
		t.Error(errs, code)
	}
	st, err := os.Stat("b")
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st, err)
	}
	if b, _ := os.ReadFile("b"); string(b) != "one two" {
		t.Errorf("%q", b)
	}
	f.broken = true
	if _, errs, code := tandem("", "state", "backup", "c"); code != ExitFailed || !strings.Contains(errs, "the store has failed") {
		t.Error(errs, code)
	}
	if l, _ := os.ReadDir("."); len(l) != 1 {
		t.Errorf("half a backup stays behind: %v", l)
	}
}
