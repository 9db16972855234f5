package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/compose"
	"tandem/internal/rpc"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// fakeServer answers with what a small cluster would.
type fakeServer struct {
	created     *v1.CreateContainerRequest
	execed      *v1.ExecSpec
	removed     *v1.RemoveProjectRequest
	purged      *v1.PurgeStateRequest
	broken      bool
	asked       *v1.AskRequest
	carried     *v1.CarryOutRequest
	recommended *v1.RecommendRequest
	inForce     *v1.AppliedRecommendation
	policy      *v1.ChangePolicyRequest
}

func (f *fakeServer) list() []*v1.Container {
	return []*v1.Container{{
		Meta: &v1.Meta{Id: "c-1", Project: "shop", Name: "shop-web-1"}, Service: "web",
		Spec:       &v1.ContainerSpec{Image: "httpd", Files: []*v1.File{{Target: "/run/secrets/x", Content: []byte("hidden"), Secret: true}}},
		Assignment: &v1.Assignment{HostId: "h-1", MachineId: "m-abc", Ip: "10.64.0.2", Ports: []*v1.PortMapping{{HostPort: 8080, ContainerPort: 80}}},
		Status:     &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_RUNNING, Health: v1.Health_HEALTH_HEALTHY, StartedAt: timestamppb.New(time.Now().Add(-time.Hour))},
	}, {
		Meta: &v1.Meta{Id: "c-2", Project: "shop", Name: "evil\x1b[2J"}, Spec: &v1.ContainerSpec{Image: "x"},
		Status: &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_FAILED, Message: "image x: not found"},
	}}
}

type containers struct {
	tandemv1connect.UnimplementedContainerServiceHandler
	*fakeServer
}

func (f containers) List(context.Context, *connect.Request[v1.ListContainersRequest]) (*connect.Response[v1.ListContainersResponse], error) {
	return connect.NewResponse(&v1.ListContainersResponse{Containers: f.list()}), nil
}

func (f containers) Inspect(_ context.Context, r *connect.Request[v1.ContainerRequest]) (*connect.Response[v1.Container], error) {
	if r.Msg.Container != "shop-web-1" {
		return nil, connect.NewError(connect.CodeNotFound, errdefs.ErrNotFound.WithMessage("no container "+r.Msg.Container))
	}
	return connect.NewResponse(f.list()[0]), nil
}

func (f containers) Create(_ context.Context, r *connect.Request[v1.CreateContainerRequest]) (*connect.Response[v1.Container], error) {
	f.created = r.Msg
	return connect.NewResponse(&v1.Container{Meta: &v1.Meta{Id: "c-9", Name: "tender_ada"}}), nil
}

func (f containers) Attach(_ context.Context, st *connect.BidiStream[v1.StreamInput, v1.StreamOutput]) error {
	if _, err := st.Receive(); err != nil {
		return err
	}
	st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: []byte("out\n")}})
	st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stderr{Stderr: []byte("err\n")}})
	return st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: 7}})
}

func (f containers) Exec(_ context.Context, st *connect.BidiStream[v1.StreamInput, v1.StreamOutput]) error {
	m, err := st.Receive()
	if err != nil {
		return err
	}
	f.execed = m.GetExec()
	for {
		m, err := st.Receive()
		if err != nil {
			return err
		}
		if m.GetCloseStdin() {
			return st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_ExitCode{ExitCode: 0}})
		}
		st.Send(&v1.StreamOutput{Kind: &v1.StreamOutput_Stdout{Stdout: bytes.ToUpper(m.GetStdin())}})
	}
}

type projects struct {
	tandemv1connect.UnimplementedProjectServiceHandler
	*fakeServer
}

func (f projects) Remove(_ context.Context, r *connect.Request[v1.RemoveProjectRequest], st *connect.ServerStream[v1.Progress]) error {
	f.removed = r.Msg
	if r.Msg.Project != "shop" {
		return fmt.Errorf("no project %s: %w", r.Msg.Project, errdefs.ErrNotFound)
	}
	return st.Send(&v1.Progress{Id: "project shop", Action: "removed", Done: true})
}

type machines struct {
	tandemv1connect.UnimplementedMachineServiceHandler
	looks chan bool // Inspect was called
}

