package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"testing"
	"time"

	"tandem/test/host"
)

func TestMain(m *testing.M) {
	host.MaybeInit()
	environment()
	os.Exit(m.Run())
}

// environment is printed above all figures.
func environment() {
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	load, _ := os.ReadFile("/proc/loadavg")
	model := "unknown processor"
	b, _ := os.ReadFile("/proc/cpuinfo")
	for _, l := range strings.Split(string(b), "\n") {
		if k, v, ok := strings.Cut(l, ":"); ok && strings.TrimSpace(k) == "model name" {
			model = strings.TrimSpace(v)
			break
		}
	}
	qemu, _ := exec.Command("qemu-system-x86_64", "--version").Output()
	fmt.Printf("environment: %d x %s, Linux %s, %s, %s, load %s\n", runtime.NumCPU(), model, strings.TrimSpace(string(kernel)),
		strings.SplitN(string(qemu), "\n", 2)[0], runtime.Version(), strings.Join(strings.Fields(string(load))[:3], " "))
}

// report prints one promise: what was measured, what was promised.
func report(what, got, promise string, kept bool) {
	mark := "kept"
	if !kept {
		mark = "BROKEN"
	}
	fmt.Printf("%-62s %16s   promise %-28s %s\n", what, got, promise, mark)
}

func note(what, got string) { fmt.Printf("%-62s %16s\n", what, got) }

func median(d []time.Duration) time.Duration {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return d[len(d)/2]
}

func times(n int, f func(i int)) time.Duration {
	var d []time.Duration
	for i := range n {
		start := time.Now()
		f(i)
		d = append(d, time.Since(start))
	}
	return median(d)
}

func ms(d time.Duration) string { return d.Round(time.Millisecond).String() }

type machine struct {
	Meta struct{ ID, Name string }
	Size struct {
		MemoryBytes string `json:"memory_bytes"`
	}
	Status struct {
		State         string
		StartMethod   string `json:"start_method"`
		StartDuration string `json:"start_duration"`
		Pid           string
	}
}

func machines(b *testing.B, h *host.Host) []machine {
	b.Helper()
	var list []machine
	if err := json.Unmarshal([]byte(h.Tandem("machine", "ls", "--format", "json")), &list); err != nil {
		b.Fatal(err)
	}
	return list
}

// starts makes n machines one after the other and returns the median of what
// they took from the VMM's start until the guest answered, and how they started.
func starts(b *testing.B, h *host.Host, n int) (time.Duration, string) {
	b.Helper()
	var d []time.Duration
	method := ""
	for i := range n {
		name := "bench-" + strconv.Itoa(i)
		h.Tandem("machine", "create", name)
		for _, m := range machines(b, h) {
			if m.Meta.Name == name {
				method = m.Status.StartMethod
				x, err := time.ParseDuration(m.Status.StartDuration)
				if err != nil {
					b.Fatal(err)
				}
				d = append(d, x)
			}
		}
		h.Tandem("machine", "rm", "-f", name)
	}
	return median(d), method
}

// cloned launches and waits until machines start as clones.
func cloned(b *testing.B, flags ...string) *host.Host {
	b.Helper()
	h := host.New(b)
	h.Launch(flags...)
	h.Eventually(5*time.Minute, "a warm template", func() error {
		if f, _ := filepath.Glob(h.State() + "/machines/templates/*/manifest.json"); len(f) == 0 {
			return fmt.Errorf("not there yet")
		}
		return nil
	})
	return h
}

