package guest_test

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestColdBootAnswersHello(t *testing.T) {
	v := bootTest(t)
	a := v.connect()
	h := a.hello(t)
	t.Logf("hello %v after the start; guest's clock: agent at %v, now %v",
		time.Since(v.began).Round(time.Millisecond), h.BootToAgent.AsDuration(), h.Uptime.AsDuration())
	in := v.inside()
	eventually(t, "late modules", func() bool { _, err := in.try("read /run/tandem/modules-loaded"); return err == nil })
	for _, l := range strings.Split(in.do("kmsg"), "\n") {
		if strings.Contains(l, "tandem-") || strings.Contains(l, "Run /init") {
			t.Log(l)
		}
	}
	if h.Protocol != 1 || h.Configured || h.MachineId != "" || len(h.GuestId) != 32 || h.Kernel == "" {
		t.Errorf("%v", h)
	}
}

func TestPowerButton(t *testing.T) {
	v := boot(t)
	v.connect().hello(t)
	deadline := time.Now().Add(patience)
	for {
		fmt.Fprintln(v.qmpConn, `{"execute": "system_powerdown"}`) // until the driver listens
		select {
		case <-v.exited:
			return
		case <-time.After(time.Second):
		}
		if time.Now().After(deadline) {
			t.Fatal("the machine goes on")
		}
	}
}