func (machines) List(context.Context, *connect.Request[v1.ListMachinesRequest]) (*connect.Response[v1.ListMachinesResponse], error) {
	return connect.NewResponse(&v1.ListMachinesResponse{Machines: []*v1.Machine{{
		Meta: &v1.Meta{Id: "m-abc", Name: "m-1", Project: "shop"}, HostId: "h-1", Ceiling: &v1.Size{CpuMilli: 2000, MemoryBytes: 8 << 30},
		Status: &v1.MachineStatus{State: v1.MachineState_MACHINE_STATE_RUNNING, Size: &v1.Size{CpuMilli: 1000, MemoryBytes: 256 << 20}},
	}}}), nil
}

// Inspect shows a machine that lacks something.
func (f machines) Inspect(context.Context, *connect.Request[v1.MachineRequest]) (*connect.Response[v1.Machine], error) {
	f.looks <- true
	return connect.NewResponse(&v1.Machine{Meta: &v1.Meta{Name: "m-1"}, Size: &v1.Size{CpuMilli: 2000, MemoryBytes: 256 << 20},
		Status: &v1.MachineStatus{Size: &v1.Size{CpuMilli: 1000, MemoryBytes: 256 << 20}, Message: "no room"}}), nil
}

// Resize is done when somebody has looked at the machine twice.
func (f machines) Resize(context.Context, *connect.Request[v1.ResizeMachineRequest]) (*connect.Response[v1.Machine], error) {
	<-f.looks
	<-f.looks
	return connect.NewResponse(&v1.Machine{Meta: &v1.Meta{Name: "m-1"}, Status: &v1.MachineStatus{Size: &v1.Size{CpuMilli: 2000, MemoryBytes: 256 << 20}}}), nil
}

type system struct {
	tandemv1connect.UnimplementedSystemServiceHandler
	f *fakeServer
}

func (system) Hosts(context.Context, *connect.Request[v1.ListHostsRequest]) (*connect.Response[v1.ListHostsResponse], error) {
	return connect.NewResponse(&v1.ListHostsResponse{Hosts: []*v1.Host{{Meta: &v1.Meta{Id: "h-1", Name: "alpha"}, Connected: true,
		Facts: &v1.HostFacts{Capacity: &v1.Size{CpuMilli: 2000, MemoryBytes: 24 << 30}, Accelerator: "tcg"}}}}), nil
}

func (system) Doctor(context.Context, *connect.Request[v1.DoctorRequest]) (*connect.Response[v1.DoctorResponse], error) {
	return connect.NewResponse(&v1.DoctorResponse{Findings: []*v1.Finding{{Code: "qemu-missing", Severity: "error", Title: "QEMU is missing", Remedy: "apt-get install qemu-system-x86"}}}), nil
}

// start serves f on a socket and returns a function that runs the command.
func start(t *testing.T, f *fakeServer) func(stdin string, args ...string) (out, errs string, code int) {
	t.Helper()
	dir, err := os.MkdirTemp("", "cli")
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	mux := http.NewServeMux()
	mux.Handle(tandemv1connect.NewContainerServiceHandler(containers{fakeServer: f}, rpc.HandlerOptions()...))
	mux.Handle(tandemv1connect.NewMachineServiceHandler(machines{looks: make(chan bool, 100)}, rpc.HandlerOptions()...))
	mux.Handle(tandemv1connect.NewSystemServiceHandler(system{f: f}, rpc.HandlerOptions()...))
	mux.Handle(tandemv1connect.NewStateServiceHandler(stateService{fakeServer: f}, rpc.HandlerOptions()...))
	mux.Handle(tandemv1connect.NewProjectServiceHandler(projects{fakeServer: f}, rpc.HandlerOptions()...))
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := rpc.NewServer(mux)
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close(); os.RemoveAll(dir) })
	t.Chdir(t.TempDir())
	return func(stdin string, args ...string) (string, string, int) {
		var o, e bytes.Buffer
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		code := Run(ctx, Env{Stdin: strings.NewReader(stdin), Stdout: &o, Stderr: &e, Version: "1.2.3",
			Compose: func(ctx context.Context, o ComposeFiles) (*v1.ApplyProjectRequest, []string, error) {
				p, err := compose.Load(ctx, compose.Options{Files: o.Files, WorkingDir: o.WorkingDir, ProjectName: o.ProjectName,
					Profiles: o.Profiles, EnvFiles: o.EnvFiles, Env: os.Environ()})
				if err != nil {
					return nil, nil, err
				}
				return p.Request, p.Warnings, nil
			},
			Getenv: func(k string) string {
				return map[string]string{"TANDEM_HOST": "unix://" + socket}[k]
			}}, args)
		return o.String(), e.String(), code
	}
}

