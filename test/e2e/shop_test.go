package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tandem/test/host"

	"golang.org/x/sys/unix"
)

const shop = `
name: shop
services:
  web:
    image: httpd:latest
    ports: ["8080:80"]
    depends_on: {api: {condition: service_healthy}}
    restart: unless-stopped
    configs:
      - {source: proxy, target: /etc/httpd.d/proxy.conf}
  api:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "8080", "-h", "/data"]
    volumes: ["pages:/data"]
    restart: unless-stopped
    healthcheck:
      test: ["CMD", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/index.html"]
      interval: 5s
      start_interval: 1s
      start_period: 60s
      timeout: 20s
  seed:
    image: busybox:latest
    command: ["sh", "-c", "echo seeded"]
configs:
  proxy:
    content: |
      ProxyPass / http://api:8080/ disablereuse=on
volumes:
  pages: {}
`

func inMachine(c host.Container) error {
	if c.Status.State != "CONTAINER_STATE_RUNNING" {
		return fmt.Errorf("%s is %s: %s", c.Meta.Name, c.Status.State, c.Status.Message)
	}
	return nil
}

// TestShop is the first promise: a Compose file becomes services in one machine,
// reachable by a published port; changing nothing changes nothing; data stays.
func TestShop(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	// The page that api serves lies in the image, so that the volume is filled from it.
	h.ImportTree("busybox:latest", func(root string) {
		host.BusyboxTree(t, root)
		host.Write(t, root, "data/index.html", "from the volume\n")
	}, `CMD ["sh"]`, "ENV PATH=/bin")
	f := h.Compose("shop", shop)

	plan := h.Tandem("up", "-f", f, "--plan")
	if !strings.Contains(plan, "shop-web-1") || !strings.Contains(plan, "because") {
		t.Errorf("the plan names no container or no reason:\n%s", plan)
	}
	if all, _ := h.Containers(); len(all) != 0 {
		t.Errorf("--plan made containers: %v", all)
	}
	h.Tandem("up", "-f", f)
	web, api := h.Container("shop-web-1"), h.Container("shop-api-1")
	if web.Assignment.MachineID == "" || web.Assignment.MachineID != api.Assignment.MachineID {
		t.Errorf("web runs in %q, api in %q; want one machine", web.Assignment.MachineID, api.Assignment.MachineID)
	}
	h.Eventually(time.Minute, "the page", func() error {
		page, err := h.Curl("http://127.0.0.1:8080/index.html")
		if err == nil && page != "from the volume\n" {
			err = fmt.Errorf("got %q", page)
		}
		return err
	})
	if out := h.Tandem("logs", "-p", "shop", "seed"); !strings.Contains(out, "seeded") {
		t.Errorf("logs of seed: %q", out)
	}
	if out := h.Tandem("explain", "-p", "shop", "shop-web-1"); len(strings.TrimSpace(out)) < 20 {
		t.Errorf("explain: %q", out)
	}
	if out := h.Tandem("exec", "-p", "shop", "api", "sh", "-c", "echo changed > /data/index.html; sync; id -u"); strings.TrimSpace(out) != "0" {
		t.Errorf("exec: %q", out)
	}

	t.Run("up again changes nothing", func(t *testing.T) {
		h := h.In(t)
		before := h.Container("shop-web-1")
		h.Tandem("up", "-f", f)
		if after := h.Container("shop-web-1"); after.Meta.ID != before.Meta.ID || after.Status.StartedAt != before.Status.StartedAt {
			t.Errorf("web was replaced or restarted: %v, %v", before, after)
		}
	})
	t.Run("killing the server stops nothing", func(t *testing.T) {
		h := h.In(t)
		before := h.Container("shop-api-1")
		h.Kill9()
		// Each request has Apache resolve "api" anew: names resolve, too.
		for range 3 {
			if page, err := h.Curl("http://127.0.0.1:8080/index.html"); err != nil || page != "changed\n" {
				t.Errorf("while the server is away: %q, %v", page, err)
			}
		}
		h.Launch()
		h.Eventually(time.Minute, "containers are known again", func() error { return inMachine(h.Container("shop-api-1")) })
		if after := h.Container("shop-api-1"); after.Status.StartedAt != before.Status.StartedAt {
			t.Errorf("api was restarted: %v, %v", before.Status, after.Status)
		}
		h.Eventually(time.Minute, "logs after the restart", func() error {
			out, err := h.Try("logs", "-p", "shop", "seed")
			if err == nil && !strings.Contains(out, "seeded") {
				err = fmt.Errorf("got %q", out)
			}
			return err
		})
	})
	t.Run("a crashed machine comes back with its containers", func(t *testing.T) {
		h := h.In(t)
		q := h.Find("qemu-system", "-name")
		if len(q) == 0 {
			t.Fatal("no QEMU process found")
		}
		for _, p := range q {
			unix.Kill(p, unix.SIGKILL)
		}
		h.Eventually(3*time.Minute, "the page after a crash", func() error {
			page, err := h.Curl("http://127.0.0.1:8080/index.html")
			if err == nil && page != "changed\n" {
				err = fmt.Errorf("got %q: the volume's data is lost", page)
			}
			return err
		})
	})
	t.Run("down removes all but the volume", func(t *testing.T) {
		h := h.In(t)
		h.Tandem("down", "-p", "shop")
		if all, err := h.Containers(); err != nil || len(all) != 0 {
			t.Errorf("containers after down: %v, %v", all, err)
		}
		if out := h.Tandem("volume", "ls"); !strings.Contains(out, "pages") {
			t.Errorf("the volume went with down: %s", out)
		}
		h.Tandem("up", "-f", f)
		h.Eventually(time.Minute, "the page after down and up", func() error {
			page, err := h.Curl("http://127.0.0.1:8080/index.html")
			if err == nil && page != "changed\n" {
				err = fmt.Errorf("got %q", page)
			}
			return err
		})
		h.Tandem("down", "-p", "shop", "-v")
		if out := h.Tandem("volume", "ls"); strings.Contains(out, "pages") {
			t.Errorf("down -v left the volume: %s", out)
		}
	})
}

