package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

// dockerPackages are Docker as Debian 12 has it, and iptables, without which it
// makes no network.
var dockerPackages = []string{"docker.io", "containerd", "runc", "iptables", "libip4tc2", "libip6tc2", "libmnl0",
	"libnetfilter-conntrack3", "libnfnetlink0", "libnftnl11", "libxtables12"}

// docker is a dockerd in namespaces of its own. It ends, and all that it has is
// removed, with its host.
type docker struct {
	b      *testing.B
	h      *host.Host
	dir    string   // short: sockets have short paths
	cli    string   // of the same installation as dockerd
	env    []string // to find its helpers and libraries by
	parent string   // control group of all its containers
}

// startDocker starts the dockerd in PATH, or Debian's, which is downloaded and
// unpacked, never installed, and lets it run busybox true once. The error says why
// Docker can't be compared with here; then nothing runs.
func startDocker(b *testing.B) (*docker, error) {
	b.Helper()
	d := &docker{b: b}
	b.Cleanup(d.removeGroups) // after the end of its host, and of all in there
	h := host.New(b)
	d.h, d.dir, d.parent = h, filepath.Join(h.Dir, "d"), "/"+filepath.Base(h.Dir)+"-docker"
	if err := d.hide(); err != nil {
		return nil, err
	}
	dockerd, err := exec.LookPath("dockerd")
	if err == nil {
		d.env = os.Environ()
		d.cli = filepath.Join(filepath.Dir(dockerd), "docker")
		if _, err := os.Stat(d.cli); err != nil { // in bin, beside sbin
			d.cli = filepath.Join(filepath.Dir(dockerd), "../bin/docker")
		}
	} else if dockerd, err = d.unpack(); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(d.dir, "log"))
	if err != nil {
		b.Fatal(err)
	}
	defer log.Close()
	c := h.Inside(context.Background(), dockerd, "-H", d.socket(), "--data-root", filepath.Join(d.dir, "data"), "--exec-root", filepath.Join(d.dir, "run"),
		"--pidfile", filepath.Join(d.dir, "pid"), "--config-file", filepath.Join(d.dir, "daemon.json"), "--group", "root", "--cgroup-parent", d.parent)
	c.Env, c.Stdout, c.Stderr = d.env, log, log
	if err := c.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	b.Cleanup(func() { d.end(ended) })
	for start := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		_, err := d.try("version", "--format", "{{.Server.Version}}")
		if err == nil {
			break
		}
		select {
		case end := <-ended:
			ended <- end
			text, _ := os.ReadFile(log.Name())
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			return nil, fmt.Errorf("dockerd ended (%v): %s", end, lines[len(lines)-1])
		default:
		}
		if time.Since(start) > time.Minute {
			return nil, fmt.Errorf("dockerd does not answer: %w", err)
		}
	}
	root, tar := filepath.Join(d.dir, "root"), filepath.Join(d.dir, "root.tar")
	host.BusyboxTree(b, root)
	if out, err := exec.Command("tar", "-C", root, "--owner=0", "--group=0", "-cf", tar, ".").CombinedOutput(); err != nil {
		b.Fatalf("tar: %v: %s", err, out)
	}
	if _, err := d.try("import", tar, "busybox"); err != nil {
		return nil, err
	}
	_, err = d.try("run", "--rm", "busybox", "true")
	return d, err
}

