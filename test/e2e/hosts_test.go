package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// machine is in the command line of a machine that is no template: "guest=TAG.m-1a2b".
const machine = ".m-"

// TestTwoHosts: a server with its agent on one host, an agent apart on another. Room is
// kept for the loss of either; the death of the far agent stops nothing; when its host
// is gone for good, what ran there starts where the room was kept.
func TestTwoHosts(t *testing.T) {
	alpha, beta := host.New(t), host.New(t)
	alpha.Launch("--name", "alpha", "--restart-delay", "4s", "--idle-stop", "1s", "--cpus", "4")
	beta.Join(alpha, "beta", "--cpus", "4")
	alpha.Images()
	alpha.Tandem("policy", "--host-losses", "1")
	file := alpha.Compose("pair", `
name: pair
services:
  web:
    image: busybox:latest
    command: [sleep, "100000"]
    stop_grace_period: 1s
    restart: always
    x-tandem: {spread: host}
    deploy: {replicas: 2, resources: {reservations: {cpus: "0.9", memory: 64M}}}
`)
	alpha.Tandem("up", "-f", file)
	where := func() map[string]string { // container -> host
		out := map[string]string{}
		all, err := alpha.Containers()
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]string{}
		var hosts []struct{ Meta struct{ ID, Name string } }
		decode(t, alpha.Tandem("host", "ls", "--format", "json"), &hosts)
		for _, x := range hosts {
			names[x.Meta.ID] = x.Meta.Name
		}
		for name, c := range all {
			out[name] = names[c.Assignment.HostID]
		}
		return out
	}
	at := where()
	if len(at) != 2 || at["pair-web-1"] == at["pair-web-2"] {
		t.Fatalf("not one on each host: %v", at)
	}
	far := "pair-web-1"
	if at[far] != "beta" {
		far = "pair-web-2"
	}
	if out := alpha.Tandem("explain", far); !strings.Contains(out, "it starts again on alpha: the room is kept") {
		t.Errorf("explain:\n%s", out)
	}
	if out := alpha.Tandem("policy"); !strings.Contains(out, "any one host: 2 containers have a place then") {
		t.Errorf("policy:\n%s", out)
	}
	if out := alpha.Tandem("exec", far, "echo", "from afar"); out != "from afar\n" {
		t.Errorf("exec on beta: %q", out)
	}

	// More than either host could take from the other gets no place.
	go alpha.TryFor(time.Minute, "", "scale", "-p", "pair", "web=6")
	alpha.Eventually(time.Minute, "what would break the guarantee waits", func() error {
		all, err := alpha.Containers()
		if err != nil || len(all) != 6 {
			return fmt.Errorf("%d containers: %v", len(all), err)
		}
		placed := 0
		for _, c := range all {
			if c.Assignment.HostID != "" {
				placed++
			} else if !strings.Contains(c.Status.Message, "no place") {
				return fmt.Errorf("%+v", c.Status)
			}
		}
		if placed < 3 || placed > 4 { // on 4 CPUs, which one host has
			return fmt.Errorf("%d have a place", placed)
		}
		return nil
	})
	if out := alpha.Tandem("policy"); strings.Contains(out, "should have one") {
		t.Errorf("something was placed that is not covered:\n%s", out)
	}
	alpha.Tandem("scale", "-p", "pair", "web=2")

	// The far agent's death stops nothing; it finds all again.
	qemu := beta.Find("qemu-system", machine)
	if len(qemu) == 0 {
		t.Error("no machine is found on beta")
	}
	started := alpha.Container(far).Status.StartedAt
	beta.Kill9()
	alpha.Eventually(time.Minute, "the server misses the agent", func() error {
		if up, err := alpha.Connected("beta"); up || err != nil {
			return fmt.Errorf("connected: %v %v", up, err)
		}
		return nil
	})
	beta.Join(alpha, "beta", "--cpus", "4")
	alpha.Eventually(time.Minute, "it runs as before", func() error {
		if c := alpha.Container(far); c.Status.State != "CONTAINER_STATE_RUNNING" || c.Status.StartedAt != started {
			return fmt.Errorf("%+v, started %s before", c.Status, started)
		}
		return nil
	})
	for _, p := range qemu {
		if !slices.Contains(beta.Find("qemu-system", machine), p) {
			t.Errorf("machine with process %d is gone; there are %v", p, beta.Find("qemu-system", machine))
		}
	}

	// The host is gone for good.
	begin := time.Now()
	beta.Crash()
	alpha.Eventually(3*time.Minute, "it runs on alpha", func() error {
		if c := alpha.Container(far); where()[far] != "alpha" || c.Status.State != "CONTAINER_STATE_RUNNING" {
			return fmt.Errorf("on %s: %+v", where()[far], c.Status)
		}
		return nil
	})
	t.Logf("%s ran again on the other host after %s, 4 s of it and 3 s more to be sure", far, time.Since(begin).Round(10*time.Millisecond))
	if out := alpha.Tandem("policy"); !strings.Contains(out, "2 should have one and have none") {
		t.Errorf("with one host left nothing is covered, and policy says:\n%s", out)
	}

	// It is repaired and starts again: what it ran is no longer its own, and there is room
	// for a loss again.
	beta.Boot()
	beta.Join(alpha, "beta", "--cpus", "4")
	alpha.Eventually(time.Minute, "all is covered again, and beta runs no machine", func() error {
		out := alpha.Tandem("policy")
		if left := beta.Find("qemu-system", machine); !strings.Contains(out, "2 containers have a place then") || strings.Contains(out, "should") || len(left) > 0 {
			return fmt.Errorf("processes %v, policy: %s", left, out)
		}
		return nil
	})
	if at := where(); at["pair-web-1"] != "alpha" || at["pair-web-2"] != "alpha" {
		t.Errorf("on %v", at)
	}
	alpha.Tandem("down", "-p", "pair")
}
