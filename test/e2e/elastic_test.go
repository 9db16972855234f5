package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

type vm struct {
	Meta struct{ ID, Name string }
	Size struct {
		Memory string `json:"memory_bytes"`
	}
	Status struct {
		State string
		Size  struct {
			Memory string `json:"memory_bytes"`
		}
	}
}

// vms lists the machines.
func vms(t *testing.T, h *host.Host) []vm {
	t.Helper()
	var list []vm
	if err := json.Unmarshal([]byte(h.Tandem("machine", "ls", "--format", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

const twins = `
name: twins
services:
  web:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "80", "-h", "/data"]
    ports: ["8080:80"]
    restart: unless-stopped
    stop_grace_period: 1s
    healthcheck:
      test: ["CMD", "wget", "-q", "-O", "-", "http://127.0.0.1:80/index.html"]
      interval: 10s
      start_interval: 1s
      start_period: 60s
      timeout: 20s
    deploy: {replicas: 2}
    x-tandem: {spread: machine}
`

// client asks for a page again and again, each time by a connection of its own.
type client struct {
	asked  int
	failed []string
	worst  time.Duration
	stop   context.CancelFunc
	done   chan struct{}
}

func ask(h *host.Host, url, want string) *client {
	ctx, stop := context.WithCancel(context.Background())
	c := &client{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		for ctx.Err() == nil {
			start := time.Now()
			out, err := h.Inside(context.Background(), "curl", "-sS", "-m", "20", url).CombinedOutput()
			took := time.Since(start)
			c.asked++
			c.worst = max(c.worst, took)
			if err != nil || string(out) != want {
				c.failed = append(c.failed, fmt.Sprintf("%s: %v %q", start.Format(time.TimeOnly), err, out))
			}
		}
	}()
	return c
}

// TestFold: two half-empty machines become one while a client asks all along, and the
// host gets back what the other one had; once more with a server that is killed as soon
// as the move has begun.
func TestFold(t *testing.T) {
	t.Run("undisturbed", func(t *testing.T) { fold(t, false) })
	t.Run("the server is killed", func(t *testing.T) { fold(t, true) })
}

func fold(t *testing.T, kill bool) {
	h := host.New(t)
	flags := []string{"--fold-delay", "5s", "--idle-stop", "3s"}
	h.Launch(flags...)
	h.Images()
	h.ImportTree("busybox:latest", func(root string) {
		host.BusyboxTree(t, root)
		host.Write(t, root, "data/index.html", "here\n")
	}, `CMD ["sh"]`, "ENV PATH=/bin")
	h.Tandem("up", "-f", h.Compose("twins", twins))
	before := vms(t, h)
	if len(before) != 2 {
		t.Fatalf("two replicas that want machines of their own have %+v", before)
	}
	const url = "http://127.0.0.1:8080/index.html"
	h.Eventually(2*time.Minute, "the page", func() error {
		_, err := h.Curl(url)
		return err
	})
	was := map[string]int64{}
	for _, m := range before {
		if was[m.Meta.ID] = h.PSS("qemu-system", m.Meta.ID); was[m.Meta.ID] == 0 {
			t.Fatalf("no VMM of %s found", m.Meta.Name)
		}
	}
	total := was[before[0].Meta.ID] + was[before[1].Meta.ID]

	c := ask(h, url, "here\n")
	h.Tandem("up", "-f", h.Compose("twins", strings.Replace(twins, "x-tandem: {spread: machine}", "", 1)))
	if kill {
		h.Eventually(2*time.Minute, "a container moves", func() error {
			all, err := h.Containers()
			for name := range all {
				if strings.HasSuffix(name, ".next") {
					return nil
				}
			}
			return fmt.Errorf("there are %v, %v", all, err)
		})
		h.Kill9()
		h.Launch(flags...)
	}
	h.Eventually(5*time.Minute, "one machine", func() error {
		if now := vms(t, h); len(now) != 1 {
			return fmt.Errorf("%d machines", len(now))
		}
		return nil
	})
	c.stop()
	<-c.done
	t.Logf("%d requests, the slowest took %s", c.asked, c.worst)
	if len(c.failed) > 0 {
		t.Errorf("%d of %d requests failed: %s", len(c.failed), c.asked, c.failed)
	}
	left := vms(t, h)[0]
	var gone string
	for _, m := range before {
		if m.Meta.ID != left.Meta.ID {
			gone = m.Meta.ID
		}
	}
	h.Eventually(time.Minute, "the emptied machine's VMM is gone", func() error {
		if p := h.Find("qemu-system", gone); len(p) > 0 {
			return fmt.Errorf("processes %v", p)
		}
		return nil
	})
	now := h.PSS("qemu-system", left.Meta.ID)
	t.Logf("VMMs: %d MB and %d MB before, %d MB now", was[left.Meta.ID]/1e6, was[gone]/1e6, now/1e6)
	// A second container costs the other machine some memory, and pages that both VMMs shared
	// are its own now: half of what was emptied is less than it gives back.
	if total-now < was[gone]/2 {
		t.Errorf("the host has %d MB back, of a machine that had %d MB", (total-now)/1e6, was[gone]/1e6)
	}
	for _, name := range []string{"twins-web-1", "twins-web-2"} {
		if err := inMachine(h.Container(name)); err != nil {
			t.Error(err)
		}
	}
	h.Tandem("down", "-p", "twins")
}

// TestMemoryComesBack: a container that used most of a grown machine's memory ends, and
// the host has it back.
func TestMemoryComesBack(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	b := h.MemoryBack(t, "back", time.Minute) // a bound for a loaded machine; bench measures
	t.Logf("the machine gave up %d MiB, of which %d %% were back on the host after %s", b.GivenUp>>20, 100*b.Returned/b.GivenUp, b.After.Round(100*time.Millisecond))
}