func BenchmarkMachineStart(b *testing.B) {
	cold := host.New(b)
	cold.Launch("--no-clone")
	boot, how := starts(b, cold, 3)
	if how != "boot" {
		b.Fatalf("with --no-clone a machine started by %s", how)
	}
	h := cloned(b)
	clone, how := starts(b, h, 7)
	if how != "clone" {
		b.Fatalf("a machine started by %s", how)
	}
	report("machine, cold boot until the guest answers", ms(boot), "8 s", boot <= 8*time.Second)
	report("machine, fast clone until the guest answers", ms(clone), "1 s and 1/5 of cold", clone <= time.Second && clone*5 <= boot)

	h.Tandem("machine", "create", "idle")
	time.Sleep(20 * time.Second)
	pss := qemuPSS(b, h)
	report("machine, idle: PSS on the host", mb(pss), "200 MB", pss <= 200e6)
}

func mb(n int64) string { return fmt.Sprintf("%.0f MB", float64(n)/1e6) }

// qemuPSS is the proportional set size of all VMMs of a host.
func qemuPSS(b *testing.B, h *host.Host) int64 {
	b.Helper()
	var sum int64
	for _, pid := range h.Find("qemu-system", "-name") {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			continue // ended meanwhile
		}
		sum += field(string(text), "Pss:") * 1024
	}
	return sum
}

