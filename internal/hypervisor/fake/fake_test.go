package fake

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/hypervisortest"
)

func TestSuite(t *testing.T) {
	hypervisortest.Run(t, func(t *testing.T) hypervisortest.Env {
		n := 0
		return hypervisortest.Env{
			Driver: New(Options{Serve: func(_ string, c net.Conn) { _, _ = io.Copy(c, c) }}),
			Spec: func(id string) hypervisor.MachineSpec {
				return hypervisor.MachineSpec{ID: id, Kernel: "/k", Initrd: "/i", GuestVersion: "1"}
			},
			Echo: func(_ context.Context, c net.Conn, text string) error {
				if _, err := fmt.Fprintln(c, text); err != nil {
					return err
				}
				l, err := bufio.NewReader(c).ReadString('\n')
				if strings.TrimSpace(l) != text {
					return fmt.Errorf("%q came back as %q: %w", text, l, err)
				}
				return nil
			},
			Disk:   func(int64) string { n++; return filepath.Join(t.TempDir(), fmt.Sprint(n)) },
			Tap:    func() string { n++; return fmt.Sprint("tap", n) },
			Crash:  func(d hypervisor.Driver, id string) { d.(*Driver).Crash(id, "killed") },
			Reopen: func(d hypervisor.Driver) hypervisor.Driver { return d.(*Driver).Reopen() },
		}
	})
}

func TestFaults(t *testing.T) {
	ctx := context.Background()
	d := New(Options{Resize: func(_ string, now, _ hypervisor.Size) hypervisor.Size { return now }})
	boom := errors.New("boom")
	d.FailNext("Start", boom)
	d.FailNext("Start", errdefs.ErrUnavailable)
	if err := d.Create(ctx, hypervisor.MachineSpec{ID: "m"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []error{boom, errdefs.ErrUnavailable, nil} {
		if err := d.Start(ctx, "m", hypervisor.StartOptions{}); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	if got, err := d.Resize(ctx, "m", hypervisor.Size{CPUs: 4}); err != nil || got.CPUs != 1 {
		t.Errorf("a guest that gives nothing: %+v, %v", got, err)
	}
	d.Panic("m")
	if st, _ := d.Inspect(ctx, "m"); st.State != hypervisor.Crashed || st.Message != "guest kernel panic" {
		t.Errorf("%+v", st)
	}
	if c := d.Calls(); len(c) != 5 || c[0] != "Create m" || c[4] != "Resize m" {
		t.Errorf("calls: %q", c)
	}
}