func TestPs(t *testing.T) {
	tandem := start(t, &fakeServer{})
	out, _, code := tandem("", "ps")
	for _, want := range []string{"shop-web-1", "up About an hour (healthy)", "m-1 on alpha", "*:8080->80/tcp", "failed: image x: not found"} {
		if !strings.Contains(out, want) {
			t.Errorf("ps lacks %q:\n%s", want, out)
		}
	}
	if code != 0 || strings.Contains(out, "\x1b") {
		t.Errorf("code %d; a name moved the cursor: %q", code, out)
	}
}

func TestJSONIsAnArrayInSnakeCaseWithoutSecrets(t *testing.T) {
	tandem := start(t, &fakeServer{})
	out, _, _ := tandem("", "ps", "--format", "json")
	var list []map[string]any
	if err := json.Unmarshal([]byte(out), &list); err != nil || len(list) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	if _, ok := list[1]["assignment"].(map[string]any)["machine_id"]; !ok {
		t.Errorf("no machine_id: %s", out)
	}
	if strings.Contains(out, "aGlkZGVu") { // base64 of the secret
		t.Error("a secret was printed")
	}
}

func TestRunSendsWhatWasAskedAndEndsAsTheContainerDid(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	profile := filepath.Join(t.TempDir(), "profile.json")
	if err := os.WriteFile(profile, []byte("{\n\t\"defaultAction\": \"SCMP_ACT_LOG\"\n}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, code := tandem("", "run", "--rm", "-p", "127.0.0.1:8080:80/tcp", "-v", "data:/d:ro", "-m", "64m", "--cpus", "0.5", "-e", "A=b", "--security-opt", "no-new-privileges",
		"--security-opt", "seccomp="+profile, "--isolation", "own", "busybox", "sh", "-c", "exit 7")
	if out != "out\n" || errs != "err\n" || code != 7 {
		t.Errorf("out %q, err %q, code %d", out, errs, code)
	}
	s := f.created.GetSpec()
	if s.GetResources().GetMemoryBytesLimit() != 64<<20 || s.GetResources().GetCpuMilliLimit() != 500 || !s.GetAutoRemove() ||
		s.GetIsolation() != v1.Isolation_ISOLATION_OWN || strings.Join(s.GetCommand().GetValues(), " ") != "sh -c exit 7" {
		t.Errorf("spec %v", s)
	}
	if o := s.GetSecurityOpt(); len(o) != 2 || o[0] != "no-new-privileges" || o[1] != `seccomp={"defaultAction":"SCMP_ACT_LOG"}` {
		t.Errorf("security options %q", o)
	}
	if p := s.GetPorts(); len(p) != 1 || p[0].HostIp != "127.0.0.1" || p[0].HostPort != 8080 || p[0].ContainerPort != 80 {
		t.Errorf("ports %v", p)
	}
	if m := s.GetMounts(); len(m) != 1 || m[0].Source != "data" || !m[0].ReadOnly {
		t.Errorf("mounts %v", m)
	}
}

func TestExecConnectsStandardInput(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	out, errs, code := tandem("hello", "exec", "-i", "shop-web-1", "tr", "a-z", "A-Z")
	if out != "HELLO" || code != 0 {
		t.Errorf("%q %q %d", out, errs, code)
	}
	if strings.Join(f.execed.GetArgs(), " ") != "tr a-z A-Z" {
		t.Errorf("args %v", f.execed.GetArgs())
	}
}

func TestErrorsTellTheNextStep(t *testing.T) {
	tandem := start(t, &fakeServer{})
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"inspect", "nobody"}, ExitFailed, "no container nobody"},
		{[]string{"pss"}, ExitUsage, "tandem --help"},
		{[]string{"ps", "--nope"}, ExitUsage, "unknown flag"},
		{[]string{"ps", "--format", "xml"}, ExitUsage, "text or json"},
		{[]string{"run", "--restart", "maybe", "x"}, ExitUsage, "unless-stopped"},
		{[]string{"run", "--security-opt", "seccomp=/nowhere/profile.json", "x"}, ExitUsage, "seccomp profile /nowhere/profile.json: there is no such file"},
		{[]string{"run", "--security-opt", "colour=blue", "x"}, ExitUsage, "not known"},
		{[]string{"run", "-p", "80:80:80:80", "x"}, ExitUsage, "--publish"},
		{[]string{"-H", "unix:///nowhere/tandem.sock", "ps"}, ExitFailed, "sudo tandem serve"},
		{[]string{"-H", "tcp://1.2.3.4", "ps"}, ExitUsage, "unix://"},
		{[]string{"stop"}, ExitUsage, "name a container"},
		{[]string{"doctor"}, ExitFailed, "must be mended"},
	} {
		_, errs, code := tandem("", c.args...)
		if code != c.code || !strings.Contains(errs, c.want) {
			t.Errorf("tandem %v: code %d, %q; want %d with %q", c.args, code, errs, c.code, c.want)
		}
	}
}

