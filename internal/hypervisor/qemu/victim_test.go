package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"tandem/internal/hypervisor"
)

const victimEnv = "TANDEM_TEST_VICTIM"

// victim is a driver's process that works until it is killed.
func victim(dir string) {
	ctx := context.Background()
	check := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "victim:", err)
			os.Exit(3)
		}
	}
	d, err := New(ctx, options(dir, slog.New(slog.NewTextHandler(os.Stderr, nil))))
	check(err)
	g, err := guest()
	check(err)
	disk := filepath.Join(dir, "disk")
	check(os.WriteFile(disk, make([]byte, 1<<20), 0o600))
	fmt.Println("working")
	for i := 0; ; i++ {
		id := fmt.Sprintf("v%d", i%3)
		check(d.Create(ctx, hypervisor.MachineSpec{ID: id, Kernel: g.Kernel, Initrd: g.Initrd, GuestVersion: g.Version}))
		check(d.Start(ctx, id, hypervisor.StartOptions{Template: warmName}))
		check(d.AttachDisk(ctx, id, hypervisor.Disk{ID: "d", Path: disk, ReadOnly: true}))
		_, err := d.Resize(ctx, id, hypervisor.Size{CPUs: 2, Memory: 320 << 20})
		check(err)
		check(d.DetachDisk(ctx, id, "d"))
		if i%2 == 1 {
			check(d.Delete(ctx, id))
		}
	}
}

// A driver is killed at random moments; the next one finds everything it left,
// and can remove all of it.
func TestKilledDriver(t *testing.T) {
	dir := t.TempDir()
	useWarm(t, dir)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	for round := range 15 {
		c := exec.CommandContext(ctx, "/proc/self/exe")
		c.Env = append(os.Environ(), victimEnv+"="+dir)
		c.Stderr = os.Stderr
		out, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		if n, err := out.Read(make([]byte, 100)); n == 0 {
			t.Fatalf("victim did not start: %v, %v", err, c.Wait())
		}
		time.Sleep(time.Duration(rnd.IntN(700)) * time.Millisecond)
		_ = c.Process.Kill()
		_ = c.Wait()
		if code := c.ProcessState.ExitCode(); code == 3 {
			t.Fatalf("round %d: victim failed", round)
		}

		d, err := New(ctx, options(dir, testLog(t)))
		if err != nil {
			t.Fatal(err)
		}
		list, err := d.List(ctx)
		if err != nil {
			t.Fatal(err)
		}
		known := map[int]bool{}
		for _, m := range list {
			known[m.PID] = true
			if m.State != hypervisor.Running && m.State != hypervisor.Stopped {
				t.Errorf("round %d: %+v", round, m)
			}
		}
		eventually(t, "all processes are known", func() bool {
			for pid := range strays(d.host.tag) {
				if !known[pid] {
					return false
				}
			}
			return true
		})
		if round%3 != 2 { // sometimes the next victim goes on with what is there
			_ = d.Close()
			continue
		}
		for _, m := range list {
			if m.State == hypervisor.Running {
				if _, err := d.Resize(ctx, m.Spec.ID, hypervisor.Size{CPUs: 1, Memory: 256 << 20}); err != nil {
					t.Errorf("round %d: adopted machine: %v", round, err)
				}
			}
			if err := d.Delete(ctx, m.Spec.ID); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		checkNothingLeft(t, d)
		_ = d.Close()
	}
	d := open(t, dir)
	for _, id := range []string{"v0", "v1", "v2"} {
		if err := d.Delete(ctx, id); err != nil {
			t.Error(err)
		}
	}
	checkNothingLeft(t, d)
}

// checkNothingLeft looks for processes, control groups and files.
func checkNothingLeft(t *testing.T, d *Driver) {
	t.Helper()
	eventually(t, "no process is left", func() bool { return len(strays(d.host.tag)) == 0 })
	if d.groups != nil {
		if left := d.groups.list(); len(left) > 0 {
			t.Errorf("cgroups left: %v", left)
		}
	}
	for _, dir := range []string{d.opt.RunDir, filepath.Join(d.opt.StateDir, "machines")} {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, %v", dir, entries, err)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so: %s", what)
		}
	}
}
