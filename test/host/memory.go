package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// PSS is the proportional set size, in bytes, of all processes of this host that have
// these words in their command line: what they really cost it.
func (h *Host) PSS(words ...string) int64 {
	var sum int64
	for _, pid := range h.Find(words...) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue // ended meanwhile
		}
		for _, l := range strings.Split(string(text), "\n") {
			if f := strings.Fields(l); len(f) > 1 && f[0] == "Pss:" {
				n, _ := strconv.ParseInt(f[1], 10, 64)
				sum += n << 10
			}
		}
	}
	return sum
}

// Back is what came of a container's end.
type Back struct {
	GivenUp  int64         // bytes by which its machine was smaller afterwards
	Returned int64         // of them, what the VMM had less on the host by then
	After    time.Duration // from when the end was asked for
}

// MemoryBack runs two containers in a project of their own, of which one fills 460 MiB
// of memory, removes that one, and waits until at least four fifths of what their
// machine gives up for that are back on the host.
func (h *Host) MemoryBack(t testing.TB, project string, limit time.Duration) Back {
	t.Helper()
	hog := project + "-hog"
	h.Tandem("run", "-d", "--project-name", project, "--name", project+"-keep", "busybox", "sleep", "100000")
	h.Tandem("run", "-d", "--project-name", project, "--name", hog, "-m", "512m", "--shm-size", "500m", "busybox", "sh", "-c",
		"trap 'exit 0' TERM; dd if=/dev/zero of=/dev/shm/x bs=1M count=460 && echo full; sleep 100000 & wait") // it ends when asked to
	h.Eventually(3*time.Minute, "the container has filled its memory", func() error {
		if out, err := h.Try("logs", "--project-name", project, hog); err != nil || !strings.Contains(out, "full") {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
	id := h.Container(hog).Assignment.MachineID
	size := func() (want, have int64, err error) {
		var list []struct {
			Meta struct{ ID string }
			Size struct {
				MemoryBytes int64 `json:"memory_bytes,string"`
			}
			Status struct {
				Size struct {
					MemoryBytes int64 `json:"memory_bytes,string"`
				}
			}
		}
		out, err := h.Try("machine", "ls", "--format", "json")
		if err == nil {
			err = json.Unmarshal([]byte(out), &list)
		}
		for _, m := range list {
			if m.Meta.ID == id {
				return m.Size.MemoryBytes, m.Status.Size.MemoryBytes, err
			}
		}
		return 0, 0, errors.Join(err, errors.New("the machine is gone"))
	}
	_, before, err := size()
	pss := h.PSS("qemu-system", id)
	if err != nil || before == 0 || pss == 0 {
		t.Fatalf("machine %s has %d bytes, its VMM %d: %v", id, before, pss, err)
	}
	// Less may be given up for other reasons, what the guest itself uses, say.
	const least = 256 << 20
	start := time.Now()
	h.Tandem("rm", "-f", "--project-name", project, hog)
	var b Back
	h.Eventually(limit, "the host has its memory back", func() error {
		want, have, err := size()
		b = Back{before - have, pss - h.PSS("qemu-system", id), time.Since(start)}
		if err == nil && (have > want || b.GivenUp < least || b.Returned*5 < b.GivenUp*4) {
			err = fmt.Errorf("the machine has %d MiB, is to have %d MiB; its VMM has %d MiB less than before", have>>20, want>>20, b.Returned>>20)
		}
		return err
	})
	return b
}
