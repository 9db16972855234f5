package qemu

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/hypervisortest"
)

func TestSuite(t *testing.T) {
	hypervisortest.Run(t, func(t *testing.T) hypervisortest.Env {
		dir := t.TempDir()
		useWarm(t, dir)
		return hypervisortest.Env{
			Driver:   open(t, dir),
			Spec:     func(id string) hypervisor.MachineSpec { return spec(t, id) },
			Template: warmName,
			Ready: func(ctx context.Context, d hypervisor.Driver, id string) error {
				sh, err := tryShell(ctx, d, id)
				if err == nil {
					err = sh.Close()
				}
				return err
			},
			Echo: echo,
			Disk: func(n int64) string { return image(t, n) },
			Tap:  func() string { return tap(t) },
			Crash: func(d hypervisor.Driver, id string) {
				st, err := d.Inspect(context.Background(), id)
				if err != nil || st.PID == 0 {
					t.Fatalf("crash %s: %+v, %v", id, st, err)
				}
				if err := unix.Kill(st.PID, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			},
			Reopen: func(d hypervisor.Driver) hypervisor.Driver {
				_ = d.Close()
				ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
				defer cancel()
				again, err := New(ctx, options(dir, testLog(t)))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = again.Close() })
				return again
			},
		}
	})
}
