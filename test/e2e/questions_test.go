package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

const busy = `
name: busy
services:
  worker:
    image: busybox:latest
    command: ["sh", "-c", "while :; do :; done"]
    init: true
    stop_grace_period: 1s
    restart: unless-stopped
    deploy: {resources: {reservations: {cpus: "0.1", memory: 16m}, limits: {cpus: "0.3"}}}
    x-tandem: {scale: {min: 1, max: 2, cpu: 50%, pressure: 90}}
`

// TestQuestionsAndScaling: questions about a real host are answered and change
// nothing, a stale plan is refused, and a service that is busy scales by what its
// guest measures, and says so. What a recommendation said and was applied lasts.
func TestQuestionsAndScaling(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	file := filepath.Join(h.Dir, "busy.yaml")
	write(t, file, busy)
	h.Tandem("-f", file, "up")

	var lose struct {
		Plan struct {
			Revision string
			Unplaced []struct{ Container, Remedy string }
		}
		Losses struct{ Covered bool }
	}
	var hosts []struct{ Meta struct{ Name string } }
	decode(t, h.Tandem("host", "ls", "--format", "json"), &hosts)
	name := hosts[0].Meta.Name
	decode(t, h.Tandem("rehearse", "lose", name, "--format", "json"), &lose)
	if len(lose.Plan.Unplaced) != 1 || lose.Plan.Unplaced[0].Container != "busy-worker-1" || lose.Plan.Unplaced[0].Remedy == "" || lose.Losses.Covered {
		t.Error("the loss of the only host:", lose)
	}
	if out := h.Tandem("what-if", "--add-host", "8c,32g*2", "--remove-host", name); !strings.Contains(out, "put busy-worker-1 into machine") || !strings.Contains(out, "on added-") {
		t.Error(out)
	}
	if out := h.Tandem("rebalance", "--plan"); !strings.Contains(out, "Nothing to change.") {
		t.Error(out)
	}
	stale := lose.Plan.Revision
	write(t, file, strings.Replace(busy, "16m", "17m", 1))
	h.Tandem("-f", file, "up")
	if out, err := h.Try("-f", file, "up", "--revision", stale); err == nil || !strings.Contains(fmt.Sprint(out, err), "the state has changed since revision "+stale+"; ask again") {
		t.Error("a stale plan was applied:", out, err)
	}

	h.Eventually(5*time.Minute, "the busy service scales", func() error {
		var list []host.Container
		decode(t, h.Tandem("-p", "busy", "ps", "--format", "json"), &list)
		if len(list) != 2 {
			return fmt.Errorf("%d containers; %s", len(list), h.Tandem("-p", "busy", "ps"))
		}
		return inMachine(list[1])
	})
	if out := h.Tandem("-p", "busy", "explain", "busy-worker-1"); !strings.Contains(out, "It went from 1 to 2 at") || !strings.Contains(out, "cpu ") || !strings.Contains(out, "pressure ") || strings.Contains(out, "not told") {
		t.Error(out)
	}
	if out := h.Tandem("events", "--no-follow", "--since", "10m"); !strings.Contains(out, "from=1") || !strings.Contains(out, "scale") {
		t.Error("no event of it:\n" + out)
	}
	h.Eventually(2*time.Minute, "use is remembered", func() error {
		var list []struct{ Samples string }
		decode(t, h.Tandem("recommend", "-p", "busy", "--format", "json"), &list)
		if len(list) != 1 || list[0].Samples == "0" {
			return fmt.Errorf("%v", list)
		}
		return nil
	})
	recommendationLasts(t, h, file)
}

// recommendationLasts: what is applied, the next up leaves as it is; what it was
// undone to as well. The server is made to believe that it has seen more than it has,
// which would take an hour.
func recommendationLasts(t *testing.T, h *host.Host, file string) {
	h.Stop()
	usage := filepath.Join(h.State(), "server/usage.json")
	text, err := os.ReadFile(usage)
	if err != nil {
		t.Fatal(err)
	}
	var seen map[string]any
	decode(t, string(text), &seen)
	for _, s := range seen["services"].(map[string]any) {
		s.(map[string]any)["samples"], s.(map[string]any)["begin"] = 1000, time.Now().Add(-48*time.Hour).UTC()
	}
	if text, err = json.Marshal(seen); err != nil {
		t.Fatal(err)
	}
	write(t, usage, string(text))
	h.Launch()
	if out := h.Tandem("-f", file, "recommend", "worker", "--apply"); !strings.Contains(out, "applied; the Compose file asks for 0.1 CPU, 17 MiB") {
		t.Error(out)
	}
	h.Tandem("-f", file, "up")
	for _, note := range []string{"(`tandem -p busy recommend --undo worker` goes back to that).\n", ""} {
		before, err := h.Containers()
		if err != nil {
			t.Fatal(err)
		}
		if out := h.Tandem("-f", file, "up", "--plan"); !strings.HasSuffix(out, note+"Nothing to change.\n") || note == "" && strings.Contains(out, "Note") {
			t.Errorf("up after the same file, %q: %s", note, out)
		}
		h.Tandem("-f", file, "up")
		after, err := h.Containers()
		if err != nil || len(after) != len(before) {
			t.Errorf("%d containers, there were %d: %v", len(after), len(before), err)
		}
		for n, c := range after {
			if before[n].Meta.ID != c.Meta.ID {
				t.Errorf("up has replaced %s", n)
			}
		}
		if note != "" {
			h.Tandem("-f", file, "recommend", "worker", "--undo")
			h.Tandem("-f", file, "up")
		}
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func decode(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}
