package guest_test

import (
	"testing"
	"time"
)

func TestColdBootAnswersHello(t *testing.T) {
	v := boot(t)
	a := v.connect()
	h := a.hello(t)
	t.Logf("hello %v after the start; guest's clock: agent at %v, now %v",
		time.Since(v.began).Round(time.Millisecond), h.BootToAgent.AsDuration(), h.Uptime.AsDuration())
	if h.Protocol != 1 || h.Configured || h.MachineId != "" || len(h.GuestId) != 32 || h.Kernel == "" {
		t.Errorf("%v", h)
	}
}
