package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tandem/test/host"

	"golang.org/x/sys/unix"
)

// chaosProject is a project with everything that can be left behind: containers
// in a machine and on metal, volumes in both, a published port, health checks.
// imp is privileged and kills, from within its machine, what the host can't reach
// (%s is its program).
const chaosProject = `
name: chaos
services:
  web:
    image: httpd:latest
    ports: ["18080:80"]
    restart: always
    depends_on: [db]
    stop_grace_period: 2s
  db:
    image: busybox:latest
    command: ["httpd", "-f", "-p", "8080", "-h", "/data"]
    volumes: ["data:/data"]
    restart: always
    stop_grace_period: 2s
    healthcheck:
      test: ["CMD", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/index.html"]
      interval: 3s
      start_interval: 1s
      start_period: 60s
      timeout: 20s
  imp:
    image: busybox:latest
    privileged: true
    command: ["sh", "-c", "%s"]
    restart: always
    stop_grace_period: 1s
  iron:
    image: busybox:latest
    command: ["sh", "-c", "date > /data/began; sleep 100000"]
    volumes: ["irondata:/data"]
    restart: always
    stop_grace_period: 1s
    x-tandem: {isolation: metal}
volumes:
  data: {}
  irondata: {}
`

// impProgram is imp's: after so many milliseconds it has the guest's kernel kill
// every process but PID 1 (the agent, the monitor, all containers, itself), so many
// times; it keeps count in its own file system. $$ is Compose's way to write $.
func impProgram(after, times int) string {
	return fmt.Sprintf("n=$$(cat /n || echo 0); [ $$n -ge %d ] && exec sleep 100000; "+
		"echo $$((n+1)) > /n; usleep %d; echo i > /proc/sysrq-trigger; sleep 100000", times, after*1000)
}

// chaos is one run of TestChaos: all that is drawn comes from one seed.
type chaos struct {
	*host.Host
	t       *testing.T
	rng     *rand.Rand
	flags   []string
	compose string
	token   string // what the volume must hold, "" when it is new
	killed  map[string]int
	usual   map[string]time.Duration // how long up and down take undisturbed
}

// TestChaos kills Tandem's processes at random moments of up and down, and asks
// after each round whether things are as they were asked to be, and nothing is
// left over. TANDEM_CHAOS_ROUNDS rounds (2), from TANDEM_CHAOS_SEED (1).
func TestChaos(t *testing.T) {
	rounds := envInt(t, "TANDEM_CHAOS_ROUNDS", 2)
	seed := uint64(envInt(t, "TANDEM_CHAOS_SEED", 1))
	t.Logf("replay with TANDEM_CHAOS_SEED=%d TANDEM_CHAOS_ROUNDS=%d", seed, rounds)
	c := &chaos{Host: host.New(t), t: t, flags: []string{"--idle-stop", "1s"}, killed: map[string]int{}, usual: map[string]time.Duration{}}
	c.Launch(c.flags...)
	c.Images()
	c.ImportTree("busybox:latest", func(root string) {
		host.BusyboxTree(t, root)
		host.Write(t, root, "data/index.html", "new\n")
	}, `CMD ["sh"]`, "ENV PATH=/bin")

	for round := range rounds + 1 {
		c.rng = rand.New(rand.NewPCG(seed, uint64(round)))
		kills := 0 // the first round shows how long things take
		if round > 0 {
			kills = 1 + c.rng.IntN(3)
		}
		after, times := c.rng.IntN(1500), c.rng.IntN(3)
		if kills == 0 {
			times = 0
		}
		t.Logf("round %d: %d kills, imp kills everything in the guest after %d ms, %d times", round, kills, after, times)
		c.compose = c.Compose(fmt.Sprintf("round%d", round), fmt.Sprintf(chaosProject, impProgram(after, times)))
		c.disturbed(kills, "up", "-f", c.compose)
		c.runs()
		down := []string{"down", "-p", "chaos"}
		if round%2 == 0 {
			down = append(down, "-v")
		}
		c.guestAgentDeaths()
		c.disturbed(kills, down...)
		c.gone(round%2 == 1)
		if t.Failed() {
			return
		}
	}
	t.Logf("killed: %v", c.killed)
	// Once more without the agent that mounted them: nobody's layers leave.
	c.Kill9()
	c.Launch(c.flags...)
	c.Eventually(3*time.Minute, "layers that nobody uses leave metal", func() error {
		if l := c.CachedLayers(); len(l) > 0 {
			return fmt.Errorf("%v", l)
		}
		return nil
	})
}

