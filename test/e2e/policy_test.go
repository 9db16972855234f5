package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// TestPolicy: a pool's limit and a project's quota hold for what really runs, outlive
// the server, and say why something waits; a guarantee for more hosts than there are is
// refused.
func TestPolicy(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	if _, err := h.Try("policy", "--host-losses", "1"); err == nil || !strings.Contains(err.Error(), "takes at least 2 hosts, and the cluster has 1") {
		t.Errorf("one host survives its own loss: %v", err)
	}
	if _, err := h.Try("pool", "set", "/teams", "--reserve", "900c,1g"); err == nil || !strings.Contains(err.Error(), "the hosts have") {
		t.Errorf("more is reserved than there is: %v", err)
	}
	h.Tandem("pool", "set", "/teams", "--limit", "0.3c")
	h.Tandem("quota", "set", "default", "--containers", "2")
	run := func(name string) []string {
		return []string{"run", "-d", "--name", name, "--isolation", "metal", "--cpus", "0.2", "--pool", "/teams/shop", "busybox", "sleep", "100000"}
	}
	waits := func(name, why string) {
		t.Helper()
		h.Eventually(time.Minute, name+" waits", func() error {
			all, err := h.Containers()
			if c := all[name]; err != nil || !strings.Contains(c.Status.Message, why) {
				return fmt.Errorf("%+v %v", c.Status, err)
			}
			return nil
		})
	}
	runs := func(name string) {
		t.Helper()
		h.Eventually(time.Minute, name+" runs", func() error {
			all, err := h.Containers()
			if c := all[name]; err != nil || c.Status.State != "CONTAINER_STATE_RUNNING" {
				return fmt.Errorf("%+v %v", c.Status, err)
			}
			return nil
		})
	}
	h.Tandem(run("one")...)
	go h.TryFor(2*time.Minute, "", run("two")...) // waits until there is a place
	waits("two", "pool /teams is limited to 0.3 CPU: 0.1 CPU too little")
	h.Kill9()
	h.Launch()
	waits("two", "pool /teams is limited")
	var pools []struct {
		Pool struct {
			Path  string
			Limit struct {
				CPU int64 `json:"cpu_milli,string"`
			}
		}
		Containers int
	}
	decode(t, h.Tandem("pool", "ls", "--format", "json"), &pools)
	if len(pools) != 2 || pools[0].Pool.Path != "/teams" || pools[0].Pool.Limit.CPU != 300 || pools[1].Containers != 1 {
		t.Errorf("%+v", pools)
	}
	h.Tandem("pool", "rm", "/teams")
	runs("two")
	go h.TryFor(2*time.Minute, "", run("three")...)
	waits("three", "project default may have 2 containers, and has them")
	h.Tandem("quota", "rm", "default")
	runs("three")
	h.Tandem("rm", "-f", "one", "two", "three")
}
