package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	"github.com/moby/sys/signal"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"tandem/api/secopt"
	v1 "tandem/api/tandem/v1"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// check refuses what can't be run, before anything is made.
func (r *Runtime) check(s *v1.RuntimeSpec) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("container %s: "+format+": %w", append(append([]any{s.GetId()}, a...), errdefs.ErrInvalidArgument)...)
	}
	switch {
	case !idPattern.MatchString(s.GetId()):
		return fmt.Errorf("container id %q: use 1 to 64 of a-z, 0-9 and '-': %w", s.GetId(), errdefs.ErrInvalidArgument)
	case proto.Size(s) > 3<<20:
		return bad("its spec is larger than 3 MiB")
	case len(s.Args) == 0 || s.Args[0] == "":
		return bad("no command: the image has none and none was given")
	case len(s.Layers) == 0:
		return bad("no layers")
	case s.Init && r.o.InitPath == "":
		return bad("init is not supported here")
	case s.OomScoreAdj < -1000 || s.OomScoreAdj > 1000:
		return bad("oom_score_adj %d is outside -1000..1000", s.OomScoreAdj)
	case s.ShmSizeBytes < 0:
		return bad("negative /dev/shm size")
	}
	for _, group := range [][]string{s.Args, s.Env, {s.Cwd, s.User, s.Hostname, s.Domainname}} {
		for _, a := range group {
			if strings.ContainsRune(a, 0) {
				return bad("a NUL byte in %q", a)
			}
		}
	}
	for _, e := range s.Env {
		if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
			return bad("environment %q is not KEY=VALUE", k)
		}
	}
	if strings.ContainsAny(s.Hostname+s.Domainname, " \t\n/") || len(s.Hostname) > 64 || len(s.Domainname) > 64 {
		return bad("host name %q or domain %q", s.Hostname, s.Domainname)
	}
	if s.Cwd != "" && !path.IsAbs(s.Cwd) {
		return bad("working directory %q is not absolute", s.Cwd)
	}
	if s.StopSignal != "" {
		if _, err := signal.ParseSignal(s.StopSignal); err != nil {
			return bad("stop signal %q", s.StopSignal)
		}
	}
	for _, h := range s.ExtraHosts {
		name, addr, ok := strings.Cut(h, ":")
		if _, err := netip.ParseAddr(strings.Trim(addr, "[]")); !ok || err != nil || name == "" || strings.ContainsAny(name, " \t\n") {
			return bad("extra host %q is not NAME:ADDRESS", h)
		}
	}
	n := s.GetNetwork()
	for _, d := range slices.Concat(n.GetDnsServers(), n.GetDnsSearch(), n.GetDnsOptions()) {
		if strings.ContainsAny(d, " \t\n\r") {
			return bad("DNS setting %q", d)
		}
	}
	switch n.GetMode() {
	case "none", "host":
	case "", "routed":
		if r.o.Endpoint == nil {
			return bad("this runtime has no network; use mode none or host")
		}
	default:
		return bad("network mode %q (routed, none, host)", n.GetMode())
	}
	for _, m := range s.Mounts {
		if !path.IsAbs(m.Target) || path.Clean(m.Target) == "/" {
			return bad("mount target %q must be absolute and not /", m.Target)
		}
		if m.Type == v1.RuntimeMount_TYPE_BIND && !r.o.Metal {
			return bad("bind mount of %s: only with `isolation: metal`; use a volume", m.Source)
		}
	}
	for _, f := range s.Files {
		if !path.IsAbs(f.Target) || path.Clean(f.Target) == "/" {
			return bad("file target %q must be absolute", f.Target)
		}
	}
	return checkResources(s.Id, s.Resources)
}

