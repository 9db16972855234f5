package server

import (
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/rpc"
)

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(end) {
			t.Fatal("not in time: " + what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func pick(names ...string) *v1.Selector { return &v1.Selector{Containers: names} }

func (b *bed) inspect(name string) *v1.Container {
	b.t.Helper()
	res, err := b.containers.Inspect(ctxOf(b.t), connect.NewRequest(&v1.ContainerRequest{Container: name}))
	if err != nil {
		b.t.Fatal(err)
	}
	return res.Msg
}

func (b *bed) logs(r *v1.LogsRequest) string {
	b.t.Helper()
	st, err := b.containers.Logs(ctxOf(b.t), connect.NewRequest(r))
	if err != nil {
		b.t.Fatal(err)
	}
	defer st.Close()
	var out strings.Builder
	for st.Receive() {
		out.WriteString(st.Msg().ContainerName + "| " + string(st.Msg().Line))
	}
	if err := st.Err(); err != nil {
		b.t.Fatal(err)
	}
	return out.String()
}

func TestContainerLife(t *testing.T) {
	b := newBed(t, Options{})
	ctx := ctxOf(t)
	b.host.Script("app", fakehost.Script{Output: []string{"hello"}})
	c, err := b.containers.Create(ctx, connect.NewRequest(&v1.CreateContainerRequest{Name: "one", Spec: &v1.ContainerSpec{Image: "app", Ports: []*v1.PortMapping{{ContainerPort: 80}}}}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.containers.Create(ctx, connect.NewRequest(&v1.CreateContainerRequest{Name: "one", Spec: &v1.ContainerSpec{Image: "app"}})); !errdefs.IsAlreadyExists(err) {
		t.Error("a second of the same name:", err)
	}
	if len(b.list(false)) != 0 || len(b.list(true)) != 1 {
		t.Error("a created container is listed with --all only")
	}
	id := c.Msg.Meta.Id
	for _, w := range []string{"one", id, id[:6], "/one", "default/one"} {
		if b.inspect(w).Meta.Id != id {
			t.Error(w)
		}
	}
	if _, err := b.containers.Start(ctx, connect.NewRequest(&v1.StartContainersRequest{Selector: pick("one")})); err != nil {
		t.Fatal(err)
	}
	if _, err := b.containers.Wait(ctx, connect.NewRequest(&v1.WaitContainerRequest{Container: "one", Condition: "running"})); err != nil {
		t.Fatal(err)
	}
	if p := b.inspect("one").Assignment.Ports; len(p) != 1 || p[0].HostPort < 49153 {
		t.Error("no port was chosen:", p)
	}
	if l := b.logs(&v1.LogsRequest{Selector: pick("one"), Options: &v1.LogOptions{Tail: -1}}); l != "one| hello\n" {
		t.Errorf("%q", l)
	}
	if out, code := b.exec("one", "echo", "a", "b"); out != "a b\n" || code != 0 {
		t.Error(out, code)
	}
	if _, code := b.exec("one", "exit", "9"); code != 9 {
		t.Error(code)
	}
	if top, err := b.containers.Top(ctx, connect.NewRequest(&v1.ContainerRequest{Container: "one"})); err != nil || len(top.Msg.Processes) != 1 {
		t.Error(top, err)
	}
	if _, err := b.containers.Remove(ctx, connect.NewRequest(&v1.RemoveContainersRequest{Selector: pick("one")})); !errdefs.IsFailedPrecondition(err) {
		t.Error("a running container was removed:", err)
	}
	if _, err := b.containers.Pause(ctx, connect.NewRequest(&v1.PauseContainersRequest{Selector: pick("one")})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "paused", func() bool { return b.inspect("one").Status.State == v1.ContainerState_CONTAINER_STATE_PAUSED })
	if _, err := b.containers.Pause(ctx, connect.NewRequest(&v1.PauseContainersRequest{Selector: pick("one"), Resume: true})); err != nil {
		t.Fatal(err)
	}
	before := b.inspect("one").Status.StartedAt.AsTime()
	if _, err := b.containers.Restart(ctx, connect.NewRequest(&v1.StopContainersRequest{Selector: pick("one"), Wait: true})); err != nil {
		t.Fatal(err)
	}
	if !b.inspect("one").Status.StartedAt.AsTime().After(before) {
		t.Error("not restarted")
	}
	if _, err := b.containers.Kill(ctx, connect.NewRequest(&v1.KillContainersRequest{Selector: pick("one")})); err != nil {
		t.Fatal(err)
	}
	w, err := b.containers.Wait(ctx, connect.NewRequest(&v1.WaitContainerRequest{Container: "one"}))
	if err != nil || w.Msg.ExitCode != 137 {
		t.Error(w, err)
	}
	if _, err := b.containers.Start(ctx, connect.NewRequest(&v1.StartContainersRequest{Selector: pick("one")})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "running again", func() bool { return len(b.host.Running()) == 1 })
	s, err := b.containers.Stop(ctx, connect.NewRequest(&v1.StopContainersRequest{Selector: pick("one"), Wait: true}))
	if err != nil || s.Msg.Containers[0].Status.State != v1.ContainerState_CONTAINER_STATE_EXITED {
		t.Fatal(s, err)
	}
	r, err := b.containers.Remove(ctx, connect.NewRequest(&v1.RemoveContainersRequest{Selector: pick("one"), Wait: true}))
	if err != nil || len(r.Msg.Removed) != 1 || len(b.list(true)) != 0 {
		t.Fatal(r, err)
	}
	if _, err := b.containers.Inspect(ctx, connect.NewRequest(&v1.ContainerRequest{Container: "one"})); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

func (b *bed) exec(name string, args ...string) (string, int32) {
	b.t.Helper()
	st := b.containers.Exec(ctxOf(b.t))
	defer st.CloseResponse()
	defer st.CloseRequest()
	if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: &v1.ExecSpec{ContainerId: name, Args: args}}}); err != nil {
		b.t.Fatal(err)
	}
	var out strings.Builder
	for {
		m, err := st.Receive()
		if err != nil {
			b.t.Fatal(err)
		}
		out.Write(m.GetStdout())
		if x, ok := m.Kind.(*v1.StreamOutput_ExitCode); ok {
			return out.String(), x.ExitCode
		}
	}
}

func simple(project, service, image string, replicas int32) *v1.ApplyProjectRequest {
	return &v1.ApplyProjectRequest{Project: project, Wait: true, Services: []*v1.ServiceSpec{{Name: service, Replicas: replicas, Template: &v1.ContainerSpec{Image: image}}}}
}

func listNames(cs []*v1.Container) string {
	var out []string
	for _, c := range cs {
		out = append(out, c.Meta.Name)
	}
	return strings.Join(out, " ")
}

func TestScaleAndReplace(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(simple("p", "web", "v1", 3))
	if n := listNames(b.list(true)); n != "p-web-1 p-web-2 p-web-3" {
		t.Fatal(n)
	}
	st, err := b.projects.Scale(ctxOf(t), connect.NewRequest(&v1.ScaleRequest{Project: "p", Replicas: map[string]int32{"web": 1}, Wait: true}))
	if err != nil {
		t.Fatal(err)
	}
	for st.Receive() {
	}
	if st.Err() != nil {
		t.Fatal(st.Err())
	}
	eventually(t, "one container", func() bool { return listNames(b.list(true)) == "p-web-1" })
	old := b.list(true)[0].Meta.Id
	for _, order := range []string{"stop-first", "start-first"} {
		r := simple("p", "web", "image-"+order, 2)
		r.Services[0].UpdateOrder, r.Services[0].UpdateParallelism = order, 1
		a := b.apply(r)
		if len(a.result.Containers) != 2 {
			t.Fatal(order, listNames(a.result.Containers))
		}
		for _, c := range a.result.Containers {
			if c.Meta.Id == old || c.Spec.Image != "image-"+order {
				t.Error(order, "was not replaced:", c.Meta.Name, c.Spec.Image)
			}
		}
	}
	r := simple("p", "web", "image-start-first", 2)
	r.Services[0].UpdateOrder, r.Services[0].UpdateParallelism = "start-first", 1
	if a := b.apply(r); !a.result.Unchanged {
		t.Error(a.plan)
	}
	ids := names2ids(b.list(true))
	r.ForceRecreate = true
	b.apply(r)
	for id := range names2ids(b.list(true)) {
		if ids[id] {
			t.Error("not recreated")
		}
	}
	r.ForceRecreate = false
	if a := b.apply(r); !a.result.Unchanged {
		t.Error("recreated twice:", a.plan)
	}
	two := simple("p", "other", "x", 1)
	if a := b.apply(two); len(a.plan.Warnings) != 1 || !strings.Contains(a.plan.Warnings[0], "web") {
		t.Error(a.plan.Warnings)
	}
	two.RemoveOrphans = true
	b.apply(two)
	eventually(t, "orphans gone", func() bool { return listNames(b.list(true)) == "p-other-1" })
}

func names2ids(cs []*v1.Container) map[string]bool {
	m := map[string]bool{}
	for _, c := range cs {
		m[c.Meta.Id] = true
	}
	return m
}

func TestApplySaysAllThatIsWrong(t *testing.T) {
	b := newBed(t, Options{})
	_, err := b.tryApply(&v1.ApplyProjectRequest{Project: "p", Services: []*v1.ServiceSpec{
		{Name: "a", Replicas: 2, ContainerName: "fixed", Template: &v1.ContainerSpec{Image: "x", DependsOn: []*v1.Dependency{{Service: "b", Required: true}}, Networks: []*v1.NetworkAttachment{{Network: "nope"}}}},
		{Name: "b", Replicas: 1, Template: &v1.ContainerSpec{DependsOn: []*v1.Dependency{{Service: "a", Required: true}}, SecurityOpt: []string{"no-new-privileges", `seccomp={"defaultAction":"ALLOW"}`, "seccomp=/etc/profile.json"},
			Mounts: []*v1.Mount{{Type: v1.Mount_TYPE_BIND, Source: "/etc", Target: "/x"}, {Type: v1.Mount_TYPE_VOLUME, Source: "v", Target: "/v"}}}},
	}})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	for _, want := range []string{"circle", "nope", "container_name", "an image is needed", "metal", `volume "v"`, "defaultAction: ", "the text of the profile is wanted"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not told: %v", want, err)
		}
	}
	b.apply(&v1.ApplyProjectRequest{Project: "one", Wait: true, Services: []*v1.ServiceSpec{{Name: "w", Replicas: 1, Template: &v1.ContainerSpec{Image: "x", Ports: []*v1.PortMapping{{ContainerPort: 1, HostPort: 80}}}}}})
	_, err = b.tryApply(&v1.ApplyProjectRequest{Project: "two", Services: []*v1.ServiceSpec{{Name: "w", Replicas: 1, Template: &v1.ContainerSpec{Image: "x", Ports: []*v1.PortMapping{{ContainerPort: 1, HostPort: 80}}}}}})
	if err == nil || !strings.Contains(err.Error(), "one-w-1") {
		t.Error(err)
	}
}

func TestFollowedLogsAndStats(t *testing.T) {
	b := newBed(t, Options{})
	ctx, cancel := context.WithCancel(ctxOf(t))
	b.host.Script("app", fakehost.Script{Output: []string{"line"}})
	b.apply(simple("p", "web", "app", 2))
	st, err := b.containers.Logs(ctx, connect.NewRequest(&v1.LogsRequest{Selector: &v1.Selector{Project: "p"}, Options: &v1.LogOptions{Follow: true, Tail: -1}}))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for len(got) < 2 && st.Receive() {
		got[st.Msg().ContainerName] = true
	}
	cancel()
	st.Close()
	if len(got) != 2 {
		t.Fatal(got)
	}
	s, err := b.containers.Stats(ctxOf(t), connect.NewRequest(&v1.StatsRequest{Machines: true}))
	if err != nil || !s.Receive() {
		t.Fatal(err, s.Err())
	}
	defer s.Close()
	rows := s.Msg().Rows
	if len(rows) != 3 || rows[0].Kind != "container" || rows[2].Kind != "machine" || rows[0].CpuPercent < 25 || rows[0].CpuPercent > 75 {
		t.Error(rows)
	}

}

func TestHostLostAndBack(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(simple("p", "web", "x", 1))
	// A second agent with the same id takes the place of the first, then dies.
	token, _ := EnsureToken(b.state)
	if _, err := EnsureToken(b.state); err != nil {
		t.Fatal(err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctxOf(t), "unix", SocketPath(b.run))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := rpc.OpenTunnel(ctxOf(t), conn, "h-1", strings.Repeat("0", 64)); !errdefs.IsPermissionDenied(err) {
		t.Error("a wrong token was taken:", err)
	}
	other := fakehost.New(fakehost.Options{ID: "h-2"})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); other.Connect(ctx, SocketPath(b.run), token) }()
	online := func(id string) bool {
		res, err := b.system.Hosts(ctxOf(t), connect.NewRequest(&v1.ListHostsRequest{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range res.Msg.Hosts {
			if h.Meta.Id == id {
				return h.Connected
			}
		}
		return false
	}
	eventually(t, "h-2 is there", func() bool { return online("h-2") })
	r := simple("q", "web", "x", 1)
	r.Services[0].Template.HostAffinity = []string{"h-2"}
	b.apply(r)
	cancel()
	<-done
	eventually(t, "h-2 is lost", func() bool { return !online("h-2") })
	eventually(t, "its container is unknown", func() bool {
		return b.inspect("q-web-1").Status.State == v1.ContainerState_CONTAINER_STATE_UNKNOWN
	})
	if b.inspect("p-web-1").Status.State != v1.ContainerState_CONTAINER_STATE_RUNNING {
		t.Error("the other host's container suffers")
	}
	ctx, cancel = context.WithCancel(context.Background())
	done = make(chan struct{})
	go func() { defer close(done); other.Connect(ctx, SocketPath(b.run), token) }()
	defer func() { cancel(); <-done }()
	eventually(t, "its container runs", func() bool {
		return b.inspect("q-web-1").Status.State == v1.ContainerState_CONTAINER_STATE_RUNNING
	})
}

func TestUpdateGrowsTheMachine(t *testing.T) {
	b := newBed(t, Options{})
	b.apply(simple("p", "web", "x", 1))
	_, err := b.containers.Update(ctxOf(t), connect.NewRequest(&v1.UpdateContainerRequest{Container: "p-web-1", Resources: &v1.Resources{MemoryBytesLimit: 1 << 30}}))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the machine grows", func() bool {
		l, _ := b.machines.List(ctxOf(t), connect.NewRequest(&v1.ListMachinesRequest{}))
		return len(l.Msg.Machines) == 1 && l.Msg.Machines[0].Status.GetSize().GetMemoryBytes() >= 1<<30+64<<20
	})
}
