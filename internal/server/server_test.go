package server

import (
	"context"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/control/fakehost"
	"tandem/internal/rpc"
)

// bed is a server behind a real socket and a fake host behind a real tunnel.
type bed struct {
	t          testing.TB
	state, run string
	stop       func()
	host       *fakehost.Host
	projects   tandemv1connect.ProjectServiceClient
	containers tandemv1connect.ContainerServiceClient
	machines   tandemv1connect.MachineServiceClient
	images     tandemv1connect.ImageServiceClient
	volumes    tandemv1connect.VolumeServiceClient
	system     tandemv1connect.SystemServiceClient
	stateOf    tandemv1connect.StateServiceClient
	opts       Options
}

func newBed(t testing.TB, o Options) *bed {
	t.Helper()
	run, err := os.MkdirTemp("", "tsrv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	b := &bed{t: t, state: t.TempDir(), run: run, opts: o, host: fakehost.New(fakehost.Options{ID: "h-1"})}
	b.start()
	ctx, cancel := context.WithCancel(context.Background())
	token, err := EnsureToken(b.state)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); b.host.Connect(ctx, SocketPath(run), token) }()
	t.Cleanup(func() { cancel(); <-done; b.stop() })
	return b
}

func (b *bed) start() {
	b.t.Helper()
	o := b.opts
	o.StateDir, o.RunDir = b.state, b.run
	if testing.Verbose() && os.Getenv("TANDEM_TEST_LOG") != "" {
		o.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	ready := make(chan struct{})
	o.Ready = func() { close(ready) }
	s, err := New(o)
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	select {
	case <-ready:
	case err := <-done:
		b.t.Fatal(err)
	case <-time.After(time.Minute):
		b.t.Fatal("the server does not start")
	}
	b.stop = func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				b.t.Error("run:", err)
			}
			done <- nil
		case <-time.After(time.Minute):
			b.t.Error("the server does not stop")
		}
	}
	hc := rpc.NewClient(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", SocketPath(b.run))
	})
	b.projects = tandemv1connect.NewProjectServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.containers = tandemv1connect.NewContainerServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.machines = tandemv1connect.NewMachineServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.images = tandemv1connect.NewImageServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.volumes = tandemv1connect.NewVolumeServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.system = tandemv1connect.NewSystemServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
	b.stateOf = tandemv1connect.NewStateServiceClient(hc, rpc.BaseURL, rpc.ClientOptions()...)
}

func ctxOf(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

type applied struct {
	plan   *v1.Plan
	steps  []*v1.Progress
	result *v1.ApplyResult
}

func (b *bed) tryApply(r *v1.ApplyProjectRequest) (*applied, error) {
	b.t.Helper()
	st, err := b.projects.Apply(ctxOf(b.t), connect.NewRequest(r))
	if err != nil {
		return nil, err
	}
	defer st.Close()
	out := &applied{}
	for st.Receive() {
		switch k := st.Msg().Kind.(type) {
		case *v1.ApplyProjectResponse_Plan:
			out.plan = k.Plan
		case *v1.ApplyProjectResponse_Progress:
			out.steps = append(out.steps, k.Progress)
		case *v1.ApplyProjectResponse_Result:
			out.result = k.Result
		}
	}
	return out, st.Err()
}

func (b *bed) apply(r *v1.ApplyProjectRequest) *applied {
	b.t.Helper()
	a, err := b.tryApply(r)
	if err != nil {
		b.t.Fatal(err)
	}
	return a
}

func (b *bed) remove(project string, volumes bool) {
	b.t.Helper()
	st, err := b.projects.Remove(ctxOf(b.t), connect.NewRequest(&v1.RemoveProjectRequest{Project: project, Volumes: volumes, Wait: true}))
	if err != nil {
		b.t.Fatal(err)
	}
	defer st.Close()
	for st.Receive() {
	}
	if err := st.Err(); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) list(all bool) []*v1.Container {
	b.t.Helper()
	res, err := b.containers.List(ctxOf(b.t), connect.NewRequest(&v1.ListContainersRequest{All: all}))
	if err != nil {
		b.t.Fatal(err)
	}
	return res.Msg.Containers
}

// shop is web (Apache) before api (Tomcat), as in the demo.
func shop() *v1.ApplyProjectRequest {
	check := &v1.HealthCheck{Test: []string{"CMD", "true"}}
	return &v1.ApplyProjectRequest{Project: "shop", Wait: true,
		Volumes: []*v1.VolumeRequest{{Name: "data"}},
		Services: []*v1.ServiceSpec{
			{Name: "web", Replicas: 1, Template: &v1.ContainerSpec{Image: "httpd", Healthcheck: check, Ports: []*v1.PortMapping{{ContainerPort: 80, HostPort: 8080}},
				DependsOn: []*v1.Dependency{{Service: "api", Condition: "service_healthy", Required: true}}}},
			{Name: "api", Replicas: 1, Template: &v1.ContainerSpec{Image: "tomcat", Healthcheck: check,
				Mounts: []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Source: "data", Target: "/data"}},
				Files:  []*v1.File{{Target: "/run/secrets/x", Content: []byte("hush"), Secret: true}}}},
		}}
}

