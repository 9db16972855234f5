package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"tandem/internal/store"
	"tandem/internal/store/storetest"
	"tandem/test/host"
)

// TestFullDisk: the disk with the state fills up. Whoever asks for more is told
// so, what runs goes on, the server too, and with space it all works again.
func TestFullDisk(t *testing.T) {
	h := host.New(t)
	disk := h.SmallState(900)
	h.Launch("--no-clone")
	pid := h.Server()[0]
	h.Images()
	h.Tandem("run", "-d", "--name", "keep", "-v", "data:/data", "--stop-timeout", "1", "busybox",
		"sh", "-c", "echo precious > /data/f; sync; trap 'dd if=/dev/zero of=/data/big bs=1M count=40; sync; echo done > /data/done' USR1; while :; do sleep 0.2; done")
	h.Eventually(2*time.Minute, "keep runs", func() error { return inMachine(h.Container("keep")) })
	h.Tandem("run", "--name", "ended", "--isolation", "metal", "busybox", "true")
	kept := func() error {
		out, err := h.TryFor(time.Minute, "", "exec", "keep", "cat", "/data/f")
		if err == nil && out != "precious\n" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	}
	h.Eventually(time.Minute, "the volume's data", kept)
	before := h.Container("keep")
	lives := func() {
		t.Helper()
		if p := h.Server(); len(p) != 1 || p[0] != pid {
			t.Fatalf("the server was process %d, is %v", pid, p)
		}
	}

	// All is used: dd fails when there is no more.
	fill := func() {
		h.Inside(context.Background(), "dd", "if=/dev/zero", "of="+disk+"/fill", "bs=1M", "oflag=append", "conv=notrunc").Run()
		h.Inside(context.Background(), "dd", "if=/dev/zero", "of="+disk+"/fill2", "bs=4k", "oflag=append", "conv=notrunc").Run()
		h.Do("sync")
	}
	fill()
	fill() // and what was still being given back
	tarball := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(tarball, emptyTar(), 0o644); err != nil {
		t.Fatal(err)
	}
	refused := func(args ...string) {
		t.Helper()
		if _, err := h.TryFor(time.Minute, "", args...); err == nil || !strings.Contains(err.Error(), "no space") {
			t.Errorf("%v on a full disk: want an error that says \"no space\", got %v", args, err)
		} else {
			t.Logf("%v: %v", args, err)
		}
	}
	refused("image", "import", tarball, "late:latest")
	refused("run", "-d", "--name", "late", "busybox", "true")
	refused("volume", "create", "late")
	if out, _ := h.Try("doctor"); !strings.Contains(out, "the disk of the state directory is full") {
		t.Errorf("tandem doctor does not say it:\n%s", out)
	}
	// Its host still takes orders.
	if _, err := h.TryFor(time.Minute, "", "rm", "ended"); err != nil {
		t.Errorf("rm on a full disk: %v", err)
	}
	fill()
	if err := kept(); err != nil {
		t.Errorf("what ran does not go on: %v", err)
	}
	lives()

	// A machine that writes is held, and says what it waits for.
	h.Tandem("exec", "keep", "kill", "-USR1", "1")
	h.Eventually(time.Minute, "the machine says what it waits for", func() error {
		if out := h.Tandem("machine", "ls"); !strings.Contains(out, "no space left") {
			return errors.New(out)
		}
		return nil
	})
	lives()

	h.Do("rm", disk+"/fill", disk+"/fill2")
	h.Eventually(time.Minute, "there is space again", func() error {
		_, err := h.TryFor(time.Minute, "", "volume", "create", "late")
		return err
	})
	h.Eventually(2*time.Minute, "what the machine was held for is written", func() error {
		out, err := h.TryFor(time.Minute, "", "exec", "keep", "sh", "-c", "cat /data/done; wc -c < /data/big")
		if err == nil && out != "done\n41943040\n" {
			err = fmt.Errorf("got %q", out)
		}
		return err
	})
	h.Eventually(2*time.Minute, "keep is as it was", func() error { return errors.Join(inMachine(h.Container("keep")), kept()) })
	if after := h.Container("keep"); after.Status.StartedAt != before.Status.StartedAt {
		t.Errorf("keep was restarted: %v, then %v", before.Status, after.Status)
	}
	h.Tandem("image", "import", tarball, "late:latest")
	if out, err := h.TryFor(3*time.Minute, "", "run", "--rm", "-v", "another:/data", "busybox", "echo", "again"); err != nil || out != "again\n" {
		t.Errorf("with space again: %q, %v", out, err)
	}
	lives()
	events := h.Tandem("events", "--since", "1h", "--until", "0s")
	for _, what := range []string{"full", "space"} {
		if n := len(regexp.MustCompile(` state +`+what+" ").FindAllString(events, -1)); n != 1 {
			t.Errorf("%d events say that the state's disk is %s:\n%s", n, what, events)
		}
	}
}