// ociSpec translates a container into what runc reads.
func (r *Runtime) ociSpec(ctx context.Context, s *v1.RuntimeSpec, netns string) (*specs.Spec, error) {
	root := r.rootfs(s.Id)
	user, err := resolveUser(root, s.User, s.GroupAdd)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", s.Id, err)
	}
	sec, err := parseSecurity(s)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", s.Id, err)
	}
	caps, err := r.capabilities(s)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", s.Id, err)
	}
	p := &specs.Process{
		Terminal: s.Tty, Args: s.Args, Cwd: path.Clean("/" + s.Cwd), NoNewPrivileges: sec.noNewPrivs,
		User: user.User, Env: environment(s, nil, user.home, s.Tty),
		Capabilities: capSets(caps, user.UID),
		OOMScoreAdj:  r.oomScoreAdj(s), Rlimits: r.rlimits(s),
	}
	sp := &specs.Spec{
		Version: specs.Version, Process: p, Hostname: hostname(s), Domainname: s.Domainname,
		Root:  &specs.Root{Path: root, Readonly: s.ReadOnly},
		Linux: &specs.Linux{CgroupsPath: r.cgroupPath(s.Id), RootfsPropagation: "private"},
	}
	ns := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.IPCNamespace},
		{Type: specs.UTSNamespace}, {Type: specs.CgroupNamespace}}
	if s.GetNetwork().GetMode() != "host" {
		ns = append(ns, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns})
	}
	sp.Linux.Namespaces = ns
	if _, err := os.Stat("/proc/self/ns/cgroup"); err != nil {
		sp.Linux.Namespaces = slices.DeleteFunc(ns, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
	}
	if !s.Privileged && !sec.unmasked {
		sp.Linux.MaskedPaths = maskedPaths
		sp.Linux.ReadonlyPaths = readonlyPaths
	}
	sp.Linux.Sysctl = sysctls(s)
	if err := r.devices(sp, s); err != nil {
		return nil, err
	}
	sp.Linux.Resources.CPU, sp.Linux.Resources.Memory, sp.Linux.Resources.Pids = r.limits(s.Id, s.Resources)
	if err := r.mounts(ctx, sp, s); err != nil {
		return nil, err
	}
	if s.Init {
		sp.Mounts = append(sp.Mounts, specs.Mount{Destination: "/sbin/tandem-init", Type: "bind", Source: r.o.InitPath, Options: []string{"bind", "ro", "nosuid", "nodev"}})
		p.Args = append([]string{"/sbin/tandem-init", "--"}, p.Args...)
	}
	switch {
	case s.Privileged || sec.seccomp == "unconfined":
	case sec.seccomp != "":
		sp.Linux.Seccomp, err = seccomp.LoadProfile(sec.seccomp, sp)
	default:
		sp.Linux.Seccomp, err = seccomp.GetDefaultProfile(sp)
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: seccomp profile: %w: %w", s.Id, err, errdefs.ErrInvalidArgument)
	}
	return sp, nil
}

