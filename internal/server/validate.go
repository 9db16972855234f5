package server

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/durationpb"

	"tandem/api/policy"
	"tandem/api/secopt"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
)

// What a request may contain at most.
const (
	maxServices  = 1000
	maxReplicas  = 10000
	maxNetworks  = 100
	maxVolumes   = 1000
	maxList      = 4096
	maxEnv       = 128 << 10
	maxFile      = 1 << 20
	maxVolumeLen = 64 << 40 // bytes
	minMemory    = 6 << 20
)

var (
	projectName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)
	serviceName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)
	objectName  = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,126}$`)
	hostName    = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,62})$`)
	signalName  = regexp.MustCompile(`^[A-Za-z0-9+]{1,16}$`)
)

// problems collects everything that is wrong, so that it is said at once.
type problems struct {
	at   string
	list []string
}

func (p *problems) add(format string, args ...any) {
	if len(p.list) < 50 {
		p.list = append(p.list, p.at+fmt.Sprintf(format, args...))
	}
}

func (p *problems) err() error {
	switch len(p.list) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%s: %w", p.list[0], errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%d problems:\n  %s: %w", len(p.list), strings.Join(p.list, "\n  "), errdefs.ErrInvalidArgument)
}

func checkProjectName(n string) error {
	if !projectName.MatchString(n) {
		return fmt.Errorf("%q is no project name: lower case letters, digits, - and _ only, at most 63: %w", n, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (p *problems) count(what string, n, most int) {
	if n > most {
		p.add("%d %s, at most %d", n, what, most)
	}
}

func (p *problems) duration(what string, d *durationpb.Duration) {
	if d != nil && (d.CheckValid() != nil || d.AsDuration() < 0 || d.AsDuration() > 1000*time.Hour) {
		p.add("%s is out of range", what)
	}
}

// spec checks what a user asks of one container.
func (p *problems) spec(s *v1.ContainerSpec) {
	if s.GetImage() == "" || len(s.GetImage()) > 512 {
		p.add("an image is needed")
		if s == nil {
			return
		}
	}
	for what, n := range map[string]int{"environment variables": len(s.Env), "mounts": len(s.Mounts), "files": len(s.Files), "ports": len(s.Ports),
		"labels": len(s.Labels), "annotations": len(s.Annotations), "ulimits": len(s.Ulimits), "devices": len(s.Devices), "sysctls": len(s.Sysctls),
		"extra hosts": len(s.ExtraHosts), "capabilities": len(s.CapAdd) + len(s.CapDrop), "arguments": len(s.GetCommand().GetValues()) + len(s.GetEntrypoint().GetValues()),
		"dependencies": len(s.DependsOn), "groups": len(s.GroupAdd), "security options": len(s.SecurityOpt), "hosts": len(s.HostAffinity), "zones": len(s.ZoneAffinity)} {
		p.count(what, n, maxList)
	}
	for _, e := range s.Env {
		if k, _, _ := strings.Cut(e, "="); k == "" || strings.ContainsRune(e, 0) || len(e) > maxEnv {
			p.add("environment variable %.40q is malformed or too long", e)
		}
	}
	for _, o := range s.SecurityOpt[:min(len(s.SecurityOpt), maxList)] {
		if err := secopt.Check(o); err != nil {
			p.add("%v", err)
		}
	}
	if s.Hostname != "" && !hostName.MatchString(s.Hostname) {
		p.add("hostname %.80q is malformed", s.Hostname)
	}
	if s.WorkingDir != "" && !path.IsAbs(s.WorkingDir) {
		p.add("working directory %.80q is not absolute", s.WorkingDir)
	}
	if s.StopSignal != "" && !signalName.MatchString(s.StopSignal) {
		p.add("stop signal %.20q is malformed", s.StopSignal)
	}
	p.duration("stop_grace_period", s.StopGracePeriod)
	p.enums(s)
	p.mounts(s)
	p.resources(s.Resources)
	p.health(s.Healthcheck)
	p.network(s)
	for _, f := range s.Files {
		if !path.IsAbs(f.Target) || len(f.Target) > 4096 {
			p.add("file target %.80q is not absolute", f.Target)
		}
		if len(f.Content) > maxFile {
			p.add("file %s has %d bytes, at most %d", f.Target, len(f.Content), maxFile)
		}
	}
	for _, u := range s.Ulimits {
		if u.Name == "" || (u.Hard >= 0 && u.Soft > u.Hard) {
			p.add("ulimit %.20q: soft %d is above hard %d", u.Name, u.Soft, u.Hard)
		}
	}
}

func (p *problems) enums(s *v1.ContainerSpec) {
	if _, ok := v1.Isolation_name[int32(s.Isolation)]; !ok {
		p.add("isolation %d is not known", s.Isolation)
	}
	if _, ok := v1.WorkClass_name[int32(s.WorkClass)]; !ok {
		p.add("work class %d is not known", s.WorkClass)
	}
	if !slices.Contains([]string{"", "missing", "always", "never", "if_not_present"}, s.PullPolicy) {
		p.add("pull policy %.20q is not one of missing, always, never", s.PullPolicy)
	}
	if s.Pool != "" {
		if err := policy.PoolPath(s.Pool); err != nil {
			p.add("%v", err)
		}
	}
	p.restart(s.Restart, s.AutoRemove)
	for _, d := range s.DependsOn {
		if !slices.Contains([]string{"", control.Started, control.Healthy, control.Completed}, d.Condition) {
			p.add("condition %.40q of depends_on is not known", d.Condition)
		}
	}
}

func (p *problems) restart(r *v1.RestartPolicy, autoRemove bool) {
	switch r.GetName() {
	case "", "no":
	case "always", "unless-stopped", "on-failure":
		if autoRemove {
			p.add("a container that is removed at its end can't be restarted: choose one of both")
		}
	default:
		p.add("restart policy %.20q is not one of no, always, on-failure, unless-stopped", r.GetName())
	}
	if r.GetMaxRetries() < 0 {
		p.add("restart retries are negative")
	}
}

func (p *problems) mounts(s *v1.ContainerSpec) {
	seen := map[string]bool{}
	for _, m := range s.Mounts {
		t := path.Clean(m.Target)
		if !path.IsAbs(m.Target) || t == "/" || len(t) > 4096 {
			p.add("mount target %.80q is not an absolute path below /", m.Target)
			continue
		}
		if seen[t] {
			p.add("two mounts on %s", t)
		}
		seen[t] = true
		switch m.Type {
		case v1.Mount_TYPE_VOLUME:
			if m.Source != "" && !objectName.MatchString(m.Source) {
				p.add("volume name %.80q is malformed", m.Source)
			}
		case v1.Mount_TYPE_BIND:
			if s.Isolation != v1.Isolation_ISOLATION_METAL {
				p.add("%s: a path of the host (%s) can be mounted with isolation: metal only; use a named volume, or a config for files", t, m.Source)
			} else if !path.IsAbs(m.Source) {
				p.add("bind mount of %.80q: the source must be absolute", m.Source)
			}
		case v1.Mount_TYPE_TMPFS:
			if m.TmpfsSizeBytes < 0 {
				p.add("tmpfs on %s has a negative size", t)
			}
		default:
			p.add("mount on %s has no type", t)
		}
	}
}

func (p *problems) resources(r *v1.Resources) {
	if r == nil {
		return
	}
	for _, x := range []struct {
		what               string
		reservation, limit int64
		most               int64
	}{{"cpu", r.CpuMilliReservation, r.CpuMilliLimit, 1 << 30}, {"memory", r.MemoryBytesReservation, r.MemoryBytesLimit, 1 << 50}} {
		if x.reservation < 0 || x.limit < 0 || x.reservation > x.most || x.limit > x.most {
			p.add("%s reservation or limit is out of range", x.what)
		} else if x.limit > 0 && x.reservation > x.limit {
			p.add("%s reservation (%d) is above the limit (%d)", x.what, x.reservation, x.limit)
		}
	}
	if r.MemoryBytesLimit > 0 && r.MemoryBytesLimit < minMemory {
		p.add("memory limit of %d bytes is below %d MiB", r.MemoryBytesLimit, minMemory>>20)
	}
	if r.CpuShares < 0 || r.PidsLimit < -1 || r.MemorySwapBytes < -1 {
		p.add("cpu shares, pids limit or swap limit is out of range")
	}
}

func (p *problems) health(h *v1.HealthCheck) {
	if h == nil {
		return
	}
	if len(h.Test) > 0 && !slices.Contains([]string{"NONE", "CMD", "CMD-SHELL"}, h.Test[0]) {
		p.add("health check must begin with NONE, CMD or CMD-SHELL, not %.20q", h.Test[0])
	} else if len(h.Test) == 1 && h.Test[0] != "NONE" {
		p.add("health check without a command")
	}
	for what, d := range map[string]*durationpb.Duration{"interval": h.Interval, "timeout": h.Timeout, "start period": h.StartPeriod, "start interval": h.StartInterval} {
		p.duration("health check's "+what, d)
	}
	if h.Retries < 0 || h.Retries > 10000 {
		p.add("health check's retries are out of range")
	}
}

func (p *problems) network(s *v1.ContainerSpec) {
	switch s.NetworkMode {
	case "", "none":
	case "host":
		if s.Isolation != v1.Isolation_ISOLATION_METAL {
			p.add("network_mode: host needs isolation: metal")
		}
	default:
		p.add("network_mode %.40q is not one of none, host", s.NetworkMode)
	}
	if s.NetworkMode != "" && (len(s.Networks) > 0 || (len(s.Ports) > 0 && s.NetworkMode == "none")) {
		p.add("network_mode: %s goes with no networks and no ports", s.NetworkMode)
	}
	p.count("networks", len(s.Networks), maxNetworks)
	seen := map[string]bool{}
	for _, n := range s.Networks {
		if seen[n.Network] || !objectName.MatchString(n.Network) {
			p.add("network %.80q is malformed or there twice", n.Network)
		}
		seen[n.Network] = true
		p.count("aliases", len(n.Aliases), 100)
		for _, a := range n.Aliases {
			if !objectName.MatchString(a) {
				p.add("alias %.80q is malformed", a)
			}
		}
		if n.Ipv4 != "" {
			if a, err := netip.ParseAddr(n.Ipv4); err != nil || !a.Is4() {
				p.add("address %.40q is not an IPv4 address", n.Ipv4)
			}
		}
	}
	for _, m := range s.Ports {
		if m.ContainerPort == 0 || m.ContainerPort > 65535 || m.HostPort > 65535 {
			p.add("port %d:%d is out of range", m.HostPort, m.ContainerPort)
		}
		if pr := control.Protocol(m); pr != "tcp" && pr != "udp" {
			p.add("protocol %.10q is not tcp or udp", pr)
		}
		if m.HostIp != "" {
			if _, err := netip.ParseAddr(m.HostIp); err != nil {
				p.add("published on %.40q, which is no address", m.HostIp)
			}
		}
	}
}