// TestRun is docker run: exit codes, output, limits, metal, and refusals.
func TestRun(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	t.Run("exit code and output", func(t *testing.T) {
		h := h.In(t)
		out, err := h.Try("run", "--rm", "busybox", "sh", "-c", "echo out; echo err >&2; exit 7")
		if out != "out\n" {
			t.Errorf("standard output: %q", out)
		}
		if err == nil || !strings.Contains(err.Error(), "exit status 7") {
			t.Errorf("want exit status 7, got %v", err)
		}
	})
	t.Run("standard input", func(t *testing.T) {
		h := h.In(t)
		out, err := h.TryFor(2*time.Minute, "hello\n", "run", "--rm", "-i", "busybox", "cat")
		if err != nil || out != "hello\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("metal", func(t *testing.T) {
		h := h.In(t)
		out, err := h.Try("run", "--rm", "--isolation", "metal", "busybox", "uname", "-r")
		var uts unix.Utsname
		unix.Uname(&uts)
		if want := unix.ByteSliceToString(uts.Release[:]); err != nil || strings.TrimSpace(out) != want {
			t.Errorf("kernel on metal: %q, want %q: %v", out, want, err)
		}
	})
	t.Run("seccomp profile", func(t *testing.T) {
		h := h.In(t)
		profile := filepath.Join(h.Dir, "profile.json")
		write(t, profile, `{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}`)
		for _, isolation := range []string{"project", "metal"} {
			out, err := h.Try("run", "--rm", "--isolation", isolation, "--security-opt", "seccomp="+profile, "busybox", "sh", "-c", "touch /tmp/f && echo allowed; mkdir /tmp/d 2>/dev/null || echo forbidden")
			if err != nil || out != "allowed\nforbidden\n" {
				t.Errorf("%s: %q, %v", isolation, out, err)
			}
		}
	})
	t.Run("memory limit", func(t *testing.T) {
		h := h.In(t)
		_, err := h.Try("run", "--name", "greedy", "-m", "32m", "busybox", "dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=60")
		if err == nil || !strings.Contains(err.Error(), "exit status 137") {
			t.Errorf("a container that wants more memory than its limit: %v, want exit status 137", err)
		}
		if out := h.Tandem("inspect", "greedy"); !strings.Contains(out, `"oom_killed": true`) {
			t.Errorf("nothing says that it ran out of memory:\n%s", out)
		}
		h.Tandem("rm", "-f", "greedy")
	})
	t.Run("exits while the agent is away", func(t *testing.T) {
		h := h.In(t)
		h.Tandem("run", "-d", "--name", "brief", "busybox", "sh", "-c", "sleep 3; echo done; exit 5")
		h.Eventually(time.Minute, "brief runs", func() error { return inMachine(h.Container("brief")) })
		h.Kill9()
		time.Sleep(4 * time.Second) // the container's own time, not a wait for us
		h.Launch()
		h.Eventually(time.Minute, "its exit code", func() error {
			c := h.Container("brief")
			if c.Status.State != "CONTAINER_STATE_EXITED" || c.Status.ExitCode != 5 {
				return fmt.Errorf("%+v", c.Status)
			}
			return nil
		})
		if out := h.Tandem("logs", "brief"); out != "done\n" {
			t.Errorf("logs: %q", out)
		}
		h.Tandem("rm", "brief")
	})
	t.Run("refusals name the reason", func(t *testing.T) {
		h := h.In(t)
		for _, c := range []struct{ want, in string }{
			{"bind", "services: {a: {image: busybox, volumes: ['/etc:/x']}}"},
			{"not supported yet", "services: {a: {build: .}}"},
			{"a", "services: {a: {image: busybox, isolation: hyperv}}"},
		} {
			f := h.Compose("bad", "name: bad\n"+c.in+"\n")
			if _, err := h.Try("up", "-f", f); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: got %v, want a refusal with %q", c.in, err, c.want)
			}
		}
		if _, err := h.Try("run", "--rm", "--pull", "never", "no-such-image"); err == nil || !strings.Contains(err.Error(), "no-such-image") {
			t.Errorf("an unknown image: %v", err)
		}
	})
}