// disturbed runs a command while processes are killed, and again until it works,
// as its user would.
func (c *chaos) disturbed(kills int, args ...string) {
	c.t.Helper()
	began := time.Now()
	usual := c.usual[args[0]]
	done := make(chan error, 1)
	go func() {
		_, err := c.TryFor(5*time.Minute, "", args...)
		done <- err
	}()
	var last time.Duration
	for i := range kills {
		// Most moments are early: much happens then.
		at := last + time.Duration(c.rng.Int64N(int64(usual)/int64(kills-i)+1))
		target := []string{"server", "server", "qemu", "runc", "monitor", "iron"}[c.rng.IntN(6)]
		if target == "runc" { // lives for some tens of milliseconds: lie in wait from now on
			at = last
		}
		last = at
		pause := time.Duration(c.rng.IntN(400)) * time.Millisecond
		time.Sleep(time.Until(began.Add(at)))
		n := c.kill(target, pause)
		c.t.Logf("  %s: after %s of about %s killed %d of %s", args[0], at.Round(time.Millisecond), usual.Round(time.Millisecond), n, target)
		c.killed[target] += n
	}
	err := <-done
	if err == nil && kills == 0 {
		c.usual[args[0]] = time.Since(began)
	}
	for deadline := began.Add(6 * time.Minute); err != nil; {
		if time.Now().After(deadline) {
			c.t.Fatalf("%v does not work again after kills: %v", args, err)
		}
		c.t.Logf("  %s again after: %.300s", args[0], err)
		time.Sleep(200 * time.Millisecond)
		_, err = c.TryFor(5*time.Minute, "", args...)
	}
	c.t.Logf("  %s took %s", args[0], time.Since(began).Round(time.Millisecond))
}

// kill kills what runs of a kind; the server is started again.
func (c *chaos) kill(target string, pause time.Duration) int {
	var pids []int
	switch target {
	case "server":
		n := len(c.Server())
		c.Kill9()
		time.Sleep(pause)
		c.Launch(c.flags...)
		return n
	case "qemu":
		pids = c.Find("qemu-system", "-name")
	case "monitor":
		pids = c.Pids("tandemd", "monitor")
	case "iron": // the process of the container on metal
		pids = c.Pids("sleep", "100000")
	case "runc":
		for end := time.Now().Add(5 * time.Second); len(pids) == 0 && time.Now().Before(end); {
			pids = c.Pids("runc", "")
			time.Sleep(time.Millisecond)
		}
	}
	n := 0
	for _, p := range pids {
		if unix.Kill(p, unix.SIGKILL) == nil {
			n++
		}
	}
	return n
}

