package cli

import (
	"context"
	"fmt"
	"net"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
)

// runFlags are docker run's, as far as Tandem has them.
type runFlags struct {
	name, user, workdir, hostname, entrypoint, memory, cpus, restart, isolation, class, pull, stopSignal, network, shm, platform, memoryReservation string
	env, envFile, publish, volume, label, capAdd, capDrop, securityOpt, ulimit, tmpfs, device, addHost, dns, dnsSearch, sysctl, groupAdd            []string
	detach, rm, tty, interactive, readOnly, privileged, init                                                                                        bool
	pids, cpuShares                                                                                                                                 int64
	stopTimeout                                                                                                                                     int
	healthCmd                                                                                                                                       string
	healthInterval, healthTimeout, healthStart                                                                                                      time.Duration
	healthRetries                                                                                                                                   int32
	noHealth                                                                                                                                        bool
}

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
	f.StringArrayVar(&r.securityOpt, "security-opt", nil, "no-new-privileges, seccomp=unconfined, ...")
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
	f.StringVar(&r.class, "class", "latency", "latency or batch")
	f.StringVar(&r.pull, "pull", "missing", "missing, always, never")
	f.StringVar(&r.stopSignal, "stop-signal", "", "signal that ends it")
	f.IntVar(&r.stopTimeout, "stop-timeout", 10, "seconds before it is killed")
	f.StringVar(&r.network, "network", "", "none, host (metal only) or a network of the project")
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

// spec turns flags and arguments into a container's wishes.
func (r *runFlags) spec(args []string) (*v1.ContainerSpec, error) {
	s := &v1.ContainerSpec{
		Image: args[0], User: r.user, WorkingDir: r.workdir, Hostname: r.hostname, Tty: r.tty,
		StdinOpen: r.interactive, StdinOnce: r.interactive && !r.detach, ReadOnly: r.readOnly, Privileged: r.privileged, Init: r.init,
		CapAdd: r.capAdd, CapDrop: r.capDrop, SecurityOpt: r.securityOpt, GroupAdd: r.groupAdd,
		ExtraHosts: r.addHost, Dns: r.dns, DnsSearch: r.dnsSearch, StopSignal: r.stopSignal, PullPolicy: r.pull,
		StopGracePeriod: durationpb.New(time.Duration(r.stopTimeout) * time.Second), AutoRemove: r.rm, Platform: r.platform,
		Resources: &v1.Resources{CpuShares: r.cpuShares, PidsLimit: r.pids},
	}
	if len(args) > 1 {
		s.Command = &v1.StringList{Values: args[1:]}
	}
	if r.entrypoint != "" {
		s.Entrypoint = &v1.StringList{Values: []string{r.entrypoint}}
	}
	var err error
	for _, x := range []struct {
		flag, text string
		to         *int64
	}{{"memory", r.memory, &s.Resources.MemoryBytesLimit}, {"memory-reservation", r.memoryReservation, &s.Resources.MemoryBytesReservation}, {"shm-size", r.shm, &s.ShmSizeBytes}} {
		if x.text == "" {
			continue
		}
		if *x.to, err = resource.ParseMemory(x.text); err != nil {
			return nil, usageError("--%s: %v", x.flag, err)
		}
	}
	if r.cpus != "" {
		if s.Resources.CpuMilliLimit, err = resource.ParseCPU(r.cpus); err != nil {
			return nil, usageError("--cpus: %v", err)
		}
	}
	if s.Isolation, s.WorkClass, err = parseWhere(r.isolation, r.class); err != nil {
		return nil, err
	}
	switch r.network {
	case "none", "host":
		s.NetworkMode = r.network
	case "":
	default:
		s.Networks = []*v1.NetworkAttachment{{Network: r.network}}
	}
	if s.Restart, err = parseRestart(r.restart); err != nil {
		return nil, err
	}
	if r.rm && s.Restart.Name != "no" {
		return nil, usageError("--rm and --restart %s contradict each other", r.restart)
	}
	if err := r.lists(s); err != nil {
		return nil, err
	}
	if r.noHealth {
		s.Healthcheck = &v1.HealthCheck{Test: []string{"NONE"}}
	} else if r.healthCmd != "" {
		s.Healthcheck = &v1.HealthCheck{Test: []string{"CMD-SHELL", r.healthCmd}, Retries: r.healthRetries}
		for _, x := range []struct {
			d  time.Duration
			to **durationpb.Duration
		}{{r.healthInterval, &s.Healthcheck.Interval}, {r.healthTimeout, &s.Healthcheck.Timeout}, {r.healthStart, &s.Healthcheck.StartPeriod}} {
			if x.d > 0 {
				*x.to = durationpb.New(x.d)
			}
		}
	}
	return s, nil
}