// emptyTar is a tape archive with one empty file.
func emptyTar() []byte {
	b := make([]byte, 512+1024)
	copy(b, "hello")
	copy(b[100:], "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        0")
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// TestReadOnlyStateDir: no server where nothing can be written; the error names
// the directory and what is wrong with it.
func TestReadOnlyStateDir(t *testing.T) {
	h := host.New(t)
	disk := h.SmallState(200)
	h.Do("mount", "-o", "remount,ro", disk)
	_, err := h.TryFor(time.Minute, "", "serve", "--state-dir", h.State(), "--run-dir", h.RunDir(), "--lib-dir", h.Bin)
	if err == nil || !strings.Contains(err.Error(), h.State()) || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("tandem serve on a read-only directory: %v", err)
	}
	h.Do("mount", "-o", "remount,rw", disk)
	h.Launch("--no-clone")
}

// TestResetUnderAServerIsRefused: reset takes nothing from a server that runs.
func TestResetUnderAServerIsRefused(t *testing.T) {
	h := host.New(t)
	h.Launch("--no-clone")
	_, err := h.TryFor(time.Minute, "", "reset", "--yes", "--state-dir", h.State(), "--run-dir", h.RunDir())
	if err == nil || !strings.Contains(err.Error(), "a server runs on "+h.State()) {
		t.Errorf("reset under a running server: %v", err)
	}
	h.Tandem("ps")
}

// TestCorruptRecord: one container's record is damaged on disk. It is named, all
// others go on and can be stopped and started, and nothing is taken for gone.
func TestCorruptRecord(t *testing.T) {
	h := host.New(t)
	h.Launch("--no-clone")
	h.Images()
	serve := func(name string, flags ...string) {
		h.Tandem(append(append([]string{"run", "-d", "--name", name, "--isolation", "metal", "--stop-timeout", "1"}, flags...),
			"busybox", "sh", "-c", "echo "+name+" > /tmp/index.html; httpd -h /tmp; exec sleep 100000")...)
	}
	page := func(name, url string) func() error {
		return func() error {
			out, err := h.Curl(url)
			if err == nil && out != name+"\n" {
				err = fmt.Errorf("%s says %q, not %s", url, out, name)
			}
			return err
		}
	}
	for _, n := range []string{"one", "two", "three"} {
		serve(n, "-p", "80")
	}
	one, two, three := h.Container("one"), h.Container("two"), h.Container("three")
	port := fmt.Sprintf("http://127.0.0.1:%d", two.Assignment.Ports[0].HostPort)
	h.Eventually(time.Minute, "two answers", page("two", port))
	h.Stop()
	storetest.Damage(t, filepath.Join(h.State(), "server/server"), store.Key{Kind: store.Containers, Project: two.Meta.Project, Name: "two"}, storetest.All)
	h.Launch("--no-clone")
	h.Eventually(time.Minute, "the others are known", func() error {
		return errors.Join(inMachine(h.Container("one")), inMachine(h.Container("three")))
	})
	for _, c := range []host.Container{one, three} {
		if now := h.Container(c.Meta.Name); now.Status.StartedAt != c.Status.StartedAt {
			t.Errorf("%s was restarted: %v, then %v", c.Meta.Name, c.Status, now.Status)
		}
	}
	out, _ := h.Try("doctor") // tells by its code that something is wrong
	if !strings.Contains(out, "two is corrupt") {
		t.Errorf("tandem doctor does not name the record:\n%s", out)
	}
	if out := h.Tandem("state", "ls"); !strings.Contains(out, "container") || !strings.Contains(out, "/two") {
		t.Errorf("tandem state ls does not name it:\n%s", out)
	}
	// All others can be worked with, and what the unreadable one has stays its own.
	h.Tandem("stop", "three")
	h.Tandem("start", "three")
	serve("four")
	h.Eventually(2*time.Minute, "a new one runs", func() error { return inMachine(h.Container("four")) })
	ips := map[string]string{two.Assignment.IP: "two"}
	for _, n := range []string{"one", "three", "four"} {
		c := h.Container(n)
		if other := ips[c.Assignment.IP]; other != "" {
			t.Errorf("%s and %s have the address %s", n, other, c.Assignment.IP)
		}
		ips[c.Assignment.IP] = n
	}
	for ip, n := range ips {
		h.Eventually(time.Minute, n+" answers at its own address", func() error {
			out, err := h.TryFor(30*time.Second, "", "exec", "four", "timeout", "10", "wget", "-q", "-O", "-", "http://"+ip+"/")
			if err == nil && out != n+"\n" {
				err = fmt.Errorf("%s says %q, not %s", ip, out, n)
			}
			return err
		})
	}
	h.Eventually(time.Minute, "two answers at its port", page("two", port))
	h.Eventually(time.Minute, "four processes run, that of the unreadable record too", func() error {
		if n := len(h.Pids("sleep", "100000")); n != 4 {
			return fmt.Errorf("there are %d", n)
		}
		return nil
	})
	// Nobody knows its port any more: who wants one waits, and says so.
	five := make(chan error, 1)
	go func() {
		_, err := h.TryFor(5*time.Minute, "", "run", "-d", "--name", "five", "--isolation", "metal", "--stop-timeout", "1", "-p", "80", "busybox", "sleep", "100000")
		five <- err
	}()
	h.Eventually(time.Minute, "a fifth says what it waits for", func() error {
		all, err := h.Containers()
		if m := all["five"].Status.Message; err == nil && !strings.Contains(m, "tandem state purge") {
			err = fmt.Errorf("it says %q", m)
		}
		return err
	})
	// The way out.
	if _, err := h.Try("state", "purge", "container", "two"); err == nil || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("purge without --yes: %v", err)
	}
	h.Tandem("state", "purge", "container", "two", "--yes")
	h.Eventually(2*time.Minute, "the fifth runs and what had no record is gone", func() error {
		if n := len(h.Pids("sleep", "100000")); n != 4 {
			return fmt.Errorf("there are %d processes", n)
		}
		return inMachine(h.Container("five"))
	})
	<-five // it may have given up waiting
	serve("two")
	h.Eventually(2*time.Minute, "its name is free", func() error { return inMachine(h.Container("two")) })
}

