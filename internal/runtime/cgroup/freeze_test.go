package cgroup_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/runtime/cgroup"
)

// execsAlways, set in its environment, makes this program exec itself for ever,
// each time with several threads.
const execsAlways = "TANDEM_TEST_EXECS_ALWAYS"

func TestMain(m *testing.M) {
	if os.Getenv(execsAlways) == "" {
		os.Exit(m.Run())
	}
	fmt.Print(".") // it lives
	for range 100 {
		go func() {
			_ = unix.Nanosleep(&unix.Timespec{Sec: 1000}, nil) // a thread each
		}()
	}
	time.Sleep(time.Millisecond)
	err := unix.Exec("/proc/self/exe", os.Args, os.Environ())
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// group is a new, empty group and its directory, removed when the test ends.
func group(t *testing.T) (cgroup.Group, string) {
	t.Helper()
	l, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	root := "/sys/fs/cgroup"
	if !l.Unified() {
		root = filepath.Join(root, "freezer")
	}
	dir, err := os.MkdirTemp(root, "tandem-test-")
	if err != nil {
		t.Fatal(err)
	}
	g := l.Group("/" + filepath.Base(dir))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := g.Kill(ctx); err != nil {
			t.Error(err)
		}
		if err := g.Remove(ctx); err != nil {
			t.Error(err)
		}
	})
	return g, dir
}

// A program that execs at any moment, with threads that must end first, can be
// frozen at any moment.
func TestFreezeExec(t *testing.T) {
	g, dir := group(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{execsAlways + "=1", "GOGC=off"}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() })
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for i := range 200 {
		time.Sleep(time.Duration(rand.IntN(4000)) * time.Microsecond) // any moment
		if err := g.Freeze(ctx, true); err != nil {
			t.Fatalf("time %d: %v", i, err)
		}
		if err := g.Freeze(ctx, false); err != nil {
			t.Fatalf("time %d: %v", i, err)
		}
		if _, err := out.Read(make([]byte, 64)); err != nil {
			t.Fatalf("time %d: the process does not go on: %v", i, err)
		}
	}
}