// hide makes dir, and directories that Docker writes to whatever it is told: what it
// puts there, and what is there of another Docker, neither sees.
func (d *docker) hide() error {
	for _, n := range []string{"upper", "work"} {
		if err := os.MkdirAll(filepath.Join(d.dir, "etc", n), 0o755); err != nil {
			d.b.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(d.dir, "daemon.json"), []byte("{}"), 0o644); err != nil {
		d.b.Fatal(err)
	}
	etc := filepath.Join(d.dir, "etc")
	for _, m := range [][]string{
		{"-t", "overlay", "-o", "lowerdir=/etc,upperdir=" + etc + "/upper,workdir=" + etc + "/work", "etc", "/etc"},
		{"-t", "tmpfs", "-o", "mode=755", "run", "/run"},
		{"-t", "tmpfs", "-o", "mode=755", "opt", "/opt"},
	} {
		if out, err := d.h.Inside(d.b.Context(), "mount", m...).CombinedOutput(); err != nil {
			return fmt.Errorf("mount on %s: %w: %s", m[len(m)-1], err, firstLine(out))
		}
	}
	return nil
}

// unpack downloads Debian's packages and unpacks them below dir; it returns the
// path of dockerd.
func (d *docker) unpack() (string, error) {
	at := filepath.Join(d.dir, "debian")
	if err := os.MkdirAll(at, 0o755); err != nil {
		d.b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(d.b.Context(), 5*time.Minute)
	defer cancel()
	get := exec.CommandContext(ctx, "apt-get", append([]string{"-qq", "-o", "APT::Sandbox::User=root", "download"}, dockerPackages...)...)
	get.Dir, get.WaitDelay = at, 10*time.Second
	if out, err := get.CombinedOutput(); err != nil {
		return "", fmt.Errorf("no dockerd in PATH, and apt-get download: %w: %s", err, firstLine(out))
	}
	files, _ := filepath.Glob(filepath.Join(at, "*.deb"))
	for _, f := range files {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", f, at).CombinedOutput(); err != nil {
			return "", fmt.Errorf("dpkg -x %s: %w: %s", filepath.Base(f), err, firstLine(out))
		}
		os.Remove(f)
	}
	// What installing the package makes: the names that Docker calls iptables by.
	sbin := filepath.Join(at, "usr/sbin")
	for _, n := range []string{"iptables", "ip6tables"} {
		os.Remove(filepath.Join(sbin, n))
		if err := os.Symlink("xtables-nft-multi", filepath.Join(sbin, n)); err != nil {
			d.b.Fatal(err)
		}
	}
	libs, _ := filepath.Glob(filepath.Join(at, "usr/lib/*-linux-gnu*/xtables"))
	if len(libs) != 1 {
		return "", fmt.Errorf("libraries of Debian's iptables are in %v", libs)
	}
	d.env = append(os.Environ(), "PATH="+sbin+":"+filepath.Join(at, "usr/bin")+":"+os.Getenv("PATH"),
		"LD_LIBRARY_PATH="+filepath.Dir(libs[0]), "XTABLES_LIBDIR="+libs[0])
	d.cli = filepath.Join(at, "usr/bin/docker")
	return filepath.Join(sbin, "dockerd"), nil
}

func (d *docker) socket() string { return "unix://" + d.dir + "/sock" }

// try is a command of Docker's client, called as Tandem's is.
func (d *docker) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(d.b.Context(), 2*time.Minute)
	defer cancel()
	c := d.h.Inside(ctx, d.cli, append([]string{"-H", d.socket(), "--config", filepath.Join(d.dir, "config")}, args...)...)
	c.Env = d.env
	out, err := c.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", args[0], err, firstLine(out))
	}
	return string(out), err
}

// run is `docker run` of busybox true; what Docker removes afterwards is waited for.
func (d *docker) run() time.Duration {
	start := time.Now()
	if _, err := d.try("run", "--rm", "busybox", "true"); err != nil {
		d.b.Fatal(err)
	}
	took := time.Since(start)
	d.h.Eventually(time.Minute, "Docker's container is removed", func() error {
		left, err := d.try("ps", "-aq")
		if shims := d.h.Processes("containerd-shim"); err == nil && (left != "" || len(shims) > 0) {
			err = fmt.Errorf("containers %q, shims %v", left, shims)
		}
		return err
	})
	return took
}

// end stops dockerd, which stops its containerd; what is left ends with its host.
func (d *docker) end(ended <-chan error) {
	for _, p := range d.h.Find("dockerd", d.socket()) {
		if p, err := os.FindProcess(p); err == nil {
			p.Signal(os.Interrupt)
		}
	}
	select {
	case <-ended:
	case <-time.After(30 * time.Second):
		d.b.Errorf("dockerd does not end: %v", d.h.Processes("dockerd", "containerd"))
	}
}

// removeGroups removes the control groups that Docker leaves.
func (d *docker) removeGroups() {
	if d.parent == "" {
		return
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
		for _, below := range []string{"/*", ""} {
			dirs, _ := filepath.Glob(pattern + d.parent + below)
			for _, dir := range dirs {
				if st, err := os.Stat(dir); err != nil || !st.IsDir() {
					continue
				}
				if err := os.Remove(dir); err != nil {
					d.b.Errorf("control group left behind: %v", err)
				}
			}
		}
	}
}

func firstLine(out []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}
