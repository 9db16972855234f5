package cli

import (
	"context"
	"fmt"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func (a *app) run() *cobra.Command {
	var r runFlags
	c := &cobra.Command{
		Use:   "run IMAGE [COMMAND] [ARG...]",
		Short: "Run a command in a new container, as docker run",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := r.spec(args)
			if err != nil {
				return err
			}
			return a.runContainer(cmd.Context(), &r, spec)
		},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	f.StringVar(&r.name, "name", "", "name of the container")
	f.BoolVarP(&r.detach, "detach", "d", false, "print the id and go on in the background")
	f.BoolVar(&r.rm, "rm", false, "remove the container when it ends")
	f.BoolVarP(&r.tty, "tty", "t", false, "give it a terminal")
	f.BoolVarP(&r.interactive, "interactive", "i", false, "connect standard input")
	f.StringArrayVarP(&r.env, "env", "e", nil, "variable NAME=VALUE, or NAME from here")
	f.StringArrayVar(&r.envFile, "env-file", nil, "file with variables")
	f.StringArrayVarP(&r.publish, "publish", "p", nil, "[ip:][host:]container[/udp]")
	f.StringArrayVarP(&r.volume, "volume", "v", nil, "volume:/path[:ro], or /host/path:/path with --isolation metal")
	f.StringArrayVar(&r.tmpfs, "tmpfs", nil, "/path[:size=64m]")
	f.StringVarP(&r.user, "user", "u", "", "user[:group]")
	f.StringVarP(&r.workdir, "workdir", "w", "", "working directory")
	f.StringVar(&r.hostname, "hostname", "", "host name inside")
	f.StringVar(&r.entrypoint, "entrypoint", "", "instead of the image's entrypoint")
	f.StringVarP(&r.memory, "memory", "m", "", "memory limit: 256m, 1g")
	f.StringVar(&r.memoryReservation, "memory-reservation", "", "memory the planner sets aside: 128m")
	f.StringVar(&r.cpus, "cpus", "", "CPU limit: 0.5, 2")
	f.Int64Var(&r.cpuShares, "cpu-shares", 0, "weight under contention (1024 = one share)")
	f.Int64Var(&r.pids, "pids-limit", 0, "most processes")
	f.StringVar(&r.restart, "restart", "no", "no, always, on-failure[:N], unless-stopped")
	f.StringArrayVarP(&r.label, "label", "l", nil, "NAME=VALUE")
	f.StringArrayVar(&r.capAdd, "cap-add", nil, "capability to add")
	f.StringArrayVar(&r.capDrop, "cap-drop", nil, "capability to drop")
	f.StringArrayVar(&r.securityOpt, "security-opt", nil, "no-new-privileges, seccomp=unconfined, seccomp=FILE (a profile in Docker's format), ...")
	f.StringArrayVar(&r.ulimit, "ulimit", nil, "NAME=SOFT[:HARD]")
	f.StringArrayVar(&r.device, "device", nil, "/dev/x[:/dev/y[:rwm]]")
	f.StringArrayVar(&r.addHost, "add-host", nil, "name:ip")
	f.StringArrayVar(&r.dns, "dns", nil, "name server")
	f.StringArrayVar(&r.dnsSearch, "dns-search", nil, "search domain")
	f.StringArrayVar(&r.sysctl, "sysctl", nil, "NAME=VALUE")
	f.StringArrayVar(&r.groupAdd, "group-add", nil, "further group")
	f.BoolVar(&r.readOnly, "read-only", false, "root file system read-only")
	f.BoolVar(&r.privileged, "privileged", false, "all capabilities and devices")
	f.BoolVar(&r.init, "init", false, "an init that reaps inside")
	f.StringVar(&r.isolation, "isolation", "project", "project, shared, own (a machine for it alone) or metal (no machine)")
	f.StringVar(&r.class, "class", "latency", "latency, or batch: ends when latency work fits nowhere else, and starts again when there is room")
	f.StringVar(&r.pool, "pool", "", "pool that it counts in, such as /teams/shop")
	f.StringVar(&r.pull, "pull", "missing", "missing, always, never")
	f.StringVar(&r.stopSignal, "stop-signal", "", "signal that ends it")
	f.IntVar(&r.stopTimeout, "stop-timeout", 10, "seconds before it is killed")
	f.StringArrayVar(&r.network, "network", nil, "none, host (metal only) or a network of the project; several, the first first")
	f.StringVar(&r.shm, "shm-size", "", "size of /dev/shm")
	f.StringVar(&r.platform, "platform", "", "os/arch of the image")
	f.StringVar(&r.healthCmd, "health-cmd", "", "command that tells its health")
	f.DurationVar(&r.healthInterval, "health-interval", 0, "time between checks")
	f.DurationVar(&r.healthTimeout, "health-timeout", 0, "time a check may take")
	f.DurationVar(&r.healthStart, "health-start-period", 0, "time it may take to get healthy")
	f.Int32Var(&r.healthRetries, "health-retries", 0, "failures until unhealthy")
	f.BoolVar(&r.noHealth, "no-healthcheck", false, "ignore the image's health check")
	return c
}

// runContainer creates, starts, connects and waits.
func (a *app) runContainer(ctx context.Context, r *runFlags, spec *v1.ContainerSpec) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	res, err := api.containers().Create(ctx, connect.NewRequest(&v1.CreateContainerRequest{Project: a.project, Name: r.name, Spec: spec, Start: true}))
	if err != nil {
		return err
	}
	c := res.Msg
	if r.detach {
		if _, err := api.containers().Wait(ctx, connect.NewRequest(&v1.WaitContainerRequest{Container: c.GetMeta().GetId(), Project: c.GetMeta().GetProject(), Condition: "started"})); err != nil && !(spec.GetAutoRemove() && errdefs.IsNotFound(err)) {
			return err
		}
		if a.format == "json" {
			return a.printOne(c)
		}
		fmt.Fprintln(a.env.Stdout, c.GetMeta().GetId())
		return nil
	}
	id := c.GetMeta().GetId()
	st := api.containers().Attach(ctx)
	if err := st.Send(&v1.StreamInput{Kind: &v1.StreamInput_Attach{Attach: &v1.AttachSpec{ContainerId: id, Stdin: r.interactive, Logs: true}}}); err != nil {
		if _, rerr := st.Receive(); rerr != nil {
			return rerr
		}
		return err
	}
	s := &session{a: a, st: st, tty: r.tty && a.stdinIsTerminal(), stdin: r.interactive, forward: true}
	code, err := s.run(ctx)
	if err != nil {
		return err
	}
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

func (a *app) update() *cobra.Command {
	var memory, cpus, restart, reservation string
	var pids, shares int64
	c := &cobra.Command{
		Use: "update CONTAINER", Short: "Change a running container's limits", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			api, err := a.api()
			if err != nil {
				return err
			}
			cur, err := api.containers().Inspect(cmd.Context(), connect.NewRequest(&v1.ContainerRequest{Container: args[0], Project: a.project}))
			if err != nil {
				return err
			}
			rs := cur.Msg.GetSpec().GetResources()
			if rs == nil {
				rs = &v1.Resources{}
			}
			for _, x := range []struct {
				flag, text string
				to         *int64
				parse      func(string) (int64, error)
			}{{"memory", memory, &rs.MemoryBytesLimit, resource.ParseMemory}, {"memory-reservation", reservation, &rs.MemoryBytesReservation, resource.ParseMemory}, {"cpus", cpus, &rs.CpuMilliLimit, resource.ParseCPU}} {
				if x.text != "" {
					if *x.to, err = x.parse(x.text); err != nil {
						return usageError("--%s: %v", x.flag, err)
					}
				}
			}
			if cmd.Flags().Changed("pids-limit") {
				rs.PidsLimit = pids
			}
			if cmd.Flags().Changed("cpu-shares") {
				rs.CpuShares = shares
			}
			req := &v1.UpdateContainerRequest{Container: args[0], Project: a.project, Resources: rs}
			if restart != "" {
				if req.Restart, err = parseRestart(restart); err != nil {
					return err
				}
			}
			res, err := api.containers().Update(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			a.names([]*v1.Container{res.Msg})
			return nil
		},
	}
	f := c.Flags()
	f.StringVarP(&memory, "memory", "m", "", "memory limit")
	f.StringVar(&reservation, "memory-reservation", "", "memory set aside")
	f.StringVar(&cpus, "cpus", "", "CPU limit")
	f.Int64Var(&pids, "pids-limit", 0, "most processes")
	f.Int64Var(&shares, "cpu-shares", 0, "weight under contention")
	f.StringVar(&restart, "restart", "", "restart policy")
	return c
}