func TestUpAndDown(t *testing.T) {
	b := newBed(t, Options{})
	b.host.Script("tomcat", fakehost.Script{HealthyAfter: 200 * time.Millisecond, Output: []string{"tomcat is up"}})
	a := b.apply(shop())
	if a.plan == nil || len(a.plan.Actions) == 0 || a.result == nil || a.result.Unchanged {
		t.Fatal(a)
	}
	if len(a.result.Containers) != 2 || len(a.result.Machines) != 1 {
		t.Fatalf("%d containers in %d machines", len(a.result.Containers), len(a.result.Machines))
	}
	for _, c := range a.result.Containers {
		if c.Status.Health != v1.Health_HEALTH_HEALTHY || c.Assignment.Ip == "" || c.Assignment.Reason.GetSummary() == "" {
			t.Error(c)
		}
		for _, f := range c.Spec.Files {
			if len(f.Content) > 0 {
				t.Error("a secret is shown")
			}
		}
	}
	web, api := a.result.Containers[1], a.result.Containers[0]
	if web.Meta.Name != "shop-web-1" || web.Status.StartedAt.AsTime().Before(api.Status.StartedAt.AsTime().Add(150*time.Millisecond)) {
		t.Error("web did not wait for api to be healthy")
	}
	spec := b.host.Spec()
	if len(spec.Ports) != 1 || spec.Ports[0].HostPort != 8080 || len(spec.Ports[0].Backends) != 1 || len(spec.Volumes) != 1 {
		t.Error(spec.Ports, spec.Volumes)
	}
	names := map[string]bool{}
	for _, n := range spec.Names {
		names[n.Name] = true
	}
	for _, n := range []string{"web", "api", "web.shop", "shop-api-1"} {
		if !names[n] {
			t.Errorf("%s does not resolve", n)
		}
	}
	eventually(t, "the port leads to a container that is ready", func() bool { return b.host.Spec().Ports[0].Backends[0].Ready })
	before := b.host.Applies()
	a = b.apply(shop())
	if !a.result.Unchanged || len(a.plan.Actions) != 0 {
		t.Error("a second up changes something:", a.plan)
	}
	if b.host.Applies() != before {
		t.Error("a second up reaches the host")
	}
	b.remove("shop", false)
	if m, c, v := b.host.Left(); c != 0 || v != 1 {
		t.Errorf("left: %d machines, %d containers, %d volumes", m, c, v)
	}
	if l := b.list(true); len(l) != 0 {
		t.Error(l)
	}
	vs, err := b.volumes.List(ctxOf(t), connect.NewRequest(&v1.ListVolumesRequest{}))
	if err != nil || len(vs.Msg.Volumes) != 1 {
		t.Fatal(vs, err)
	}
	b.apply(shop())
	b.remove("shop", true)
	if _, c, v := b.host.Left(); c != 0 || v != 0 {
		t.Errorf("left: %d containers, %d volumes", c, v)
	}
}