func TestPicture(t *testing.T) {
	tandem := start(t, &fakeServer{})
	out, _, _ := tandem("", "picture")
	want := []string{"host      alpha", "  ├─ ", "container shop-web-1", "waiting"}
	for _, w := range want[:1] {
		if !strings.Contains(out, w) {
			t.Errorf("no %q in:\n%s", w, out)
		}
	}
	if strings.Index(out, "machine   m-1") > strings.Index(out, "shop-web-1") {
		t.Errorf("the machine stands below its container:\n%s", out)
	}
}

func TestHelpListsEveryCommandInAGroup(t *testing.T) {
	var o bytes.Buffer
	root := New(Env{Stdout: &o, Stderr: &o})
	for _, c := range root.Commands() {
		if c.GroupID == "" && c.Name() != "help" && c.Name() != "completion" {
			t.Errorf("%s is in no group", c.Name())
		}
		if c.Short == "" {
			t.Errorf("%s has no short text", c.Name())
		}
	}
	// Flags of one command must not contradict each other: cobra panics on use.
	for _, c := range root.Commands() {
		c.InheritedFlags()
		c.LocalFlags()
	}
}

func TestProgressSaysEachStepOnce(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b)
	now := time.Unix(0, 0)
	p.now, p.started = func() time.Time { return now }, now
	for _, m := range []*v1.Progress{
		{Id: "m-1", Action: "booting"}, {Id: "m-1", Action: "booting"},
		{Id: "image", Action: "pulling", Unit: "bytes", Current: 1, Total: 100}, {Id: "image", Action: "pulling", Unit: "bytes", Current: 2, Total: 100},
		{Id: "m-1", Action: "running", Done: true},
	} {
		p.step(m)
	}
	if n := strings.Count(b.String(), "\n"); n != 3 {
		t.Errorf("%d lines:\n%s", n, b.String())
	}
}

// A machine that does not get its new size soon says what it waits for, once.
func TestResizeSaysWhatItWaitsFor(t *testing.T) {
	out, errs, code := start(t, &fakeServer{})("", "machine", "resize", "m-1", "--cpus", "2")
	if code != 0 || out != "m-1: 2 CPU, 256 MiB\n" {
		t.Error(code, out)
	}
	if !strings.Contains(errs, "m-1") || !strings.Contains(errs, "1 CPU, 256 MiB of 2 CPU, 256 MiB  no room\n") || strings.Count(errs, "\n") != 1 {
		t.Errorf("%q", errs)
	}
}

func TestDown(t *testing.T) {
	f := &fakeServer{}
	tandem := start(t, f)
	for _, x := range []struct {
		args    string
		project string
		volumes bool
		grace   time.Duration // -1: none given
		warns   bool
	}{
		{"down -p shop", "shop", false, -1, false},
		{"down -p shop -v -t 7", "shop", true, 7 * time.Second, false},
		{"down -p shop --timeout 0", "shop", false, 0, false},
		{"down -p gone", "gone", false, -1, true},
		{"down -p gone -v", "gone", true, -1, true},
	} {
		out, errs, code := tandem("", strings.Fields(x.args)...)
		if code != ExitDone || out != "" || strings.Contains(errs, "warning: no project "+x.project) != x.warns {
			t.Errorf("%s: code %d, %q, %q", x.args, code, out, errs)
		}
		r := f.removed
		if r.Project != x.project || r.Volumes != x.volumes || !r.Wait || (r.Timeout == nil) != (x.grace < 0) || r.Timeout != nil && r.Timeout.AsDuration() != x.grace {
			t.Errorf("%s asked for %v", x.args, r)
		}
	}
	for _, bad := range []string{"-1", "10s"} {
		if _, errs, code := tandem("", "down", "-p", "shop", "-t", bad); code != ExitUsage {
			t.Errorf("-t %s: code %d, %s", bad, code, errs)
		}
	}
}
