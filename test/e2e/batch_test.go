package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// TestBatchGivesWay: batch work ends for latency work that fits nowhere else, which
// starts when it has ended; and it starts again when there is room, also when the
// server was killed in between.
func TestBatchGivesWay(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	var hosts []struct {
		Facts struct {
			Capacity struct {
				CPU int64 `json:"cpu_milli,string"`
			}
		}
	}
	decode(t, h.Tandem("host", "ls", "--format", "json"), &hosts)
	most := fmt.Sprintf("%.2f", 0.6*float64(hosts[0].Facts.Capacity.CPU)/1000)
	for _, isolation := range []string{"metal", "project"} {
		t.Run(isolation, func(t *testing.T) { givesWay(t, h.In(t), isolation, most) })
	}
}

func givesWay(t *testing.T, h *host.Host, isolation, most string) {
	run := func(name string, flags ...string) []string {
		all := append([]string{"run", "-d", "--name", name, "--isolation", isolation, "--cpus", most, "--stop-timeout", "1"}, flags...)
		return append(all, "busybox", "sleep", "100000")
	}
	h.Tandem(run("night", "--class", "batch")...)
	first := h.Container("night").Status.StartedAt

	// More batch work drives nobody away.
	go h.TryFor(time.Minute, "", run("more", "--class", "batch")...) // waits until it is removed
	h.Eventually(time.Minute, "more waits", func() error {
		all, err := h.Containers()
		if c := all["more"]; err != nil || !strings.Contains(c.Status.Message, "no place") {
			return fmt.Errorf("%+v %v", c.Status, err)
		}
		return nil
	})
	h.Tandem("rm", "-f", "more")
	if c := h.Container("night"); c.Status.StartedAt != first {
		t.Fatalf("night was started again: %+v", c.Status)
	}

	// Latency work does.
	h.Tandem(run("day")...)
	night, day := h.Container("night"), h.Container("day")
	if day.Status.State != "CONTAINER_STATE_RUNNING" || night.Status.State != "CONTAINER_STATE_PENDING" || !strings.Contains(night.Status.Message, "no place") {
		t.Fatalf("day %+v, night %+v", day.Status, night.Status)
	}
	h.Kill9()
	h.Launch()
	h.Tandem("rm", "-f", "day")
	h.Eventually(time.Minute, "night runs again", func() error {
		if c := h.Container("night"); c.Status.State != "CONTAINER_STATE_RUNNING" || c.Status.StartedAt == first {
			return fmt.Errorf("%+v", c.Status)
		}
		return nil
	})
	h.Tandem("rm", "-f", "night")
}
