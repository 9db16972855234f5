package guest_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/guestimage/guesttest"
)

// bootTest starts a machine that has the keyhole of testguest.
func bootTest(t *testing.T, extra ...string) *vm {
	t.Helper()
	return start(t, guesttest.ImageOf(t, "./internal/guest/testguest"), []string{"-m", "256M,slots=8,maxmem=4G"}, append(keyhole(t), extra...)...)
}

func keyhole(t *testing.T) []string {
	t.Helper()
	return []string{"-chardev", "socket,id=hole,path=KEYHOLE,server=on,wait=off", "-device", "virtserialport,chardev=hole,name=tandem.test.0"}
}

// inside runs commands of testguest.
type inside struct {
	t *testing.T
	c net.Conn
	r *bufio.Reader
}

func (v *vm) inside() *inside {
	c := v.dial("keyhole")
	return &inside{v.t, c, bufio.NewReader(c)}
}

func (i *inside) try(format string, args ...any) (string, error) {
	i.t.Helper()
	i.c.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(i.c, format+"\n", args...)
	line, err := i.r.ReadBytes('\n')
	if err != nil {
		i.t.Fatalf("testguest: %v", err)
	}
	var a struct{ Out, Err string }
	if err := json.Unmarshal(line, &a); err != nil {
		i.t.Fatalf("testguest: %q: %v", line, err)
	}
	if a.Err != "" {
		return a.Out, fmt.Errorf("%s", a.Err)
	}
	return strings.TrimSpace(a.Out), nil
}

func (i *inside) do(format string, args ...any) string {
	i.t.Helper()
	out, err := i.try(format, args...)
	if err != nil {
		i.t.Fatalf("%s: %v", fmt.Sprintf(format, args...), err)
	}
	return out
}

func entropy() []byte {
	b := make([]byte, 64)
	rand.Read(b)
	return b
}

func configuration(machine string) *v1.ConfigureRequest {
	return &v1.ConfigureRequest{MachineId: machine, Hostname: machine + "-host", Entropy: entropy(), Now: timestamppb.Now()}
}

// scratch makes an ext4 disk and the arguments that attach it.
func scratch(t *testing.T, v *vm, serial string, size int64) {
	t.Helper()
	path := v.file(serial + ".img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("mkfs.ext4", "-q", "-F", path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, b)
	}
	v.qmp("blockdev-add", map[string]any{"driver": "raw", "node-name": serial, "file": map[string]any{"driver": "file", "filename": path}})
	v.qmp("device_add", map[string]any{"driver": "scsi-hd", "id": serial, "drive": serial, "bus": "scsi0.0", "serial": serial})
}

func TestAgentLivesThroughItsOwnDeath(t *testing.T) {
	v := bootTest(t)
	a := v.connect()
	in := v.inside()
	before := a.hello(t)
	scratch(t, v, "scratch0", 64<<20)
	req := configuration("m-1")
	req.ScratchSerial = "scratch0"
	id := call(t, a.Configure, req).GuestId
	if id == "" || id == before.GuestId {
		t.Errorf("guest id %q, before %q", id, before.GuestId)
	}

	t.Run("configured", func(t *testing.T) {
		if got := in.do("read /proc/sys/kernel/hostname"); got != "m-1-host" {
			t.Errorf("host name %q", got)
		}
		if got := in.do("read /proc/mounts"); !strings.Contains(got, "/var/lib/tandem ext4 rw") {
			t.Errorf("scratch disk is not mounted:\n%s", got)
		}
		again := configuration("m-1")
		again.ScratchSerial = "scratch0"
		if got := call(t, a.Configure, again).GuestId; got != id {
			t.Errorf("the second time it is guest %q, not %q", got, id)
		}
		_, err := a.Configure(t.Context(), connect.NewRequest(configuration("m-2")))
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("another machine: %v", err)
		}
		for name, change := range map[string]func(*v1.ConfigureRequest){
			"id": func(r *v1.ConfigureRequest) { r.MachineId = "../x" }, "entropy": func(r *v1.ConfigureRequest) { r.Entropy = r.Entropy[:63] },
			"time": func(r *v1.ConfigureRequest) { r.Now = nil }, "serial": func(r *v1.ConfigureRequest) { r.ScratchSerial = "../../dev/sda" },
			"host name": func(r *v1.ConfigureRequest) { r.Hostname = "a b" },
		} {
			r := configuration("m-1")
			change(r)
			if _, err := a.Configure(t.Context(), connect.NewRequest(r)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("bad %s: %v", name, err)
			}
		}
		if _, err := a.Quiesce(t.Context(), connect.NewRequest(&v1.QuiesceRequest{})); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("quiesce: %v", err)
		}
	})

	t.Run("full scratch disk", func(t *testing.T) {
		if in.do("fill /var/lib/tandem") == "0" {
			t.Error("nothing was written")
		}
		r := configuration("m-1")
		r.ScratchSerial = "scratch0"
		call(t, a.Configure, r)
		call(t, a.Resources, &v1.GuestResourcesRequest{})
	})

	t.Run("killed", func(t *testing.T) {
		for range 3 {
			began := time.Now()
			pid := in.do("agent")
			in.do("kill 9 %s", pid)
			ended := make(chan struct{})
			go func() { // the HTTP/2 client reads the session: it ends with it
				for a.rpc.Alive() {
					time.Sleep(time.Millisecond)
				}
				close(ended)
			}()
			select {
			case <-ended:
			case <-time.After(patience):
				t.Fatal("nobody noticed")
			}
			noticed := time.Since(began)
			a = v.connect()
			h := a.hello(t)
			t.Logf("noticed after %v, answers after %v", noticed.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
			if h.GuestId != id || h.MachineId != "m-1" || !h.Configured {
				t.Errorf("after the restart it is %v", h)
			}
			if now := in.do("agent"); now == pid {
				t.Errorf("the agent is still %s", pid)
			}
		}
	})

	t.Run("rubbish", func(t *testing.T) {
		a.conn.Close() // QEMU takes one client at a time
		raw := v.dial("agent")
		junk := make([]byte, 1<<20)
		rand.Read(junk)
		raw.SetDeadline(time.Now().Add(patience))
		raw.Write(junk)
		raw.Close()
		a = v.connect()
		if h := a.hello(t); h.GuestId != id {
			t.Errorf("%v", h)
		}
	})

	t.Run("host comes and goes", func(t *testing.T) {
		for range 5 {
			began := time.Now()
			a.conn.Close()
			a = v.connect()
			a.hello(t)
			t.Logf("answers after %v", time.Since(began).Round(time.Millisecond))
		}
	})

	t.Run("busy guest", func(t *testing.T) {
		in.do("busy 8")
		began := time.Now()
		call(t, a.Ping, &v1.PingRequest{Nonce: 7})
		t.Logf("ping beside eight loops: %v", time.Since(began).Round(time.Millisecond))
	})

	t.Run("shutdown", func(t *testing.T) {
		call(t, a.Shutdown, &v1.ShutdownRequest{})
		select {
		case <-v.exited:
		case <-time.After(patience):
			t.Error("the machine is still there")
		}
		if b, err := exec.Command("e2fsck", "-fn", v.file("scratch0.img")).CombinedOutput(); err != nil {
			t.Errorf("scratch disk: %v\n%s", err, b)
		}
	})
}