// TestRubbishSocket: whatever is written to the server's socket, and however many
// leave their connections open, others are served and nothing piles up.
func TestRubbishSocket(t *testing.T) {
	h := host.New(t)
	h.Launch("--no-clone")
	pid := h.Server()[0]
	files := func() int { d, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); return len(d) }
	before := files()
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(uint64(seed), 0))
	junk := make([]byte, 1<<20)
	for i := range junk {
		junk[i] = byte(rng.Uint32())
	}
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	const call = "POST /tandem.v1.ContainerService/List HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\n"
	rubbish := [][]byte{
		junk,
		append([]byte(preface), junk...),
		append([]byte(preface), bytes.Repeat([]byte("\x00\x00\x04\x01\x04\x00\x00\x00\x01AAAA"), 10000)...), // broken HEADERS frames
		append([]byte(preface), bytes.Repeat([]byte("\x00\x00\x00\x04\x00\x00\x00\x00\x00"), 100000)...),    // SETTINGS without end
		[]byte("GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 32<<20) + "\r\n\r\n"),
		[]byte(strings.Repeat("GET /"+strings.Repeat("a", 4000)+" HTTP/1.1\r\nHost: x\r\n\r\n", 2000)),
		[]byte(call + "Content-Length: 9223372036854775807\r\n\r\n" + string(junk)),
		[]byte(call + "Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n"),
		[]byte(call + "Content-Length: 1048576\r\n\r\n" + string(junk)),
	}
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("unix", filepath.Join(h.RunDir(), "tandem.sock"))
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		return c
	}
	for _, r := range rubbish {
		c := dial()
		go io.Copy(io.Discard, c)
		c.SetWriteDeadline(time.Now().Add(5 * time.Second))
		c.Write(r) // it may well hang up on us
		c = dial() // and one that never reads the answers
		c.SetWriteDeadline(time.Now().Add(time.Second))
		c.Write(r)
	}
	for i := range 200 { // half-open: nothing, half a line, half of the headers, half of a body
		c := dial()
		io.WriteString(c, []string{"", "POST /tan", call, call + "Content-Length: 1000\r\n\r\nhalf", preface}[i%5])
	}
	for range 5 {
		begin := time.Now()
		if _, err := h.TryFor(30*time.Second, "", "ps"); err != nil {
			t.Errorf("others are not served: %v", err)
		}
		t.Logf("tandem ps took %s", time.Since(begin))
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for _, l := range strings.Split(string(b), "\n") {
		var kb int
		if _, err := fmt.Sscanf(l, "VmRSS: %d kB", &kb); err == nil {
			t.Logf("the server's memory: %d MiB", kb>>10)
			if kb > 400<<10 {
				t.Errorf("rubbish makes the server grow to %d MiB", kb>>10)
			}
		}
	}
	for _, c := range open {
		c.Close()
	}
	open = nil
	h.Eventually(time.Minute, "connections are let go", func() error {
		if n := files(); n > before+10 {
			return fmt.Errorf("%d open files, %d before", n, before)
		}
		return nil
	})
	if s := h.Server(); len(s) != 1 || s[0] != pid {
		t.Errorf("the server was %d, is %v", pid, s)
	}
	if l := h.Log(); strings.Contains(l, "panic") {
		t.Error("the server's log tells of a panic")
	}
}

