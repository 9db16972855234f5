package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"tandem/internal/guestimage"
	"tandem/internal/network/hostnet"
	"tandem/internal/network/names"
	"tandem/internal/runtime/cgroup"
	"tandem/internal/runtime/monitor"
	"tandem/internal/store"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// monitorCommand holds standard streams, logs and exit codes of metal containers;
// the agent starts it when it is needed.
func monitorCommand() *cobra.Command {
	var d dirs
	c := &cobra.Command{
		Use: "monitor", Hidden: true, Short: "Hold the streams of containers on metal", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := d.check(); err != nil {
				return err
			}
			err := monitor.Serve(cmd.Context(), monitor.Options{Socket: d.monitorSocket(), Dir: filepath.Join(d.run, "monitor"), Logger: d.logger()})
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	d.flags(c, false)
	return c
}

// namesCommand answers containers for names, also while the agent is away; the
// agent starts it when it is needed.
func namesCommand() *cobra.Command {
	var d dirs
	var identity string
	c := &cobra.Command{
		Use: "names", Hidden: true, Short: "Answer containers for names", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := d.check(); err != nil {
				return err
			}
			debug.SetMemoryLimit(32 << 20)
			debug.SetGCPercent(50)
			debug.FreeOSMemory() // what the other commands' packages made when they were loaded
			o := hostnet.NamesOptions("", d.logger())
			o.Identity = identity
			err := names.Serve(cmd.Context(), d.namesSocket(), filepath.Join(d.run, "names.state"), o)
			if errdefs.IsAlreadyExists(err) {
				return nil // two were started at once; one is enough
			}
			return err
		},
	}
	d.flags(c, false)
	c.Flags().StringVar(&identity, "identity", "", "of the agent that starts it")
	return c
}

func guestCommand() *cobra.Command {
	var o guestimage.Options
	build := &cobra.Command{
		Use: "build", Short: "Make the kernel and initramfs that machines boot", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.CacheDir == "" {
				dir, err := os.UserCacheDir()
				if err != nil {
					return err
				}
				o.CacheDir = filepath.Join(dir, "tandem")
			}
			start := time.Now()
			o.Progress = func(step string) {
				fmt.Fprintf(os.Stderr, "%6.1fs  %s\n", time.Since(start).Seconds(), step)
			}
			m, err := guestimage.Build(cmd.Context(), o)
			if err != nil {
				return err
			}
			fmt.Printf("guest %s: kernel %s, initramfs %.1f MB\n", m.Version, m.KernelRelease, float64(m.InitrdBytes)/1e6)
			return nil
		},
	}
	f := build.Flags()
	f.StringVar(&o.GuestBinary, "guest", "", "the tandem-guest binary")
	f.StringVar(&o.RuncBinary, "runc", "", "a static runc")
	f.StringVar(&o.OutDir, "out", "guest", "directory to write")
	f.StringVar(&o.CacheDir, "cache", "", "where downloads are kept (default: the user's cache directory)")
	f.StringVar(&o.KernelPackage, "kernel-package", "", "a Debian cloud kernel's .deb (default: Debian's newest)")
	f.StringVar(&o.Compression, "compression", "", "of the initramfs: lz4, zstd or none")
	c := &cobra.Command{Use: "guest", Short: "What machines boot", Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	c.AddCommand(build)
	return c
}

// resetCommand takes everything away that one Tandem made on this host.
func resetCommand() *cobra.Command {
	var d dirs
	var yes bool
	c := &cobra.Command{
		Use: "reset", Short: "Remove all machines, containers, volumes and state of this host", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				return fmt.Errorf("this removes all that Tandem runs and keeps on this host, data of volumes included; say --yes: %w", errdefs.ErrFailedPrecondition)
			}
			if err := needRoot("tandem reset"); err != nil {
				return err
			}
			if err := d.check(); err != nil {
				return err
			}
			return reset(cmd.Context(), &d)
		},
	}
	d.flags(c, true)
	c.Flags().BoolVar(&yes, "yes", false, "really")
	return c
}

func reset(ctx context.Context, d *dirs) error {
	if err := d.serverGone(ctx, 5*time.Second); err != nil {
		return err
	}
	if err := d.findLib(); err != nil {
		d.lib = "/nonexistent" // containers on metal were never started then
	}
	group, err := d.workloads()
	if err != nil {
		return err
	}
	p, err := openParts(ctx, d, "tcg", d.logger())
	if err != nil {
		return err
	}
	var errs []error
	add := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	machines, err := p.driver.List(ctx)
	add("machines", err)
	for _, m := range machines {
		add("machine "+m.Spec.ID, p.driver.Delete(ctx, m.Spec.ID))
	}
	templates, err := p.driver.Templates(ctx)
	add("templates", err)
	for _, t := range templates {
		add("template "+t, p.driver.DeleteTemplate(ctx, t))
	}
	list, err := p.metal.List(ctx)
	add("containers", err)
	for _, c := range list {
		add("container "+c.GetId(), p.metal.Delete(ctx, c.GetId(), true))
	}
	add("network", p.net.Teardown(ctx))
	add("closing", p.close())
	add("monitor", d.stopMonitor())
	for _, dir := range []string{d.state, d.run} {
		add("mounts", unmountBelow(dir))
	}
	add("control groups", removeGroups(ctx, group))
	if len(errs) > 0 {
		return errors.Join(append(errs, fmt.Errorf("%s and %s are left as they are; mend the above and run it again", d.state, d.run))...)
	}
	for _, dir := range []string{d.state, d.run} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// serverGone refuses while a server of these directories runs. The lock of one
// that was killed is free only when the last of its threads has ended: it is
// given so much time.
func (d *dirs) serverGone(ctx context.Context, wait time.Duration) error {
	f, err := os.OpenFile(filepath.Join(d.state, "server", "server", "lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for end := time.Now().Add(wait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock of %s: %w", d.state, err)
		}
		if !time.Now().Before(end) {
			return fmt.Errorf("a server runs on %s%s: stop it first: %w", d.state, store.Holder(f), errdefs.ErrFailedPrecondition)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stopMonitor ends the monitor of the metal containers, found by its socket.
func (d *dirs) stopMonitor() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := monitor.NewClient(d.monitorSocket(), nil)
	pid, err := c.Ping(ctx)
	if err != nil {
		return nil // none runs
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for unix.Kill(pid, 0) == nil {
		if ctx.Err() != nil {
			return unix.Kill(pid, unix.SIGKILL)
		}
		if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); strings.Contains(string(b), ") Z ") {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return nil
}

// unmountBelow detaches every mount below dir, the innermost first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	var errs []error
	for i := len(lines) - 1; i >= 0; i-- {
		f := strings.Fields(lines[i])
		if len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			if err := unix.Unmount(f[1], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				errs = append(errs, fmt.Errorf("%s: %w", f[1], err))
			}
		}
	}
	return errors.Join(errs...)
}

// removeGroups removes the empty control groups below one; processes that are just
// ending are waited for.
func removeGroups(ctx context.Context, group string) error {
	l, err := cgroup.Detect()
	if err != nil {
		return nil // there are none
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return l.Group(group).Remove(ctx)
}