// runs waits until everything is as the file says.
func (c *chaos) runs() {
	c.t.Helper()
	c.Eventually(3*time.Minute, "all containers run", func() error {
		all, err := c.Containers()
		if err != nil {
			return err
		}
		for _, name := range []string{"chaos-web-1", "chaos-db-1", "chaos-imp-1", "chaos-iron-1"} {
			if err := inMachine(all[name]); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if len(all) != 4 {
			return fmt.Errorf("there are %d containers", len(all))
		}
		if h := all["chaos-db-1"].Status.Health; !strings.HasSuffix(h, "_HEALTHY") || strings.Contains(h, "UNHEALTHY") {
			return fmt.Errorf("chaos-db-1 is %s", h)
		}
		page, err := c.Curl("http://127.0.0.1:18080/")
		if err == nil && !strings.Contains(page, "It works") {
			err = fmt.Errorf("got %q", page)
		}
		return err
	})
	want := "new\n"
	if c.token != "" {
		want = c.token
	}
	next := fmt.Sprintf("token %d\n", c.rng.Uint64())
	c.Eventually(3*time.Minute, "the volume's data", func() error {
		out, err := c.TryFor(time.Minute, "", "exec", "-p", "chaos", "db", "cat", "/data/index.html")
		if err == nil && out != want {
			c.t.Fatalf("the volume holds %q, want %q: data was lost", out, want)
		}
		return err
	})
	c.Eventually(3*time.Minute, "writing to the volume", func() error {
		_, err := c.TryFor(time.Minute, next, "exec", "-i", "-p", "chaos", "db", "sh", "-c", "cat > /data/x && mv /data/x /data/index.html && sync")
		return err
	})
	c.token = next
	c.Eventually(time.Minute, "nothing runs twice", func() error {
		if q := c.Find("qemu-system", "-name"); len(q) != 1 {
			return fmt.Errorf("%d QEMU processes", len(q))
		}
		if p := c.Pids("sleep", "100000"); len(p) != 1 {
			return fmt.Errorf("%d processes of the container on metal", len(p))
		}
		if l := c.Links(); len(l) != 2 {
			return fmt.Errorf("want a tap and a veth, there are %v", l)
		}
		if g := c.ControlGroups(); len(groupNames(g)) != 2 {
			return fmt.Errorf("want groups of one machine and one container, there are %v", g)
		}
		if v := c.VolumeFiles(); len(v) != 3 {
			return fmt.Errorf("want two volumes and a scratch disk, there are %v", v)
		}
		if l, err := c.Leases(); err != nil || len(l) != 4 {
			return fmt.Errorf("want 4 image leases, there are %v, %v", l, err)
		}
		return c.disks()
	})
}

func groupNames(dirs []string) map[string]bool {
	m := map[string]bool{}
	for _, d := range dirs {
		m[filepath.Base(d)] = true
	}
	return m
}

// disks checks what hangs on the machine's SCSI bus: each thing once, and nothing
// that does not exist or belongs to metal.
func (c *chaos) disks() error {
	files, _ := filepath.Glob(filepath.Join(c.RunDir(), "m/*/run.json"))
	if len(files) != 1 {
		return fmt.Errorf("records of runs: %v", files)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		return err
	}
	if n := bytes.Count(b, []byte(c.State()+"/volumes/disks/")); n != 2 {
		return fmt.Errorf("want LUNs of one volume and one scratch disk, there are %d: %s", n, b)
	}
	if n := bytes.Count(b, []byte(c.State()+"/images/layers/")); n < 2 || n > 3 {
		return fmt.Errorf("want LUNs of two or three layers, there are %d: %s", n, b)
	}
	return nil
}

// gone waits until nothing of the project is left on the host.
func (c *chaos) gone(volumesStay bool) {
	c.t.Helper()
	volumes := 0
	if volumesStay {
		volumes = 2
	} else {
		c.token = ""
	}
	c.Eventually(3*time.Minute, "nothing is left after down", func() error {
		all, err := c.Containers()
		if err != nil || len(all) > 0 {
			return fmt.Errorf("containers: %v, %w", all, err)
		}
		if o := c.Orphans(); len(o) > 0 {
			return fmt.Errorf("left over:\n%s", strings.Join(o, "\n"))
		}
		if v := c.VolumeFiles(); len(v) != volumes {
			return fmt.Errorf("want %d disks, there are %v", volumes, v)
		}
		return nil
	})
	layers := c.CachedLayers()
	slices.Sort(layers)
	if once := slices.Compact(slices.Clone(layers)); len(once) != len(layers) {
		c.t.Errorf("a layer hangs on two loop devices: %v", layers)
	}
}

// guestAgentDeaths counts, from the machines' consoles, how often PID 1 had to
// start the guest's agent again.
func (c *chaos) guestAgentDeaths() {
	logs, _ := filepath.Glob(filepath.Join(c.State(), "machines/machines/*/console.log*"))
	for _, f := range logs {
		b, _ := os.ReadFile(f)
		c.killed["guest agent"] += bytes.Count(b, []byte("the agent ended"))
	}
}

func envInt(t *testing.T, name string, otherwise int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		t.Fatalf("%s=%q: want a number", name, s)
	}
	return n
}
