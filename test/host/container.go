package host

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Find lists pids (as seen from outside) of the host's processes whose command
// line has all the words.
func (h *Host) Find(words ...string) []int {
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.init.Process.Pid))
	if err != nil {
		return nil
	}
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
next:
	for _, d := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(d))
		if n, err := os.Readlink(d + "/ns/net"); err != nil || n != ns || pid == h.init.Process.Pid {
			continue
		}
		b, _ := os.ReadFile(d + "/cmdline")
		args := strings.Split(string(b), "\x00")
		line := filepath.Base(args[0]) + " " + strings.Join(args[1:], " ")
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		out = append(out, pid)
	}
	return out
}

// Processes lists command lines of the host's processes of these programs.
func (h *Host) Processes(names ...string) []string {
	var out []string
	for _, n := range names {
		for _, p := range h.Find(n) {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
			out = append(out, strings.ReplaceAll(string(b), "\x00", " "))
		}
	}
	return out
}

// Container is what the tests look at in `tandem ps --format json`.
type Container struct {
	Meta struct {
		ID, Name, Project string
	}
	Service    string
	Assignment struct {
		HostID    string `json:"host_id"`
		MachineID string `json:"machine_id"`
		IP        string
		Addresses []struct{ Network, IP string }
		Ports     []struct {
			HostPort int `json:"host_port"`
		}
	}
	Status struct {
		State        string
		ExitCode     int    `json:"exit_code"`
		RestartCount int    `json:"restart_count"`
		StartedAt    string `json:"started_at"`
		Health       string
		Message      string
	}
}

// Containers lists all containers by name.
func (h *Host) Containers() (map[string]Container, error) {
	out, err := h.Try("ps", "-a", "--format", "json")
	if err != nil {
		return nil, err
	}
	var list []Container
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	m := map[string]Container{}
	for _, c := range list {
		m[c.Meta.Name] = c
	}
	return m, nil
}

// Container is the container of that name; the test fails without it.
func (h *Host) Container(name string) Container {
	h.t.Helper()
	all, err := h.Containers()
	if err != nil {
		h.t.Fatal(err)
	}
	c, ok := all[name]
	if !ok {
		h.t.Fatalf("no container %s; there are %v", name, all)
	}
	return c
}

// Compose writes a Compose file and returns its path.
func (h *Host) Compose(name, text string) string {
	h.t.Helper()
	dir := filepath.Join(h.Dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	f := filepath.Join(dir, "compose.yaml")
	if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return f
}

// Pid is the first process of the host's namespaces, for nsenter by hand.
func (h *Host) Pid() int { return h.init.Process.Pid }
