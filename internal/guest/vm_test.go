package guest_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "tandem/api/tandem/v1"
	"tandem/api/tandem/v1/tandemv1connect"
	"tandem/internal/guestimage"
	"tandem/internal/guestimage/guesttest"
	"tandem/internal/rpc"
	"tandem/internal/session"
)

// patience is for emulation on a machine that does other things, too.
const patience = 90 * time.Second

// vm is a machine that a test started with QEMU itself.
type vm struct {
	t       *testing.T
	dir     string
	began   time.Time
	cmd     *exec.Cmd
	exited  chan struct{}
	qmpConn net.Conn
	qmpIn   *bufio.Scanner
	mu      sync.Mutex
}

// boot starts a machine with the guest of the working tree.
func boot(t *testing.T, extra ...string) *vm {
	t.Helper()
	return start(t, guesttest.Image(t), []string{"-m", "256M,slots=8,maxmem=4G"}, extra...)
}

func start(t *testing.T, m guestimage.Manifest, memory []string, extra ...string) *vm {
	t.Helper()
	dir, err := os.MkdirTemp("", "tandem-guest-") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{t: t, dir: dir, exited: make(chan struct{})}
	args := append([]string{
		"-accel", "tcg,thread=multi,tb-size=256", "-bios", "qboot.rom",
		"-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand,+aes,+pclmulqdq,-svm", // as the driver's: rdrand seeds the kernel at once
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-smp", "1,maxcpus=4,sockets=1,cores=4,threads=1",
		"-kernel", m.Kernel, "-initrd", m.Initrd,
		"-append", "swiotlb=noforce console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests no_timer_check random.trust_cpu=on 8250.nr_uarts=1 audit=0",
		"-serial", "file:" + v.file("console"),
		"-chardev", "socket,id=qmp,path=" + v.file("qmp") + ",server=on,wait=off", "-mon", "chardev=qmp,mode=control",
		"-object", "iothread,id=io0", "-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x5,iothread=io0",
		"-device", "virtio-serial-pci,id=vser0,bus=pcie.0,addr=0x7",
		"-chardev", "socket,id=agent,path=" + v.file("agent") + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=" + session.PortName,
		"-object", "memory-backend-ram,id=vmem0,size=1G,reserve=off",
		"-device", "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=0,bus=pcie.0,addr=0x8",
		"-device", "pcie-root-port,id=rp0,chassis=1,slot=1,bus=pcie.0,addr=0x10",
	}, memory...)
	machine := "q35,sata=off,smbus=off,i8042=off,hpet=off"
	for i, a := range extra {
		if a == "-machine-extra" {
			machine += "," + extra[i+1]
			extra = append(extra[:i:i], extra[i+2:]...)
			break
		}
	}
	args = append(args, "-machine", machine) // its options are known now
	for i := range extra {
		extra[i] = strings.Replace(extra[i], "KEYHOLE", v.file("keyhole"), 1)
	}
	v.cmd = exec.Command("qemu-system-x86_64", append(args, extra...)...)
	var out bytes.Buffer
	v.cmd.Stdout, v.cmd.Stderr = &out, &out
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	v.began = time.Now()
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		v.cmd.Wait()
		close(v.exited)
	}()
	t.Cleanup(func() {
		v.cmd.Process.Kill()
		<-v.exited
		if t.Failed() {
			b, _ := os.ReadFile(v.file("console"))
			t.Logf("qemu: %s\nconsole: %s", out.String(), b[max(0, len(b)-4000):])
		}
		os.RemoveAll(dir)
	})
	v.qmpConn = v.dial("qmp")
	v.qmpIn = bufio.NewScanner(v.qmpConn)
	v.qmpIn.Buffer(nil, 1<<20)
	v.qmp("qmp_capabilities", nil)
	return v
}

func (v *vm) file(name string) string { return filepath.Join(v.dir, name) }

// dial connects to one of QEMU's sockets, which is there soon.
func (v *vm) dial(name string) net.Conn {
	v.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		c, err := net.Dial("unix", v.file(name))
		if err == nil {
			v.t.Cleanup(func() { c.Close() })
			return c
		}
		select {
		case <-v.exited:
			v.t.Fatal("QEMU has ended")
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			v.t.Fatal(err)
		}
	}
}

// qmp runs a command and returns what it answers.
func (v *vm) qmp(cmd string, args map[string]any) json.RawMessage {
	v.t.Helper()
	v.mu.Lock()
	defer v.mu.Unlock()
	req := map[string]any{"execute": cmd}
	if args != nil {
		req["arguments"] = args
	}
	v.qmpConn.SetDeadline(time.Now().Add(patience))
	if err := json.NewEncoder(v.qmpConn).Encode(req); err != nil {
		v.t.Fatalf("%s: %v", cmd, err)
	}
	for v.qmpIn.Scan() {
		var r struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if json.Unmarshal(v.qmpIn.Bytes(), &r) != nil || r.Return == nil && r.Error == nil {
			continue // greeting, events
		}
		if r.Error != nil {
			v.t.Fatalf("%s: %s", cmd, r.Error.Desc)
		}
		return r.Return
	}
	v.t.Fatalf("%s: %v", cmd, v.qmpIn.Err())
	return nil
}

// agent is a session with the guest's agent.
type agent struct {
	tandemv1connect.GuestServiceClient
	rpc  *rpc.Conn
	conn net.Conn
	http *http.Client
}

// connect begins a session.
func (v *vm) connect() *agent {
	v.t.Helper()
	ctx, cancel := context.WithTimeout(v.t.Context(), patience)
	defer cancel()
	a, err := v.tryConnect(ctx)
	if err != nil {
		v.t.Fatal(err)
	}
	return a
}

func (v *vm) tryConnect(ctx context.Context) (*agent, error) {
	conn, err := session.Connect(ctx, v.dial("agent"))
	if err != nil {
		return nil, err
	}
	cc, err := rpc.ConnClient(conn, 30*time.Second, 30*time.Second)
	if err != nil {
		return nil, err
	}
	v.t.Cleanup(func() { cc.Close() })
	return &agent{tandemv1connect.NewGuestServiceClient(cc.Client, rpc.BaseURL, rpc.GuestClientOptions()...), cc, conn, cc.Client}, nil
}

func (a *agent) hello(t *testing.T) *v1.GuestHelloResponse {
	t.Helper()
	return call(t, a.Hello, &v1.GuestHelloRequest{Protocol: 1, Version: "test"})
}

// call calls and expects success.
func call[Req, Res any](t *testing.T, f func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), r *Req) *Res {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	res, err := f(ctx, connect.NewRequest(r))
	if err != nil {
		t.Fatalf("%T: %v", r, err)
	}
	return res.Msg
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