func field(text, name string) int64 {
	for _, l := range strings.Split(text, "\n") {
		if f := strings.Fields(l); len(f) > 1 && f[0] == name {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}

func BenchmarkContainers(b *testing.B) {
	h := cloned(b, "--idle-stop", "3s")
	h.Images()
	h.Tandem("run", "--rm", "--isolation", "metal", "busybox", "true") // what is made once is made
	file := h.Compose("first", "name: first\nservices:\n  one: {image: 'busybox:latest', command: [sleep, '100000'], stop_grace_period: 1s}\n")
	var d []time.Duration
	for range 5 {
		h.Eventually(2*time.Minute, "no machine", func() error {
			if n := len(machines(b, h)); n > 0 {
				return fmt.Errorf("%d machines", n)
			}
			return nil
		})
		start := time.Now()
		h.Tandem("up", "-f", file)
		d = append(d, time.Since(start))
		h.Tandem("down", "-p", "first")
	}
	first := median(d)
	report("tandem up, no machine yet, until the container runs", ms(first), "3 s", first <= 3*time.Second)

	h.Tandem("run", "-d", "--name", "keep", "busybox", "sleep", "100000")
	h.Tandem("run", "--rm", "busybox", "true")
	inGuest, remove := runcInGuest(b, h)
	d = inTurns(b, h, nil, inGuest.of("tandem"), inGuest.of("minimal"))
	remove()
	report("busybox true in a warm machine, create to exit", ms(d[0]), "1.4 x "+ms(d[1])+" (runc)", float64(d[0]) <= 1.4*float64(d[1]))
	note("   runc alone of its own minimal spec, there", ms(d[2]))

	onHost := runcOnHost(b, h)
	others := []func() time.Duration{onHost.of("tandem"), onHost.of("minimal")}
	docker, err := startDocker(b)
	if err == nil {
		others = append(others, docker.run)
	}
	d = inTurns(b, h, []string{"--isolation", "metal"}, others...)
	report("busybox true on metal, create to exit", ms(d[0]), "1.4 x "+ms(d[1])+" (runc)", float64(d[0]) <= 1.4*float64(d[1]))
	note("   runc alone of its own minimal spec, there", ms(d[2]))
	if err != nil {
		note("docker run of the same, beside it", "not measured: "+err.Error())
		return
	}
	report("docker run of the same, beside it", ms(d[3]), "slower than Tandem", d[0] < d[3])
}

func BenchmarkDensity(b *testing.B) {
	run := func(isolation string) (one, ten int64) {
		h := cloned(b)
		h.Images()
		up := func(n int) int64 {
			file := h.Compose("dense", fmt.Sprintf("name: dense\nservices:\n  web:\n    image: httpd:latest\n    x-tandem: {isolation: %s}\n    deploy: {replicas: %d, resources: {reservations: {memory: 16M}}}\n", isolation, n))
			h.Tandem("up", "-f", file)
			for _, c := range mustContainers(b, h) {
				h.Eventually(2*time.Minute, "an answer of "+c.Meta.Name, func() error {
					_, err := h.Curl("http://" + c.Assignment.IP + "/")
					return err
				})
			}
			time.Sleep(10 * time.Second)
			return qemuPSS(b, h)
		}
		one = up(1)
		return one, up(10)
	}
	one, shared := run("project")
	_, own := run("own")
	report("ten Apaches in one machine, PSS", mb(shared), "1/5 of "+mb(own)+" (ten machines)", shared*5 <= own)
	more := (shared - one) / 9
	report("one more Apache in a machine", mb(more), "25 MB", more <= 25e6)
}

func mustContainers(b *testing.B, h *host.Host) map[string]host.Container {
	b.Helper()
	m, err := h.Containers()
	if err != nil {
		b.Fatal(err)
	}
	return m
}

func BenchmarkServer(b *testing.B) {
	h := cloned(b)
	h.Images()
	pid := 0
	for _, p := range h.Server() {
		pid = p
	}
	stat := func() (rss int64, cpu time.Duration) {
		s, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		t, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		f := strings.Fields(string(t[strings.LastIndexByte(string(t), ')')+2:]))
		u, _ := strconv.Atoi(f[11])
		k, _ := strconv.Atoi(f[12])
		return field(string(s), "VmRSS:") * 1024, time.Duration(u+k) * 10 * time.Millisecond
	}
	time.Sleep(10 * time.Second)
	_, before := stat()
	start := time.Now()
	time.Sleep(30 * time.Second)
	rss, after := stat()
	load := float64(after-before) / float64(time.Since(start)) * 100
	report("tandem serve, idle: resident memory", mb(rss), "120 MB", rss <= 120e6)
	report("tandem serve, idle: processor", fmt.Sprintf("%.2f %%", load), "1 % of a core", load <= 1)

	// 1,000 containers that are known but have no place: more than the host has.
	file := h.Compose("many", "name: many\nservices:\n  x:\n    image: busybox:latest\n    command: [sleep, '1']\n    deploy: {replicas: 1000, resources: {reservations: {memory: 1000G}}}\n")
	h.Tandem("up", "-d", "-f", file)
	h.Eventually(time.Minute, "1,000 containers known", func() error {
		if n := strings.Count(h.Tandem("ps", "-a", "-q"), "\n"); n != 1000 {
			return fmt.Errorf("%d containers known", n)
		}
		return nil
	})
	ps := times(9, func(int) {
		if n := strings.Count(h.Tandem("ps", "-a", "-q"), "\n"); n != 1000 {
			b.Fatalf("%d containers known", n)
		}
	})
	nothing := times(9, func(int) { h.Tandem("ps", "--help") })
	report("tandem ps, 1,000 containers known", ms(ps-nothing), "50 ms", ps-nothing <= 50*time.Millisecond)
	note("   the command itself, started through nsenter to print its help (taken off)", ms(nothing))
	var d []time.Duration
	for range 3 {
		h.Kill9()
		start := time.Now()
		h.Launch()
		d = append(d, time.Since(start))
	}
	restart := median(d)
	report("restart of tandem serve, 1,000 containers known", ms(restart), "2 s", restart <= 2*time.Second)
	for _, x := range []struct {
		name  string
		max   int64
		files []string
	}{{"tandem and tandemd", 90e6, []string{"tandem", "tandemd"}}, {"tandem-guest", 15e6, []string{"tandem-guest"}}, {"initramfs", 20e6, []string{"guest/current/initramfs"}}} {
		var size int64
		for _, f := range x.files {
			st, err := os.Stat(filepath.Join(h.Bin, f))
			if err != nil {
				b.Fatal(err)
			}
			size += st.Size()
		}
		report("size of "+x.name, fmt.Sprintf("%.1f MB", float64(size)/1e6), mb(x.max), size <= x.max)
	}
}
