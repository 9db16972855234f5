package cli

import (
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"tandem/api/resource"
	"tandem/api/secopt"
	v1 "tandem/api/tandem/v1"

	"google.golang.org/protobuf/types/known/durationpb"
)

// runFlags are docker run's, as far as Tandem has them.
type runFlags struct {
	name, user, workdir, hostname, entrypoint, memory, cpus, restart, isolation, class, pool, pull, stopSignal, shm, platform, memoryReservation  string
	env, envFile, publish, volume, label, capAdd, capDrop, securityOpt, ulimit, tmpfs, device, addHost, dns, dnsSearch, sysctl, groupAdd, network []string
	detach, rm, tty, interactive, readOnly, privileged, init                                                                                      bool
	pids, cpuShares                                                                                                                               int64
	stopTimeout                                                                                                                                   int
	healthCmd                                                                                                                                     string
	healthInterval, healthTimeout, healthStart                                                                                                    time.Duration
	healthRetries                                                                                                                                 int32
	noHealth                                                                                                                                      bool
}

// spec turns flags and arguments into a container's wishes.
func (r *runFlags) spec(args []string) (*v1.ContainerSpec, error) {
	s := &v1.ContainerSpec{
		Image: args[0], User: r.user, WorkingDir: r.workdir, Hostname: r.hostname, Tty: r.tty,
		StdinOpen: r.interactive, StdinOnce: r.interactive && !r.detach, ReadOnly: r.readOnly, Privileged: r.privileged, Init: r.init,
		CapAdd: r.capAdd, CapDrop: r.capDrop, SecurityOpt: slices.Clone(r.securityOpt), GroupAdd: r.groupAdd,
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
	s.Pool = r.pool
	if s.Isolation, s.WorkClass, err = parseWhere(r.isolation, r.class); err != nil {
		return nil, err
	}
	for _, n := range r.network {
		switch {
		case n != "none" && n != "host":
			s.Networks = append(s.Networks, &v1.NetworkAttachment{Network: n})
		case len(r.network) > 1:
			return nil, usageError("--network %s goes with no other network", n)
		default:
			s.NetworkMode = n
		}
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
	for i, o := range s.SecurityOpt {
		if s.SecurityOpt[i], err = secopt.Load(o, filepath.Abs); err == nil {
			err = secopt.Check(s.SecurityOpt[i])
		}
		if err != nil {
			return usageError("--security-opt: %v", err)
		}
	}
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
