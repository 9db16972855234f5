package hostnet_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tandem/internal/network/hostnet"
	"tandem/internal/network/internal/bed"
	"tandem/internal/network/names"
	"tandem/internal/spawn"

	"golang.org/x/sys/unix"
)

// The test binary is the name server, too.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "serve-names" {
		o := hostnet.NamesOptions(os.Args[3], slog.New(slog.NewTextHandler(os.Stderr, nil)))
		if err := names.Serve(context.Background(), filepath.Join(os.Args[2], "s"), filepath.Join(os.Args[2], "state"), o); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	bed.Main(m)
}

// Names resolve while no agent is there, and after any of the two was killed;
// teardown ends the name server.
func TestNamesApart(t *testing.T) {
	w := newWorld(t)
	w.h.Close()
	dir, err := os.MkdirTemp("", "names")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	open := func() *hostnet.Host {
		w.o.Names = names.NewApart(names.ApartOptions{Socket: filepath.Join(dir, "s"), Logger: w.o.Logger,
			Spawn: spawn.Session([]string{"/proc/self/exe", "serve-names", dir, w.o.ResolvConf}, filepath.Join(dir, "log"))})
		return open(t, w.o)
	}
	resolves := func(when string) {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for {
			got := askName(w.a2.NS, "udp", "a-web-1")
			if got == "10.64.0.1" {
				return
			}
			if time.Now().After(deadline) {
				b, _ := os.ReadFile(filepath.Join(dir, "log"))
				t.Fatalf("%s: %s\n%s", when, got, b)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	w.h = open()
	w.apply(t)
	resolves("at first")
	server := holder(t, dir)
	w.h.Close()
	if got := askName(w.a2.NS, "tcp", "a-web-1"); got != "10.64.0.1" {
		t.Errorf("while nobody runs: %s", got)
	}
	w.h = open()
	w.apply(t)
	if now := holder(t, dir); now != server {
		t.Errorf("name server %d was replaced by %d", server, now)
	}
	if err := unix.Kill(server, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	resolves("after the name server was killed")
	server = holder(t, dir)
	if err := w.h.Teardown(ctx); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); !errors.Is(unix.Kill(server, 0), unix.ESRCH); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the name server is there after the teardown")
		}
	}
}

// holder is the name server's process id.
func holder(t *testing.T, dir string) int {
	t.Helper()
	var pid int
	b, err := os.ReadFile(filepath.Join(dir, "s.lock"))
	if err == nil {
		_, err = fmt.Sscan(string(b), &pid)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