// stress is the large number if TANDEM_STRESS asks for it.
func stress(small, large int) int {
	if os.Getenv("TANDEM_STRESS") != "" {
		return large
	}
	return small
}

// TestManyContainers: many containers in one machine; 200 with TANDEM_STRESS=1.
func TestManyContainers(t *testing.T) {
	n := stress(12, 200)
	h := host.New(t)
	h.Launch("--idle-stop", "1s")
	h.Images()
	f := h.Compose("many", fmt.Sprintf(`
name: many
services:
  a:
    image: busybox:latest
    command: [sleep, "100000"]
    stop_grace_period: 1s
    deploy:
      replicas: %d
      resources: {reservations: {cpus: "0.005", memory: 4M}}
`, n))
	begin := time.Now()
	if out, err := h.TryFor(40*time.Minute, "", "up", "-f", f); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%d containers ran after %s", n, time.Since(begin).Round(time.Millisecond))
	all, err := h.Containers()
	if err != nil || len(all) != n {
		t.Fatalf("%d containers, want %d: %v", len(all), n, err)
	}
	machines, ips := map[string]int{}, map[string]string{}
	for name, c := range all {
		if err := inMachine(c); err != nil {
			t.Error(err)
		}
		machines[c.Assignment.MachineID]++
		if other := ips[c.Assignment.IP]; other != "" || c.Assignment.IP == "" {
			t.Errorf("%s and %s have the address %q", name, other, c.Assignment.IP)
		}
		ips[c.Assignment.IP] = name
	}
	if len(machines) != 1 {
		t.Errorf("want one machine, there are %v", machines)
	}
	last := fmt.Sprintf("many-a-%d", n)
	if out, err := h.TryFor(2*time.Minute, "", "exec", last, "echo", "here"); err != nil || out != "here\n" {
		t.Errorf("exec in %s: %q, %v", last, out, err)
	}
	begin = time.Now()
	h.Tandem("down", "-p", "many")
	t.Logf("down took %s", time.Since(begin).Round(time.Millisecond))
	nothingLeft(h)
}

// TestManyMachines: many machines by fast clone; 30 with TANDEM_STRESS=1.
func TestManyMachines(t *testing.T) {
	n := stress(4, 30)
	h := host.New(t)
	h.Launch("--idle-stop", "1s", "--cpus", "64") // they idle: more than there are
	h.Images()
	h.Eventually(3*time.Minute, "fast clones are ready", func() error {
		if !strings.Contains(h.Log(), "fast clones are ready") {
			return errors.New("not yet")
		}
		return nil
	})
	f := h.Compose("own", fmt.Sprintf(`
name: own
services:
  a:
    image: busybox:latest
    command: [sleep, "100000"]
    stop_grace_period: 1s
    x-tandem: {isolation: own}
    deploy:
      replicas: %d
      resources: {reservations: {cpus: "0.01", memory: 16M}}
`, n))
	begin := time.Now()
	h.Tandem("up", "-f", f)
	t.Logf("%d machines ran after %s", n, time.Since(begin).Round(time.Millisecond))
	all, err := h.Containers()
	if err != nil || len(all) != n {
		t.Fatalf("%d containers, want %d: %v", len(all), n, err)
	}
	machines := map[string]bool{}
	for _, c := range all {
		if err := inMachine(c); err != nil {
			t.Error(err)
		}
		machines[c.Assignment.MachineID] = true
	}
	if len(machines) != n {
		t.Errorf("want %d machines, there are %d", n, len(machines))
	}
	var list []struct {
		Meta   struct{ Name string }
		Status struct {
			StartMethod string `json:"start_method"`
		}
	}
	out := h.Tandem("machine", "ls", "--format", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, m := range list {
		if m.Status.StartMethod != "clone" {
			t.Errorf("machine %s was started by %q, not as a clone", m.Meta.Name, m.Status.StartMethod)
		}
	}
	// Clones of one template must not draw the same random numbers.
	seen := map[string]string{}
	for name := range all {
		id, err := h.TryFor(time.Minute, "", "exec", name, "cat", "/proc/sys/kernel/random/uuid")
		if err != nil || seen[id] != "" {
			t.Errorf("%s draws %q, as %q did: %v", name, id, seen[id], err)
		}
		seen[id] = name
	}
	h.Tandem("down", "-p", "own")
	nothingLeft(h)
}

// nothingLeft waits until a host on which all is down has nothing over.
func nothingLeft(h *host.Host) {
	h.Eventually(3*time.Minute, "nothing is left", func() error {
		if o := append(h.Orphans(), h.VolumeFiles()...); len(o) > 0 {
			return fmt.Errorf("%d things are left over:\n%s", len(o), strings.Join(o, "\n"))
		}
		return nil
	})
}
