package agent

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/guestimage/guesttest"
	"tandem/internal/hypervisor/kvmprobe"
	"tandem/internal/hypervisor/qemu"
	"tandem/internal/image"
	"tandem/internal/image/imagetest"
	netfake "tandem/internal/network/fake"
	"tandem/internal/rpc"
	"tandem/internal/volume"
)

func TestMain(m *testing.M) {
	kvmprobe.MaybeChild()
	os.Exit(m.Run())
}

// realHost is an agent with QEMU, a real guest, real images and disks.
type realHost struct {
	t    *testing.T
	dir  string
	drv  *qemu.Driver
	imgs *image.LocalStore
	vols *volume.LocalStore
	a    *Agent
	stop func()
	c    tandemv1connect.AgentServiceClient
	spec *v1.HostSpec
}

func (h *realHost) start() {
	t := h.t
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	ctx, cancel := context.WithCancel(context.Background())
	var err error
	if h.drv, err = qemu.New(ctx, qemu.Options{StateDir: filepath.Join(h.dir, "q"), RunDir: filepath.Join(h.dir, "r"), Logger: log}); err != nil {
		t.Fatal(err)
	}
	if h.imgs, err = image.Open(filepath.Join(h.dir, "images"), image.Options{}); err != nil {
		t.Fatal(err)
	}
	if h.vols, err = volume.Open(filepath.Join(h.dir, "volumes"), volume.Options{}); err != nil {
		t.Fatal(err)
	}
	g := guesttest.Image(t)
	h.a, err = New(Options{StateDir: filepath.Join(h.dir, "agent"), Driver: h.drv, Images: h.imgs, Volumes: h.vols, Network: netfake.New(), Logger: log,
		Guest: Guest{Kernel: g.Kernel, Initrd: g.Initrd, Version: g.Version}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	// The server's side of the tunnel.
	tunnels := make(chan *rpc.Tunnel, 10)
	srv := httptest.NewServer(tunnelHandler(t, tunnels))
	dial := func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", srv.Listener.Addr().String())
	}
	go func() { done <- h.a.Run(ctx, dial, "secret") }()
	tun := <-tunnels
	h.c = tandemv1connect.NewAgentServiceClient(rpc.NewClient(tun.Dial), rpc.BaseURL, rpc.ClientOptions()...)
	h.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		tun.Close()
		srv.Close()
		h.drv.Close()
		h.imgs.Close()
		h.vols.Close()
	}
}

func (h *realHost) apply() {
	h.t.Helper()
	h.spec.Revision++
	if _, err := h.c.Apply(context.Background(), connect.NewRequest(&v1.ApplyHostRequest{Spec: proto.Clone(h.spec).(*v1.HostSpec)})); err != nil {
		h.t.Fatal(err)
	}
}

// until watches the agent's stream until ok.
func (h *realHost) until(what string, ok func(map[string]*v1.ContainerStatus, map[string]*v1.MachineStatus) bool) time.Duration {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	begin := time.Now()
	st, err := h.c.Watch(ctx, connect.NewRequest(&v1.WatchHostRequest{}))
	if err != nil {
		h.t.Fatal(err)
	}
	defer st.Close()
	cs, ms := map[string]*v1.ContainerStatus{}, map[string]*v1.MachineStatus{}
	for st.Receive() {
		m := st.Msg()
		if m.Full {
			clear(cs)
			clear(ms)
		}
		for _, c := range m.Containers {
			cs[c.Id] = c
		}
		for _, c := range m.Machines {
			ms[c.Id] = c
		}
		for _, id := range m.RemovedContainers {
			delete(cs, id)
		}
		for _, id := range m.RemovedMachines {
			delete(ms, id)
		}
		if ok(cs, ms) {
			return time.Since(begin)
		}
	}
	h.t.Fatalf("not seen: %s: %v; containers %v, machines %v", what, st.Err(), cs, ms)
	return 0
}

func (h *realHost) container(id string, script string) *v1.ContainerAssignment {
	c := &v1.ContainerAssignment{Id: id, Name: id, MachineId: "m-1", Generation: 1,
		Spec: &v1.ContainerSpec{Image: imagetest.BusyboxRef, Command: &v1.StringList{Values: []string{"sh", "-c", script}}}}
	h.spec.Containers = append(h.spec.Containers, c)
	return c
}