func TestPlanOnlyWritesNothing(t *testing.T) {
	b := newBed(t, Options{})
	r := shop()
	r.PlanOnly = true
	a := b.apply(r)
	kinds := map[string]int{}
	for _, x := range a.plan.Actions {
		kinds[x.Kind]++
	}
	if kinds["create"] != 2 || kinds["create-network"] != 1 || kinds["create-volume"] != 1 {
		t.Error(kinds)
	}
	if len(b.list(true)) != 0 {
		t.Error("the plan was carried out")
	}
}

func TestFailureIsToldClearly(t *testing.T) {
	b := newBed(t, Options{})
	b.host.Script("bad", fakehost.Script{Exits: true, ExitCode: 3, Output: []string{"no such table: users"}})
	_, err := b.tryApply(&v1.ApplyProjectRequest{Project: "p", Wait: true, Services: []*v1.ServiceSpec{{Name: "x", Replicas: 1, Template: &v1.ContainerSpec{Image: "bad"}}}})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "exit code 3") || !strings.Contains(err.Error(), "no such table") {
		t.Fatal(err)
	}
	_, err = b.tryApply(&v1.ApplyProjectRequest{Project: "huge", Wait: true, Timeout: durationpb.New(2 * time.Second), Services: []*v1.ServiceSpec{{Name: "x", Replicas: 1,
		Template: &v1.ContainerSpec{Image: "x", Resources: &v1.Resources{MemoryBytesReservation: 1 << 40}}}}})
	if err == nil || !strings.Contains(err.Error(), "huge-x-1") {
		t.Fatal(err)
	}
	ex, err := b.system.Explain(ctxOf(t), connect.NewRequest(&v1.ContainerRequest{Container: "huge-x-1"}))
	if err != nil || !strings.Contains(ex.Msg.Text, "has no place") || !strings.Contains(ex.Msg.Text, "memory") {
		t.Fatal(ex, err)
	}
}

func TestRunAttachRemove(t *testing.T) {
	b := newBed(t, Options{})
	ctx := ctxOf(t)
	b.host.Script("busybox", fakehost.Script{Exits: true, RunFor: 100 * time.Millisecond, ExitCode: 7, Output: []string{"early", "late"}})
	c, err := b.containers.Create(ctx, connect.NewRequest(&v1.CreateContainerRequest{Start: true, Spec: &v1.ContainerSpec{Image: "busybox", AutoRemove: true}}))
	if err != nil {
		t.Fatal(err)
	}
	st := b.containers.Attach(ctx)
	if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: &v1.AttachSpec{ContainerId: c.Msg.Meta.Id}}}); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	code := int32(-1)
	for {
		m, err := st.Receive()
		if err != nil {
			break
		}
		out.Write(m.GetStdout())
		if x, ok := m.Kind.(*v1.StreamOutput_ExitCode); ok {
			code = x.ExitCode
			break
		}
	}
	st.CloseRequest()
	st.CloseResponse()
	if out.String() != "early\nlate\n" || code != 7 {
		t.Fatalf("%q, %d", out.String(), code)
	}
	// Who has the exit code and then asks, finds it.
	if c, err := b.containers.Inspect(ctx, connect.NewRequest(&v1.ContainerRequest{Container: c.Msg.Meta.Id})); err == nil {
		if st := c.Msg.GetStatus(); st.GetFinishedAt() == nil || st.GetExitCode() != 7 {
			t.Errorf("after its exit code it is %v", st)
		}
	} else if !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	w, err := b.containers.Wait(ctx, connect.NewRequest(&v1.WaitContainerRequest{Container: c.Msg.Meta.Id, Condition: "removed"}))
	if err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if err == nil && w.Msg.ExitCode != 7 {
		t.Fatal(w.Msg)
	}
}