func TestHotplug(t *testing.T) {
	v := bootTest(t)
	a := v.connect()
	resources := func() *v1.GuestResourcesResponse { return call(t, a.Resources, &v1.GuestResourcesRequest{}) }
	in := v.inside()
	eventually(t, "drivers", func() bool { _, err := in.try("read /run/tandem/modules-loaded"); return err == nil })
	before := resources()
	t.Logf("fresh guest: %d MiB of %d used, overhead %d MiB", before.Usage.MemoryBytes>>20, before.MemoryTotalBytes>>20, before.OverheadBytes>>20)
	if before.CpusOnline != 1 || before.MemoryTotalBytes < 150<<20 {
		t.Errorf("%v", before)
	}
	v.qmp("device_add", map[string]any{"driver": "qemu64-x86_64-cpu", "id": "cpu1", "socket-id": 0, "core-id": 1, "thread-id": 0})
	eventually(t, "second CPU", func() bool { return resources().CpusOnline == 2 })
	if n := call(t, a.OfflineCPUs, &v1.OfflineCPUsRequest{Keep: 1}).Online; n != 1 {
		t.Errorf("%d CPUs online", n)
	}
	v.qmp("qom-set", map[string]any{"path": "/machine/peripheral/vm0", "property": "requested-size", "value": 512 << 20})
	eventually(t, "memory", func() bool { return resources().MemoryTotalBytes > before.MemoryTotalBytes+500<<20 })
	v.qmp("qom-set", map[string]any{"path": "/machine/peripheral/vm0", "property": "requested-size", "value": 0})
	eventually(t, "memory gone again", func() bool { return resources().MemoryTotalBytes < before.MemoryTotalBytes+10<<20 })

	const mac = "02:00:00:00:00:07"
	done := make(chan error, 1)
	go func() { // asked for before it is there
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, err := a.ConfigureNetwork(ctx, connect.NewRequest(&v1.ConfigureNetworkRequest{
			Nics: []*v1.GuestNIC{{Mac: mac, Addresses: []string{"10.0.2.15/32"}, Gateway: "169.254.1.1", Mtu: 1450, ContainerPrefixes: []string{"10.9.0.0/28"}}},
		}))
		done <- err
	}()
	v.qmp("netdev_add", map[string]any{"type": "hubport", "id": "n0", "hubid": 0})
	v.qmp("device_add", map[string]any{"driver": "virtio-net-pci", "id": "nic0", "netdev": "n0", "mac": mac, "bus": "rp0", "romfile": ""})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	routes := in.do("read /proc/net/route")
	if !strings.Contains(routes, "eth0\t00000000\t0101FEA9") || !strings.Contains(routes, "eth0\t0101FEA9\t00000000") {
		t.Errorf("routes:\n%s", routes)
	}
	for path, want := range map[string]string{
		"/sys/class/net/eth0/mtu": "1450", "/proc/sys/net/ipv4/ip_forward": "1", "/proc/sys/net/ipv4/conf/eth0/proxy_arp": "1",
	} {
		if got := in.do("read %s", path); got != want {
			t.Errorf("%s is %q", path, got)
		}
	}
	if _, err := a.ConfigureNetwork(t.Context(), connect.NewRequest(&v1.ConfigureNetworkRequest{Nics: []*v1.GuestNIC{{Mac: "x"}}})); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad MAC: %v", err)
	}
}
