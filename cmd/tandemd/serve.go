package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/server"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// agentFlags are the settings of an agent.
type agentFlags struct {
	accel, name, zone, cpus, memory string
	noTemplate                      bool
}

func (o *agentFlags) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.accel, "accel", "auto", "auto (KVM where it works, else emulation), kvm or tcg")
	f.StringVar(&o.name, "name", "", "this host's name (default: the computer's)")
	f.StringVar(&o.zone, "zone", "", "failure zone that this host stands in")
	f.StringVar(&o.cpus, "cpus", "", "CPUs that Tandem may use (default: all)")
	f.StringVar(&o.memory, "memory", "", "memory that Tandem may use (default: all but a reserve)")
	f.BoolVar(&o.noTemplate, "no-clone", false, "boot every machine cold instead of cloning a warm one")
}

func (o *agentFlags) capacity() (*v1.Size, error) {
	if o.cpus == "" && o.memory == "" {
		return nil, nil
	}
	s := &v1.Size{}
	var err error
	if o.cpus != "" {
		if s.CpuMilli, err = resource.ParseCPU(o.cpus); err != nil {
			return nil, fmt.Errorf("--cpus: %w", err)
		}
	}
	if o.memory != "" {
		if s.MemoryBytes, err = resource.ParseMemory(o.memory); err != nil {
			return nil, fmt.Errorf("--memory: %w", err)
		}
	}
	return s, nil
}

func serveCommand() *cobra.Command {
	var d dirs
	var a agentFlags
	var cidr string
	var noAgent bool
	var elastic server.Elasticity
	c := &cobra.Command{
		Use: "serve", Short: "Run the server, its state and this host's agent", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot("tandem serve"); err != nil {
				return err
			}
			if err := d.check(); err != nil {
				return err
			}
			log := d.logger()
			o := server.Options{StateDir: filepath.Join(d.state, "server"), RunDir: d.run, Logger: log.With("part", "server"), Version: version, Elasticity: elastic}
			if cidr != "" {
				p, err := netip.ParsePrefix(cidr)
				if err != nil {
					return fmt.Errorf("--cidr: %w: %w", err, errdefs.ErrInvalidArgument)
				}
				o.ClusterCIDR = p
			}
			return serve(cmd.Context(), &d, o, a, noAgent, log)
		},
	}
	d.flags(c, true)
	a.flags(c)
	c.Flags().StringVar(&cidr, "cidr", "", "addresses that projects' networks are cut from (default 10.64.0.0/10)")
	c.Flags().BoolVar(&noAgent, "no-agent", false, "only the server; agents run apart (tandem agent)")
	c.Flags().DurationVar(&elastic.IdleStop, "idle-stop", 0, "an empty machine stops after so long (default 1m)")
	c.Flags().DurationVar(&elastic.ShrinkDelay, "shrink-delay", 0, "a machine shrinks when it was too large for so long (default 3s)")
	c.Flags().DurationVar(&elastic.FoldDelay, "fold-delay", 0, "half-empty machines are folded when they were as they are for so long; negative: never (default 5m)")
	c.Flags().IntVar(&elastic.FoldsPerHour, "folds-per-hour", 0, "so many containers may be moved for that in an hour (default 30)")
	c.Flags().DurationVar(&elastic.RestartDelay, "restart-delay", 0, "what keeps nothing starts elsewhere when its host was away for so long; negative: never (default 5m)")
	return c
}

// serve runs the server and, unless told otherwise, the agent in one process.
// They talk over the same socket and stream as they would apart.
func serve(ctx context.Context, d *dirs, o server.Options, a agentFlags, noAgent bool, log *slog.Logger) error {
	// The server first: it holds the state directory, so that a second one
	// refuses before it touches anything.
	srv, err := server.New(o)
	if err != nil {
		return err
	}
	to := notifySocket()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return srv.Run(ctx) })
	g.Go(func() error {
		if err := notifyReady(ctx, to, usable(filepath.Join(d.run, "tandem.sock"), !noAgent)); err != nil {
			log.Warn("systemd can't be told that the server answers", "error", err)
		}
		return nil
	})
	if !noAgent {
		g.Go(func() error {
			socket := filepath.Join(d.run, "tandem.sock")
			return runAgent(ctx, d, a, socket, filepath.Join(o.StateDir, "agent-token"), log)
		})
	}
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func agentCommand() *cobra.Command {
	var d dirs
	var a agentFlags
	var address, token string
	c := &cobra.Command{
		Use: "agent", Short: "Run this host's agent apart from the server", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot("tandem agent"); err != nil {
				return err
			}
			if err := d.check(); err != nil {
				return err
			}
			if address == "" {
				address = "unix://" + filepath.Join(d.run, "tandem.sock")
			}
			socket, ok := strings.CutPrefix(address, "unix://")
			if !ok {
				return fmt.Errorf("--server %s: give unix:///path (servers on other hosts need TLS, which is not there yet): %w", address, errdefs.ErrInvalidArgument)
			}
			if token == "" {
				token = filepath.Join(d.state, "server", "agent-token")
			}
			err := runAgent(cmd.Context(), &d, a, socket, token, d.logger())
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	d.flags(c, true)
	a.flags(c)
	c.Flags().StringVar(&address, "server", "", "unix:///path of the server's socket")
	c.Flags().StringVar(&token, "token-file", "", "file with the server's agent token")
	return c
}

func runAgent(ctx context.Context, d *dirs, a agentFlags, socket, tokenFile string, log *slog.Logger) error {
	if err := d.findLib(); err != nil {
		return err
	}
	p, err := openParts(ctx, d, a.accel, log)
	if err != nil {
		return err
	}
	defer p.close()
	ag, err := newAgent(d, p, a, log)
	if err != nil {
		return err
	}
	token, err := readToken(ctx, tokenFile, log)
	if err != nil {
		return err
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	// The agent outlives the order to end when the whole host ends: then it stops
	// in order what would otherwise be killed.
	run, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	defer context.AfterFunc(ctx, func() {
		defer end()
		if !hostGoesDown() {
			return
		}
		halt, cancel := context.WithTimeout(run, haltTime)
		defer cancel()
		if err := ag.Halt(halt); err != nil {
			log.Error("not everything was stopped in order", "error", err)
		}
	})()
	return ag.Run(run, dial, token)
}

// readToken waits for the server to have made its token: both start together.
func readToken(ctx context.Context, file string, log *slog.Logger) (string, error) {
	patience := time.After(3 * time.Second)
	for {
		b, err := os.ReadFile(file)
		if t := strings.TrimSpace(string(b)); err == nil && t != "" {
			return t, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-patience:
			log.Warn("waiting for the server to make its token: is this the right --token-file?", "file", file)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s makes machines, mounts and networks and needs root: use sudo: %w", what, errdefs.ErrPermissionDenied)
	}
	return nil
}
