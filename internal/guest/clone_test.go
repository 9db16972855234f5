package guest_test

import (
	"encoding/json"
	"sort"
	"strconv"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/guestimage/guesttest"
)

// A clone must be somebody: other random numbers, its own id and name, the time
// of now; and soon.
func TestClonesOfATemplate(t *testing.T) {
	image := guesttest.ImageOf(t, "./internal/guest/testguest")
	memory := func(path, share string) []string {
		return []string{"-m", "256M,slots=8,maxmem=4G", "-machine-extra", "memory-backend=ram0",
			"-object", "memory-backend-file,id=ram0,size=256M,share=" + share + ",mem-path=" + path}
	}
	dir := t.TempDir()
	ram, state := dir+"/ram", dir+"/state"

	tpl := start(t, image, nil, append(keyhole(t), memory(ram, "on")...)...)
	a := tpl.connect()
	first := a.hello(t)
	call(t, a.Quiesce, &v1.QuiesceRequest{})
	if h := a.hello(t); h.GuestId != "" || h.Configured {
		t.Errorf("a guest that sleeps is still %v", h)
	}
	if _, err := a.Ping(t.Context(), connect.NewRequest(&v1.PingRequest{})); err != nil {
		t.Error(err)
	}
	a.rpc.Close()
	tpl.qmp("stop", nil)
	ignoreShared := map[string]any{"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}}}
	tpl.qmp("migrate-set-capabilities", ignoreShared)
	tpl.qmp("migrate", map[string]any{"uri": "exec:cat > " + state})
	eventually(t, "template saved", func() bool {
		var r struct{ Status string }
		json.Unmarshal(tpl.qmp("query-migrate", nil), &r)
		return r.Status == "completed"
	})
	tpl.cmd.Process.Kill()
	<-tpl.exited

	seen := map[string]string{}
	unique := func(what, value string) {
		t.Helper()
		if other, ok := seen[value]; ok || value == "" {
			t.Errorf("%s %q is also %s", what, value, other)
		}
		seen[value] = what
	}
	unique("the template's id", first.GuestId)
	var times []time.Duration
	for i := range 4 {
		name := "m-" + strconv.Itoa(i)
		v := start(t, image, nil, append(append(keyhole(t), memory(ram, "off")...), "-incoming", "defer")...)
		v.qmp("migrate-set-capabilities", ignoreShared)
		v.qmp("migrate-incoming", map[string]any{"uri": "exec:cat " + state})
		eventually(t, "state loaded", func() bool {
			var r struct{ Status string }
			json.Unmarshal(v.qmp("query-status", nil), &r)
			return r.Status == "paused" || r.Status == "running"
		})
		v.qmp("cont", nil)
		c := v.connect()
		connected := time.Since(v.began)
		if h := c.hello(t); h.Configured || h.GuestId != "" {
			t.Errorf("clone %d begins as %v", i, h)
		}
		id := call(t, c.Configure, configuration(name)).GuestId
		took := time.Since(v.began)
		times = append(times, took)
		t.Logf("clone %d: session after %v, configured after %v", i, connected.Round(time.Millisecond), took.Round(time.Millisecond))
		in := v.inside()
		unique(name+"'s id", id)
		unique(name+"'s random number in PID 1", in.do("random"))
		unique(name+"'s kernel uuid", in.do("read /proc/sys/kernel/random/uuid"))
		unique(name+"'s machine-id", in.do("read /etc/machine-id"))
		if got := in.do("read /proc/sys/kernel/hostname"); got != name+"-host" {
			t.Errorf("host name %q", got)
		}
		now, _ := strconv.ParseInt(in.do("time"), 10, 64)
		if d := time.Since(time.Unix(now, 0)); d < -5*time.Second || d > 5*time.Second {
			t.Errorf("the clock of clone %d is %v off", i, d)
		}
		if h := c.hello(t); h.GuestId != id || h.MachineId != name {
			t.Errorf("clone %d is %v", i, h)
		}
		if _, err := c.Configure(t.Context(), connect.NewRequest(configuration("m-other"))); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a configured clone takes another name: %v", err)
		}
		v.cmd.Process.Kill()
		<-v.exited
	}
	sort.Slice(times, func(i, j int) bool { return times[i] < times[j] })
	t.Logf("median to configured: %v", times[len(times)/2].Round(time.Millisecond))
}