// TestProjectsAreApart: two projects share no machine and can't reach each other.
func TestProjectsAreApart(t *testing.T) {
	h := host.New(t)
	h.Launch()
	h.Images()
	text := "services:\n  a: {image: 'httpd:latest'}\n  b: {image: 'busybox:latest', command: [sleep, '100000'], stop_grace_period: 1s}\n"
	for _, p := range []string{"red", "blue"} {
		h.Tandem("up", "-f", h.Compose(p, "name: "+p+"\n"+text))
	}
	red, blue := h.Container("red-a-1"), h.Container("blue-b-1")
	if red.Assignment.MachineID == blue.Assignment.MachineID {
		t.Error("two projects share a machine")
	}
	in := func(project string, args ...string) (string, error) {
		return h.TryFor(2*time.Minute, "", append([]string{"exec", "--project-name", project, "b"}, args...)...)
	}
	get := func(project, ip string) error {
		_, err := in(project, "timeout", "10", "wget", "-q", "-O", "-", "http://"+ip+"/")
		return err
	}
	// busybox's nslookup asks the name server itself; its wget, linked statically,
	// can't use the C library's resolver.
	resolves := func(project, name string) error {
		out, err := in(project, "nslookup", name)
		if err == nil && !strings.Contains(out, red.Assignment.IP) {
			err = fmt.Errorf("%s is not %s: %s", name, red.Assignment.IP, out)
		}
		return err
	}
	h.Eventually(time.Minute, "red's names resolve", func() error { return resolves("red", "a") })
	h.Eventually(time.Minute, "red reaches its own service", func() error { return get("red", red.Assignment.IP) })
	if get("blue", red.Assignment.IP) == nil {
		t.Error("blue reaches red's container by address")
	}
	if resolves("blue", "a.red") == nil {
		t.Error("blue resolves red's names")
	}
	for _, p := range []string{"red", "blue"} {
		h.Tandem("down", "-p", p)
	}
	h.Eventually(3*time.Minute, "empty machines stop", func() error {
		if n := len(h.Find("qemu-system", "-name")); n > 1 { // the warm template may be in the making
			return fmt.Errorf("%d still run", n)
		}
		return nil
	})
}

// TestSecondServerIsRefused: one state directory has one server.
func TestSecondServerIsRefused(t *testing.T) {
	h := host.New(t)
	h.Launch()
	_, err := h.TryFor(time.Minute, "", "serve", "--state-dir", h.State(), "--run-dir", filepath.Join(h.Dir, "r2"), "--lib-dir", h.Bin)
	if err == nil || !strings.Contains(err.Error(), h.State()) {
		t.Errorf("a second server: %v", err)
	}
	if errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}