func TestRealMachine(t *testing.T) {
	dir, err := os.MkdirTemp("", "tda")
	if err != nil {
		t.Fatal(err)
	}
	h := &realHost{t: t, dir: dir, spec: &v1.HostSpec{ClusterId: "c1"}}
	h.start()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		list, _ := h.drv.List(ctx)
		for _, m := range list {
			h.drv.Delete(ctx, m.Spec.ID)
		}
		h.stop()
		os.RemoveAll(dir)
	})
	ctx := context.Background()
	f, err := os.Open(imagetest.BusyboxImage(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := h.imgs.Load(ctx, f, nil); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(4 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if list, _ := h.drv.Templates(ctx); len(list) > 0 && h.a.templates.isReady() {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no template")
		}
	}

	h.spec.Machines = []*v1.MachineAssignment{{Id: "m-1", Name: "m-1", Size: &v1.Size{CpuMilli: 1000, MemoryBytes: 384 << 20}}}
	h.spec.Volumes = []*v1.VolumeAssignment{{Id: "v-1", Name: "data", SizeBytes: 64 << 20}}
	c := h.container("c-1", "echo hello; echo kept >> /data/f; sleep 1000")
	c.Spec.Mounts = []*v1.Mount{{Type: v1.Mount_TYPE_VOLUME, Source: "data", Target: "/data"}}
	c.Volumes = []*v1.AssignedMount{{Target: "/data", VolumeId: "v-1"}}
	c.Spec.Restart = &v1.RestartPolicy{Name: "always"}
	h.apply()
	type cmap = map[string]*v1.ContainerStatus
	type mmap = map[string]*v1.MachineStatus
	up := func(cs cmap, _ mmap) bool { return cs["c-1"].GetState() == running }
	took := h.until("running", up)
	var ms *v1.MachineStatus
	h.until("machine running", func(_ cmap, m mmap) bool {
		ms = m["m-1"]
		return ms.GetState() == v1.MachineState_MACHINE_STATE_RUNNING && ms.Size.GetMemoryBytes() == 384<<20
	})
	t.Logf("first container after %s; machine by %s in %s", took, ms.StartMethod, ms.StartDuration.AsDuration())
	if ms.StartMethod != "clone" {
		t.Errorf("machine was started by %s", ms.StartMethod)
	}

	h.container("c-2", "exit 3")
	h.apply()
	took = h.until("exit", func(cs cmap, _ mmap) bool { return cs["c-2"].GetState() == exited && cs["c-2"].ExitCode == 3 })
	t.Logf("create to exit in the warm machine: %s", took)

	if out := h.exec("c-1", "cat", "/data/f"); out != "kept\n" {
		t.Errorf("exec: %q", out)
	}
	if out := h.logs("c-1"); out != "hello\n" {
		t.Errorf("logs: %q", out)
	}

	// A new agent finds all of it, and what ended meanwhile.
	h.container("c-3", "sleep 2; exit 4")
	h.apply()
	h.until("c-3 running", func(cs cmap, _ mmap) bool { return cs["c-3"].GetState() == running })
	pid := ms.Pid
	h.stop()
	time.Sleep(3 * time.Second)
	h.start()
	took = h.until("seen again", func(cs cmap, m mmap) bool {
		return up(cs, m) && cs["c-1"].Pid != 0 && cs["c-3"].GetState() == exited && cs["c-3"].ExitCode == 4 && m["m-1"].GetPid() == pid
	})
	t.Logf("all found again after %s", took)

	// The VMM dies: its containers are back, the volume's data is there.
	if err := syscall.Kill(int(pid), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	took = h.until("back after a crash", func(cs cmap, _ mmap) bool { return up(cs, nil) && cs["c-1"].RestartCount == 1 })
	t.Logf("back after %s", took)
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		// What was not flushed before the crash may be lost; what comes after is there.
		if strings.Contains(h.exec("c-1", "cat", "/data/f"), "kept\n") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the volume is empty")
		}
	}

	h.spec.Machines, h.spec.Containers = nil, nil
	for _, v := range h.spec.Volumes {
		h.spec.DeletedVolumes = append(h.spec.DeletedVolumes, v.Id)
	}
	h.spec.Volumes = nil
	h.apply()
	h.until("gone", func(cs cmap, ms mmap) bool { return len(cs)+len(ms) == 0 })
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		vols, _ := h.vols.List(ctx)
		leases, _ := h.imgs.Leases(ctx)
		list, _ := h.drv.List(ctx)
		if len(vols)+len(leases)+len(list) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("left: volumes %v, leases %v, machines %v", vols, leases, list)
		}
	}
}

func (h *realHost) exec(id string, args ...string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	st := h.c.Exec(ctx)
	if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Exec{Exec: &v1.ExecSpec{ContainerId: id, Args: args}}}); err != nil {
		h.t.Fatal(err)
	}
	st.CloseRequest()
	var out bytes.Buffer
	for {
		m, err := st.Receive()
		if err != nil {
			return out.String()
		}
		out.Write(m.GetStdout())
	}
}

func (h *realHost) logs(id string) string {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	st, err := h.c.Logs(ctx, connect.NewRequest(&v1.LogOptions{ContainerId: id, Tail: -1}))
	if err != nil {
		h.t.Fatal(err)
	}
	defer st.Close()
	var out bytes.Buffer
	for st.Receive() {
		out.Write(st.Msg().Line)
	}
	return out.String()
}
