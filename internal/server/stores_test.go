package server

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

func TestMachinesAndTrim(t *testing.T) {
	b := newBed(t, Options{Elasticity: Elasticity{IdleStop: 300 * time.Millisecond}})
	ctx := ctxOf(t)
	m, err := b.machines.Create(ctx, connect.NewRequest(&v1.CreateMachineRequest{Name: "mine", Project: "p", Ceiling: &v1.Size{CpuMilli: 4000, MemoryBytes: 1 << 30}, Wait: true}))
	if err != nil {
		t.Fatal(err)
	}
	b.apply(simple("p", "web", "x", 1))
	if got := b.list(true)[0].Assignment.MachineId; got != m.Msg.Meta.Id {
		t.Error("the user's machine was not used:", got)
	}
	if _, err := b.machines.Remove(ctx, connect.NewRequest(&v1.MachineRequest{Machine: "mine"})); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
	if _, err := b.machines.Resize(ctx, connect.NewRequest(&v1.ResizeMachineRequest{Machine: "mine", Size: &v1.Size{MemoryBytes: 2 << 30}})); !errdefs.IsFailedPrecondition(err) {
		t.Error("above its ceiling:", err)
	}
	r, err := b.machines.Resize(ctx, connect.NewRequest(&v1.ResizeMachineRequest{Machine: "mine", Size: &v1.Size{CpuMilli: 2000, MemoryBytes: 512 << 20}, Wait: true}))
	if err != nil || r.Msg.Status.Size.MemoryBytes != 512<<20 {
		t.Error(r, err)
	}
	// Another project gets a machine of its own, which goes when it is empty.
	b.apply(simple("q", "web", "x", 1))
	l, _ := b.machines.List(ctx, connect.NewRequest(&v1.ListMachinesRequest{}))
	if len(l.Msg.Machines) != 2 {
		t.Fatal(l.Msg)
	}
	b.remove("q", false)
	b.remove("p", false)
	eventually(t, "the empty machine stops", func() bool { m, _, _ := b.host.Left(); return m == 1 })
	con := b.machines.Console(ctx)
	con.Send(&v1.StreamInput{Kind: &v1.StreamInput_Console{Console: &v1.ConsoleSpec{MachineId: "mine"}}})
	if out, err := con.Receive(); err != nil || !strings.Contains(string(out.GetStdout()), m.Msg.Meta.Id) {
		t.Error(out, err)
	}
	con.CloseRequest()
	con.CloseResponse()
	if _, err := b.machines.Remove(ctx, connect.NewRequest(&v1.MachineRequest{Machine: "mine", Wait: true})); err != nil {
		t.Fatal(err)
	}
	if m, _, _ := b.host.Left(); m != 0 {
		t.Error("the machine is still there")
	}
}

func TestVolumesImagesSystem(t *testing.T) {
	b := newBed(t, Options{Version: "test"})
	ctx := ctxOf(t)
	if _, err := b.volumes.Create(ctx, connect.NewRequest(&v1.CreateVolumeRequest{Project: "shop", Name: "data", SizeBytes: 1 << 30})); err != nil {
		t.Fatal(err)
	}
	r := shop()
	r.Volumes[0].External = true
	b.apply(r)
	_, err := b.volumes.Remove(ctx, connect.NewRequest(&v1.RemoveVolumeRequest{Volume: &v1.VolumeName{Project: "shop", Name: "data"}}))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "shop-api-1") {
		t.Error(err)
	}
	b.remove("shop", false)
	if _, err := b.volumes.Remove(ctx, connect.NewRequest(&v1.RemoveVolumeRequest{Volume: &v1.VolumeName{Name: "data"}})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the volume is gone", func() bool { _, _, v := b.host.Left(); return v == 0 })

	st, err := b.images.Pull(ctx, connect.NewRequest(&v1.PullImageRequest{Ref: "busybox"}))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for st.Receive() {
		n++
	}
	if st.Err() != nil || n != 2 {
		t.Error(n, st.Err())
	}
	load := b.images.Load(ctx)
	load.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Data{Data: []byte("mine")}})
	load.CloseRequest()
	if p, err := load.Receive(); err != nil || len(p.Images) != 1 {
		t.Error(p, err)
	}
	load.CloseResponse()
	// All hosts get it, or the one that is named.
	b.join("h-2", nil)
	for name, on := range map[string]string{"ours": "", "theirs": "h-2"} {
		load := b.images.Load(ctx)
		load.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Options{Options: &v1.LoadOptions{Host: on}}})
		load.Send(&v1.ImageChunk{Kind: &v1.ImageChunk_Data{Data: []byte(name)}})
		load.CloseRequest()
		if p, err := load.Receive(); err != nil || len(p.Images) != 1 {
			t.Error(name, p, err)
		}
		load.CloseResponse()
	}
	has := map[string]string{}
	if il, err := b.images.List(ctx, connect.NewRequest(&v1.ListImagesRequest{})); err == nil {
		for _, i := range il.Msg.Images {
			has[i.Names[0]] += i.HostId
		}
	}
	if has["mine"] != "h-1" || has["ours"] != "h-1h-2" || has["theirs"] != "h-2" {
		t.Error("images on hosts:", has)
	}
	for name, on := range map[string]string{"ours": "h-1", "theirs": ""} {
		if _, err := b.images.Remove(ctx, connect.NewRequest(&v1.RemoveImageRequest{Ref: name, Host: on})); err != nil {
			t.Error(err)
		}
	}
	il, err := b.images.List(ctx, connect.NewRequest(&v1.ListImagesRequest{}))
	if err != nil || len(il.Msg.Images) != 3 {
		t.Error(il, err)
	}
	if _, err := b.images.Remove(ctx, connect.NewRequest(&v1.RemoveImageRequest{Ref: "nope"})); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	v, err := b.system.Version(ctx, connect.NewRequest(&v1.VersionRequest{}))
	if err != nil || v.Msg.Version != "test" || v.Msg.ClusterId == "" {
		t.Error(v, err)
	}
	ev, err := b.system.Events(ctx, connect.NewRequest(&v1.EventsRequest{Project: "shop"}))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for ev.Receive() {
		e := ev.Msg()
		seen[e.Kind+" "+e.Action+" "+e.Name] = true
	}
	for _, want := range []string{"container create shop-web-1", "container start shop-web-1", "container destroy shop-web-1", "project create shop"} {
		if !seen[want] {
			t.Errorf("no event %q in %v", want, seen)
		}
	}
	if d, err := b.system.Doctor(ctx, connect.NewRequest(&v1.DoctorRequest{})); err != nil || len(d.Msg.Findings) != 2 {
		t.Error(d, err)
	}
}
