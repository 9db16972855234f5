package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Join runs `tandem agent` in this host, apart from the server in another one, and
// waits until that knows it by this name. What h.Tandem asks, it asks that server.
// Kill9 kills the agent as it kills a server.
func (h *Host) Join(server *Host, name string, flags ...string) {
	h.t.Helper()
	socket := "unix://" + server.RunDir() + "/tandem.sock"
	args := append([]string{"agent", "--server", socket, "--token-file", filepath.Join(server.State(), "server/agent-token"), "--name", name,
		"--state-dir", h.State(), "--run-dir", h.RunDir(), "--lib-dir", h.Bin}, flags...)
	c := h.Inside(context.Background(), filepath.Join(h.Bin, "tandem"), args...)
	c.Stdout, c.Stderr = h.log, h.log
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	*h.serve = c
	h.Eventually(time.Minute, name+" is connected", func() error {
		up, err := server.Connected(name)
		if err == nil && !up {
			err = errors.New("it is not")
		}
		return err
	})
}

// Connected says whether this host's server has a connection to the agent of a host.
func (h *Host) Connected(name string) (bool, error) {
	out, err := h.Try("host", "ls", "--format", "json")
	if err != nil {
		return false, fmt.Errorf("%w: %s", err, out)
	}
	var hosts []struct {
		Meta      struct{ Name string }
		Connected bool
	}
	if err := json.Unmarshal([]byte(out), &hosts); err != nil {
		return false, err
	}
	for _, x := range hosts {
		if x.Meta.Name == name {
			return x.Connected, nil
		}
	}
	return false, nil
}

// Crash ends everything in the host at once, as a power cut does. Its directories stay; Boot
// starts it again, without the processes.
func (h *Host) Crash() {
	h.t.Helper()
	unix.Kill(h.init.Process.Pid, unix.SIGKILL) // with PID 1 the kernel ends all others
	h.init.Wait()
	if *h.serve != nil {
		(*h.serve).Process.Kill()
		(*h.serve).Wait()
		*h.serve = nil
	}
}