// lists fills in what may be given several times.
func (r *runFlags) lists(s *v1.ContainerSpec) error {
	for _, f := range r.envFile {
		b, err := os.ReadFile(f)
		if err != nil {
			return usageError("--env-file: %v", err)
		}
		for _, l := range strings.Split(string(b), "\n") {
			if l = strings.TrimSpace(l); l != "" && !strings.HasPrefix(l, "#") {
				r.env = append([]string{l}, r.env...)
			}
		}
	}
	for _, e := range r.env {
		if !strings.Contains(e, "=") {
			v, ok := os.LookupEnv(e)
			if !ok {
				continue
			}
			e += "=" + v
		}
		s.Env = append(s.Env, e)
	}
	pairs := func(flag string, list []string) (map[string]string, error) {
		if len(list) == 0 {
			return nil, nil
		}
		m := map[string]string{}
		for _, l := range list {
			k, v, _ := strings.Cut(l, "=")
			if k == "" {
				return nil, usageError("--%s %q: give NAME=VALUE", flag, l)
			}
			m[k] = v
		}
		return m, nil
	}
	var err error
	if s.Labels, err = pairs("label", r.label); err != nil {
		return err
	}
	if s.Sysctls, err = pairs("sysctl", r.sysctl); err != nil {
		return err
	}
	for _, p := range r.publish {
		m, err := parsePublish(p)
		if err != nil {
			return err
		}
		s.Ports = append(s.Ports, m)
	}
	for _, v := range r.volume {
		m, err := parseVolume(v)
		if err != nil {
			return err
		}
		s.Mounts = append(s.Mounts, m)
	}
	for _, t := range r.tmpfs {
		target, opt, _ := strings.Cut(t, ":")
		m := &v1.Mount{Type: v1.Mount_TYPE_TMPFS, Target: target}
		if size, ok := strings.CutPrefix(opt, "size="); ok {
			if m.TmpfsSizeBytes, err = resource.ParseMemory(size); err != nil {
				return usageError("--tmpfs: %v", err)
			}
		} else if opt != "" {
			return usageError("--tmpfs %q: only size= is known", t)
		}
		s.Mounts = append(s.Mounts, m)
	}
	for _, u := range r.ulimit {
		name, lim, ok := strings.Cut(u, "=")
		soft, hard, both := strings.Cut(lim, ":")
		if !both {
			hard = soft
		}
		so, e1 := strconv.ParseInt(soft, 10, 64)
		ha, e2 := strconv.ParseInt(hard, 10, 64)
		if !ok || e1 != nil || e2 != nil {
			return usageError("--ulimit %q: give NAME=SOFT[:HARD]", u)
		}
		s.Ulimits = append(s.Ulimits, &v1.Ulimit{Name: name, Soft: so, Hard: ha})
	}
	for _, d := range r.device {
		p := strings.SplitN(d, ":", 3)
		dev := &v1.Device{PathOnHost: p[0], PathInContainer: p[0], Permissions: "rwm"}
		if len(p) > 1 {
			dev.PathInContainer = p[1]
		}
		if len(p) > 2 {
			dev.Permissions = p[2]
		}
		s.Devices = append(s.Devices, dev)
	}
	return nil
}

