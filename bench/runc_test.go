package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// What Tandem's containers are compared with is `runc run` alone of the very
// bundle that Tandem makes: the same mounts, seccomp profile, capabilities and
// limits in a control group and a network namespace of its own. What runc alone
// of its own minimal spec (no seccomp, no network, no files in /etc) takes is told
// beside it.

// bundles makes two directories below dir that `runc run -b` runs: "tandem",
// adapted from what Tandem wrote for a container on metal, and "minimal".
func bundles(b *testing.B, h *host.Host, dir string) {
	b.Helper()
	tandem, minimal := filepath.Join(dir, "tandem"), filepath.Join(dir, "minimal")
	host.BusyboxTree(b, filepath.Join(tandem, "rootfs"))
	host.BusyboxTree(b, filepath.Join(minimal, "rootfs"))
	if out, err := exec.Command(filepath.Join(h.Bin, "runc"), "spec", "-b", minimal).CombinedOutput(); err != nil {
		b.Fatalf("runc spec: %v: %s", err, out)
	}
	adapt(b, filepath.Join(minimal, "config.json"), func(spec map[string]any) {
		p := spec["process"].(map[string]any)
		p["terminal"], p["args"], p["rlimits"] = false, []string{"/bin/true"}, nil
	})
	h.Tandem("run", "-d", "--name", "pattern", "--isolation", "metal", "busybox", "sleep", "100000")
	defer h.Tandem("rm", "-f", "pattern")
	id := h.Container("pattern").Meta.ID
	var config string
	err := filepath.WalkDir(h.RunDir(), func(p string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() && d.Name() == "rootfs" {
			return filepath.SkipDir
		}
		if err == nil && d.Name() == "config.json" && filepath.Base(filepath.Dir(p)) == id {
			config = p
		}
		return nil
	})
	if err != nil || config == "" {
		b.Fatalf("no bundle of container %s below %s: %v", id, h.RunDir(), err)
	}
	copyFile(b, config, filepath.Join(tandem, "config.json"))
	adapt(b, filepath.Join(tandem, "config.json"), func(spec map[string]any) {
		spec["process"].(map[string]any)["args"] = []string{"/bin/true"}
		spec["root"].(map[string]any)["path"] = "rootfs"
		linux := spec["linux"].(map[string]any)
		linux["cgroupsPath"] = "/tandem-bench"
		for _, n := range linux["namespaces"].([]any) {
			if ns := n.(map[string]any); ns["type"] == "network" {
				delete(ns, "path")
			}
		}
		for _, m := range spec["mounts"].([]any) {
			mount := m.(map[string]any)
			if dst := mount["destination"].(string); mount["type"] == "bind" && strings.HasPrefix(dst, "/etc/") {
				copyFile(b, mount["source"].(string), filepath.Join(tandem, filepath.Base(dst)))
				mount["source"] = filepath.Base(dst) // relative to the bundle
			}
		}
	})
}

func adapt(b *testing.B, file string, change func(map[string]any)) {
	b.Helper()
	text, err := os.ReadFile(file)
	var spec map[string]any
	if err == nil {
		err = json.Unmarshal(text, &spec)
	}
	if err == nil {
		change(spec)
		text, err = json.Marshal(spec)
	}
	if err == nil {
		err = os.WriteFile(file, text, 0o644)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// inTurns runs busybox true by `tandem run --rm` with these flags, and each of the
// others, 21 times one after the other, so that all see the same load, and returns
// medians, of Tandem first. Nobody is burdened with what another one does after a
// container's end.
func inTurns(b *testing.B, h *host.Host, flags []string, others ...func() time.Duration) []time.Duration {
	b.Helper()
	d := make([][]time.Duration, 1+len(others))
	here := strings.Count(h.Tandem("ps", "-a", "-q"), "\n")
	for range 21 {
		time.Sleep(time.Second) // each begins when what others left has been cleared
		start := time.Now()
		h.Tandem(append(append([]string{"run", "--rm"}, flags...), "busybox", "true")...)
		d[0] = append(d[0], time.Since(start))
		h.Eventually(time.Minute, "the container is removed", func() error {
			if n := strings.Count(h.Tandem("ps", "-a", "-q"), "\n"); n > here {
				return fmt.Errorf("%d containers, not %d", n, here)
			}
			return nil
		})
		for i, other := range others {
			time.Sleep(time.Second)
			d[1+i] = append(d[1+i], other())
		}
	}
	medians := make([]time.Duration, len(d))
	for i := range d {
		medians[i] = median(d[i])
	}
	return medians
}

// runner runs a bundle by runc alone and says how long that took.
type runner func(bundle string) time.Duration

func (r runner) of(bundle string) func() time.Duration {
	return func() time.Duration { return r(bundle) }
}

// runcInGuest is `runc run` of busybox true by itself, in the same guest: from a
// privileged container, with nothing of Tandem on the way.
func runcInGuest(b *testing.B, h *host.Host) (run runner, remove func()) {
	b.Helper()
	h.ImportTree("runc:latest", func(root string) {
		host.BusyboxTree(b, root)
		bundles(b, h, filepath.Join(root, "bundles"))
		copyFile(b, filepath.Join(h.Bin, "runc"), filepath.Join(root, "bin/runc"))
	}, "CMD [\"sh\"]", "ENV PATH=/bin")
	h.Tandem("run", "-d", "--name", "nested", "--privileged", "--tmpfs", "/scratch", "--tmpfs", "/run", "runc", "sleep", "100000")
	// A control group that has limits below it has no processes in it.
	h.Tandem("exec", "nested", "sh", "-c", "mount -o remount,exec /scratch && cp -a /bundles /scratch/b && mkdir -p /run/runc /sys/fs/cgroup/own && for p in $(cat /sys/fs/cgroup/cgroup.procs); do echo $p > /sys/fs/cgroup/own/cgroup.procs; done; true")
	script := `cd /scratch/b/$0
s=$(cut -d' ' -f1 /proc/uptime); runc --root /run/runc run x || exit 1; e=$(cut -d' ' -f1 /proc/uptime); echo "$s $e"`
	run = func(bundle string) time.Duration {
		out, err := h.Try("exec", "nested", "sh", "-c", script, bundle)
		if err != nil {
			b.Fatal(err)
		}
		f := strings.Fields(out)
		if len(f) != 2 {
			b.Fatalf("runc in the guest: %q", out)
		}
		s, _ := strconv.ParseFloat(f[0], 64)
		e, _ := strconv.ParseFloat(f[1], 64)
		return time.Duration((e - s) * float64(time.Second))
	}
	return run, func() { h.Tandem("rm", "-f", "nested") }
}

// runcOnHost is the same on the host.
func runcOnHost(b *testing.B, h *host.Host) runner {
	b.Helper()
	dir := filepath.Join(h.Dir, "bundles")
	bundles(b, h, dir)
	root := filepath.Join(h.Dir, "runc-root")
	return func(bundle string) time.Duration {
		start := time.Now()
		c := h.Inside(b.Context(), filepath.Join(h.Bin, "runc"), "--root", root, "run", "-b", filepath.Join(dir, bundle), "bench")
		if out, err := c.CombinedOutput(); err != nil {
			b.Fatalf("runc: %v: %s", err, out)
		}
		return time.Since(start)
	}
}

func copyFile(b *testing.B, from, to string) {
	b.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o755)
	}
	if err != nil {
		b.Fatal(err)
	}
}
