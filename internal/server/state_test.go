package server

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
	"tandem/internal/store/storetest"
)

// TestUnreadableRecords: they are told with their error, only they can be purged,
// and then their name is free.
func TestUnreadableRecords(t *testing.T) {
	b := newBed(t, Options{})
	ctx := ctxOf(t)
	for _, n := range []string{"good", "bad"} {
		if _, err := b.volumes.Create(ctx, connect.NewRequest(&v1.CreateVolumeRequest{Project: "p", Name: n})); err != nil {
			t.Fatal(err)
		}
	}
	b.stop()
	dir := filepath.Join(b.state, "server")
	storetest.Damage(t, dir, store.Key{Kind: store.Volumes, Project: "p", Name: "bad"}, storetest.All)
	b.start()
	list := func() []*v1.UnreadableRecord {
		t.Helper()
		res, err := b.stateOf.List(ctx, connect.NewRequest(&v1.ListStateRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		if res.Msg.Directory != dir || res.Msg.FreeBytes == 0 {
			t.Error(res.Msg)
		}
		return res.Msg.Unreadable
	}
	if l := list(); len(l) != 1 || l[0].Kind != "volume" || l[0].Project != "p" || l[0].Name != "bad" || l[0].OlderCopy || !strings.Contains(l[0].Error, "corrupt") {
		t.Fatal(l)
	}
	for _, x := range []struct {
		kind, project, name string
		is                  func(error) bool
	}{
		{"volume", "p", "good", errdefs.IsNotFound}, {"volume", "q", "bad", errdefs.IsNotFound},
		{"container", "p", "bad", errdefs.IsNotFound}, {"thing", "", "bad", errdefs.IsInvalidArgument},
	} {
		_, err := b.stateOf.Purge(ctx, connect.NewRequest(&v1.PurgeStateRequest{Kind: x.kind, Project: x.project, Name: x.name}))
		if !x.is(err) {
			t.Errorf("purge of %v: %v", x, err)
		}
	}
	if _, err := b.stateOf.Purge(ctx, connect.NewRequest(&v1.PurgeStateRequest{Kind: "volume", Name: "bad"})); err != nil {
		t.Fatal(err)
	}
	if l := list(); len(l) != 0 {
		t.Error(l)
	}
	if _, err := b.volumes.Create(ctx, connect.NewRequest(&v1.CreateVolumeRequest{Project: "p", Name: "bad"})); err != nil {
		t.Error(err)
	}
}

// TestBackupOverTheAPI: what comes through the socket can be restored, and the
// server that starts on it has all that was there.
func TestBackupOverTheAPI(t *testing.T) {
	b := newBed(t, Options{Version: "1.2.3"})
	b.apply(simple("q", "web", "x", 2))
	st, err := b.stateOf.Backup(ctxOf(t), connect.NewRequest(&v1.BackupStateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	var file bytes.Buffer
	for st.Receive() {
		file.Write(st.Msg().Data)
	}
	if err := st.Err(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "state")
	h, err := store.Restore(t.Context(), dir, &file, nil)
	if err != nil || h.Version != "1.2.3" {
		t.Fatal(h, err)
	}
	s, err := store.Open(t.Context(), store.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if n := len(store.List[*v1.Container](s, "q")); n != 2 {
		t.Errorf("%d containers", n)
	}
}