func parseWhere(isolation, class string) (v1.Isolation, v1.WorkClass, error) {
	i, ok := v1.Isolation_value["ISOLATION_"+strings.ToUpper(isolation)]
	if !ok || i == 0 {
		return 0, 0, usageError("--isolation %q: give project, shared, own or metal", isolation)
	}
	w, ok := v1.WorkClass_value["WORK_CLASS_"+strings.ToUpper(class)]
	if !ok || w == 0 {
		return 0, 0, usageError("--class %q: give latency or batch", class)
	}
	return v1.Isolation(i), v1.WorkClass(w), nil
}

func parseRestart(s string) (*v1.RestartPolicy, error) {
	name, n, has := strings.Cut(s, ":")
	p := &v1.RestartPolicy{Name: name}
	switch name {
	case "no", "always", "unless-stopped", "on-failure":
	default:
		return nil, usageError("--restart %q: give no, always, on-failure[:N] or unless-stopped", s)
	}
	if has {
		v, err := strconv.ParseInt(n, 10, 32)
		if err != nil || v < 0 || name != "on-failure" {
			return nil, usageError("--restart %q: a number goes with on-failure only", s)
		}
		p.MaxRetries = int32(v)
	}
	return p, nil
}

func parsePublish(s string) (*v1.PortMapping, error) {
	rest, proto, has := strings.Cut(s, "/")
	if !has {
		proto = "tcp"
	}
	bad := usageError("--publish %q: give [ip:][host:]container[/tcp|udp]", s)
	m := &v1.PortMapping{Protocol: proto}
	i := strings.LastIndex(rest, ":")
	ctr, host := rest[i+1:], ""
	if i >= 0 {
		host = rest[:i]
		if j := strings.LastIndex(host, ":"); j >= 0 {
			m.HostIp = strings.Trim(host[:j], "[]")
			host = host[j+1:]
			if net.ParseIP(m.HostIp) == nil {
				return nil, bad
			}
		}
	}
	c, err := strconv.ParseUint(ctr, 10, 16)
	if err != nil || c == 0 || proto != "tcp" && proto != "udp" {
		return nil, bad
	}
	m.ContainerPort = uint32(c)
	if host != "" {
		h, err := strconv.ParseUint(host, 10, 16)
		if err != nil {
			return nil, bad
		}
		m.HostPort = uint32(h)
	}
	return m, nil
}

func parseVolume(s string) (*v1.Mount, error) {
	p := strings.Split(s, ":")
	m := &v1.Mount{Type: v1.Mount_TYPE_VOLUME}
	switch {
	case len(p) == 1:
		m.Target = p[0]
	case len(p) <= 3:
		m.Source, m.Target = p[0], p[1]
		if strings.HasPrefix(m.Source, "/") || strings.HasPrefix(m.Source, ".") {
			m.Type = v1.Mount_TYPE_BIND
		}
	default:
		return nil, usageError("--volume %q: give name:/path[:ro]", s)
	}
	if !path.IsAbs(m.Target) {
		return nil, usageError("--volume %q: the path inside must be absolute", s)
	}
	if len(p) == 3 {
		for _, o := range strings.Split(p[2], ",") {
			switch o {
			case "ro":
				m.ReadOnly = true
			case "rw", "z", "Z":
			case "nocopy":
				m.NoCopy = true
			default:
				return nil, usageError("--volume %q: option %q is not known", s, o)
			}
		}
	}
	return m, nil
}

// runContainer creates, starts, connects and waits.
func (a *app) runContainer(ctx context.Context, r *runFlags, spec *v1.ContainerSpec) error {
	api, err := a.api()
	if err != nil {
		return err
	}
	res, err := api.containers.Create(ctx, connect.NewRequest(&v1.CreateContainerRequest{Project: a.project, Name: r.name, Spec: spec, Start: true}))
	if err != nil {
		return err
	}
	c := res.Msg
	if r.detach {
		if a.format == "json" {
			return a.printOne(c)
		}
		fmt.Fprintln(a.env.Stdout, c.GetMeta().GetId())
		return nil
	}
	id := c.GetMeta().GetId()
	st := api.containers.Attach(ctx)
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
			cur, err := api.containers.Inspect(cmd.Context(), connect.NewRequest(&v1.ContainerRequest{Container: args[0], Project: a.project}))
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
			res, err := api.containers.Update(cmd.Context(), connect.NewRequest(req))
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