// writeBundle writes config.json.
func (r *Runtime) writeBundle(id string, sp *specs.Spec) error {
	b, err := json.Marshal(sp)
	if err == nil {
		err = replaceFile(filepath.Join(r.runDir(id), "config.json"), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("bundle of container %s: %w", id, err)
	}
	return nil
}

// environment merges: defaults, the container's, extra; the last one wins.
func environment(s *v1.RuntimeSpec, extra []string, home string, tty bool) []string {
	env := []string{defaultPath, "HOSTNAME=" + hostname(s)}
	if tty {
		env = append(env, "TERM=xterm")
	}
	env = append(append(env, s.Env...), extra...)
	at := map[string]int{}
	out := env[:0:0]
	for _, e := range env {
		k, _, _ := strings.Cut(e, "=")
		if i, ok := at[k]; ok {
			out[i] = e
			continue
		}
		at[k] = len(out)
		out = append(out, e)
	}
	if _, ok := at["HOME"]; !ok {
		out = append(out, "HOME="+home)
	}
	return out
}

type security struct {
	noNewPrivs bool
	unmasked   bool
	seccomp    string // "unconfined", a profile as JSON, or "" for the default
}

// parseSecurity reads Docker's --security-opt.
func parseSecurity(s *v1.RuntimeSpec) (security, error) {
	var sec security
	for _, o := range s.SecurityOpt {
		if err := secopt.Check(o); err != nil {
			return sec, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		switch name, value := secopt.Split(o); {
		case name == "no-new-privileges":
			sec.noNewPrivs = sec.noNewPrivs || value != "false"
		case name == "seccomp" && value != "" && value != "builtin":
			sec.seccomp = value
		case name == "systempaths":
			sec.unmasked = true
		}
	}
	return sec, nil
}

var maskedPaths = []string{
	"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
	"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
	"/sys/devices/virtual/powercap", "/sys/firmware",
}

var readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}

// sysctls are the user's and those that Docker sets in a network of its own.
func sysctls(s *v1.RuntimeSpec) map[string]string {
	m := map[string]string{}
	if mode := s.GetNetwork().GetMode(); mode != "host" {
		m["net.ipv4.ip_unprivileged_port_start"] = "0"
		m["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	for k, v := range s.Sysctls {
		m[k] = v
	}
	return m
}

// oomScoreAdj is the wanted value, or what this process may set.
func (r *Runtime) oomScoreAdj(s *v1.RuntimeSpec) *int {
	want := int(s.OomScoreAdj)
	if !slices.Contains(r.caps, "CAP_SYS_RESOURCE") {
		own := 0
		b, _ := os.ReadFile("/proc/self/oom_score_adj")
		if _, err := fmt.Sscan(string(b), &own); err == nil && want < own {
			if s.OomScoreAdj != 0 {
				r.log.Warn("oom_score_adj raised: this process lacks CAP_SYS_RESOURCE", "container", s.Id, "wanted", want, "set", own)
			}
			want = own
		}
	}
	return &want
}

var rlimitNames = map[string]int{
	"as": unix.RLIMIT_AS, "core": unix.RLIMIT_CORE, "cpu": unix.RLIMIT_CPU, "data": unix.RLIMIT_DATA,
	"fsize": unix.RLIMIT_FSIZE, "locks": unix.RLIMIT_LOCKS, "memlock": unix.RLIMIT_MEMLOCK, "msgqueue": unix.RLIMIT_MSGQUEUE,
	"nice": unix.RLIMIT_NICE, "nofile": unix.RLIMIT_NOFILE, "nproc": unix.RLIMIT_NPROC, "rss": unix.RLIMIT_RSS,
	"rtprio": unix.RLIMIT_RTPRIO, "rttime": unix.RLIMIT_RTTIME, "sigpending": unix.RLIMIT_SIGPENDING, "stack": unix.RLIMIT_STACK,
}

// rlimits are the user's. Without CAP_SYS_RESOURCE nothing goes above what this
// process has, and the first setting is final: soft and hard are made equal.
func (r *Runtime) rlimits(s *v1.RuntimeSpec) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, u := range s.Ulimits {
		res, ok := rlimitNames[u.Name]
		if !ok {
			r.log.Warn("unknown ulimit left out", "container", s.Id, "ulimit", u.Name)
			continue
		}
		soft, hard := uint64(u.Soft), uint64(u.Hard) // -1 is RLIM_INFINITY
		if u.Hard == 0 {
			hard = soft
		}
		soft = min(soft, hard)
		var own unix.Rlimit
		if !slices.Contains(r.caps, "CAP_SYS_RESOURCE") && unix.Getrlimit(res, &own) == nil && hard > own.Max {
			r.log.Warn("ulimit lowered: this process lacks CAP_SYS_RESOURCE", "container", s.Id, "ulimit", u.Name, "wanted", hard, "set", own.Max)
			hard = own.Max
			soft = min(soft, hard)
		}
		out = append(out, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: soft, Hard: hard})
	}
	return out
}
