package compose

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	"google.golang.org/protobuf/types/known/durationpb"

	"tandem/api/scaling"
	"tandem/api/secopt"
	v1 "tandem/api/tandem/v1"
)

// converter makes the request out of a loaded project.
type converter struct {
	*report
	project  *types.Project
	defaults placing
}

func (c *converter) convert() *v1.ApplyProjectRequest {
	p := c.project
	c.defaults = c.projectPolicy(at{c.report, "x-tandem"}, p.Extensions[extension])
	req := &v1.ApplyProjectRequest{Project: p.Name, WorkingDir: p.WorkingDir, ConfigFiles: p.ComposeFiles}
	for _, name := range sortedKeys(p.Services) {
		s := p.Services[name]
		req.Services = append(req.Services, c.service(at{c.report, "services." + name}, &s))
	}
	c.checkCompany(req.Services)
	for _, name := range sortedKeys(p.Networks) {
		n := p.Networks[name]
		req.Networks = append(req.Networks, c.network(at{c.report, "networks." + name}, name, &n))
	}
	for _, name := range sortedKeys(p.Volumes) {
		v := p.Volumes[name]
		req.Volumes = append(req.Volumes, c.volume(at{c.report, "volumes." + name}, name, &v))
	}
	return req
}

func (c *converter) service(a at, s *types.ServiceConfig) *v1.ServiceSpec {
	pol := c.servicePolicy(a.in(extension), s.Extensions[extension])
	t := &v1.ContainerSpec{
		Image:        s.Image,
		User:         s.User,
		WorkingDir:   s.WorkingDir,
		Hostname:     s.Hostname,
		Domainname:   s.DomainName,
		Tty:          s.Tty,
		StdinOpen:    s.StdinOpen,
		ReadOnly:     s.ReadOnly,
		Privileged:   s.Privileged,
		CapAdd:       s.CapAdd,
		CapDrop:      s.CapDrop,
		Sysctls:      s.Sysctls,
		Labels:       s.Labels,
		Annotations:  s.Annotations,
		Dns:          s.DNS,
		DnsSearch:    s.DNSSearch,
		GroupAdd:     s.GroupAdd,
		StopSignal:   s.StopSignal,
		ShmSizeBytes: c.bytes(a.in("shm_size"), s.ShmSize),
		Platform:     s.Platform,
		Isolation:    pol.isolation,
		WorkClass:    pol.class,
		Pool:         pol.pool,
		Env:          environment(s.Environment),

		OomKillDisable: s.OomKillDisable,
	}
	if s.Image == "" && s.Build == nil { // with build alone, the walker has said it
		a.in("image").bad("name an image")
	}
	if s.Command != nil {
		t.Command = &v1.StringList{Values: s.Command}
	}
	if s.Entrypoint != nil {
		t.Entrypoint = &v1.StringList{Values: s.Entrypoint}
	}
	if s.Init != nil {
		t.Init = *s.Init
	}
	if s.StopGracePeriod != nil {
		t.StopGracePeriod = c.duration(a.in("stop_grace_period"), *s.StopGracePeriod)
	}
	if n := s.OomScoreAdj; n < -1000 || n > 1000 {
		a.in("oom_score_adj").bad("must be between -1000 and 1000")
	} else {
		t.OomScoreAdj = int32(n)
	}
	c.namespaces(a, s)
	t.PullPolicy = c.pullPolicy(a.in("pull_policy"), s.PullPolicy)
	t.SecurityOpt = c.security(a.in("security_opt"), s.SecurityOpt)
	t.Resources = c.resources(a, s)
	t.Restart = c.restart(a, s)
	t.Healthcheck = c.health(a.in("healthcheck"), s.HealthCheck)
	t.Mounts = c.mounts(a, s, pol.isolation)
	t.Files = c.files(a, s)
	t.Ulimits = c.ulimits(s)
	t.Devices = c.devices(a.in("devices"), s.Devices, pol.isolation)
	t.Log = c.logging(a.in("logging"), s.Logging)
	t.ExtraHosts = c.extraHosts(a.in("extra_hosts"), s.ExtraHosts)
	t.Ports = c.ports(a.in("ports"), s.Ports)
	t.DependsOn = c.dependencies(a.in("depends_on"), s.DependsOn)
	c.links(a.in("links"), s.Links)
	for _, ip := range s.DNS {
		if _, err := netip.ParseAddr(ip); err != nil {
			a.in("dns").bad("%q is not an address", ip)
		}
	}

	spec := &v1.ServiceSpec{
		Name:          s.Name,
		Template:      t,
		Replicas:      c.replicas(a, s, pol.scale),
		Scale:         pol.scale,
		Spread:        pol.spread,
		Uncovered:     !pol.ha,
		Company:       pol.company,
		ContainerName: s.ContainerName,
		Profiles:      s.Profiles,
	}
	c.attach(a, s, t, spec.Replicas)
	if s.Deploy != nil {
		c.deploy(a.in("deploy"), s.Deploy, spec)
	}
	for _, what := range scaling.Check(spec) {
		a.in(extension+".scale").bad("%s", what)
	}
	return spec
}

// environment is sorted; names without a value were not set and are left out.
func environment(m types.MappingWithEquals) []string {
	var env []string
	for _, k := range sortedKeys(m) {
		if v := m[k]; v != nil {
			env = append(env, k+"="+*v)
		}
	}
	return env
}

func (c *converter) duration(a at, d types.Duration) *durationpb.Duration {
	if d < 0 || time.Duration(d) > 365*24*time.Hour {
		a.bad("must be between 0 and a year")
		return nil
	}
	return durationpb.New(time.Duration(d))
}

func (c *converter) replicas(a at, s *types.ServiceConfig, scale *v1.ScalePolicy) int32 {
	n := s.GetScale()
	explicit := s.Scale != nil || s.Deploy != nil && s.Deploy.Replicas != nil
	if n > maxReplicas {
		a.in("deploy.replicas").bad("%d is more than %d", n, maxReplicas)
		return 0
	}
	if scale != nil {
		if !explicit {
			n = int(max(scale.Min, 1))
		}
	}
	return int32(n)
}

// namespaces: only what a container has anyway.
func (c *converter) namespaces(a at, s *types.ServiceConfig) {
	only := func(field, value, why string, allowed ...string) {
		if value != "" && !slices.Contains(allowed, value) {
			a.in(field).bad("%q is not supported: %s", value, why)
		}
	}
	only("ipc", s.Ipc, "every container has an IPC namespace of its own (private)", "private")
	only("cgroup", s.Cgroup, "every container has a cgroup namespace of its own (private)", "private")
	only("userns_mode", s.UserNSMode, "there are no user namespaces (host)", "host")
	only("runtime", s.Runtime, "containers run with runc", "runc", "io.containerd.runc.v2")
	only("isolation", s.Isolation, "it is for Windows; see x-tandem.isolation", "default")
}

func (c *converter) pullPolicy(a at, p string) string {
	switch p {
	case "", types.PullPolicyMissing, types.PullPolicyIfNotPresent:
		return "missing"
	case types.PullPolicyAlways, types.PullPolicyNever:
		return p
	case types.PullPolicyBuild:
		a.bad("images can't be built yet; use missing, always or never")
	default:
		a.bad("%q is not supported; use missing, always or never", p)
	}
	return ""
}

func (c *converter) security(a at, list []string) []string {
	var out []string
	for _, o := range list {
		k, v := secopt.Split(o)
		switch {
		case k == "no-new-privileges" && (v == "" || v == "true"):
			out = append(out, "no-new-privileges")
		case k == "no-new-privileges" && v == "false":
		case k == "seccomp" && v == "unconfined":
			out = append(out, "seccomp=unconfined")
		case k == "seccomp" && v == "builtin":
		case k == "seccomp" && v != "" && !strings.HasPrefix(v, "{"):
			loaded, err := secopt.Load(o, func(p string) (string, error) { return c.project.RelativePath(p), nil })
			if err != nil {
				a.bad("%v", err)
				continue
			}
			out = append(out, loaded)
		case k == "apparmor" && v == "unconfined", k == "label" && v == "disable":
			a.note("%q changes nothing: that security module is not used", o)
		default:
			a.bad("%q is not supported; use no-new-privileges, seccomp=unconfined or seccomp=FILE", o)
		}
	}
	return out
}

func (c *converter) restart(a at, s *types.ServiceConfig) *v1.RestartPolicy {
	r := &v1.RestartPolicy{}
	if s.Restart != "" {
		name, count, counted := strings.Cut(s.Restart, ":")
		switch name {
		case "no", "always", "on-failure", "unless-stopped":
			r.Name = name
		default:
			a.in("restart").bad("%q is not one of no, always, on-failure[:N], unless-stopped", s.Restart)
		}
		if counted {
			n, err := strconv.ParseInt(count, 10, 32)
			if err != nil || n < 0 || name != "on-failure" {
				a.in("restart").bad("%q: only on-failure takes a number of attempts", s.Restart)
			}
			r.MaxRetries = int32(n)
		}
		if s.Deploy != nil && s.Deploy.RestartPolicy != nil {
			a.in("deploy.restart_policy").note("has no effect: restart (%s) comes first", s.Restart)
		}
		return r
	}
	if s.Deploy == nil || s.Deploy.RestartPolicy == nil {
		return nil
	}
	p, b := s.Deploy.RestartPolicy, a.in("deploy.restart_policy")
	switch p.Condition {
	case "none":
		r.Name = "no"
	case "on-failure":
		r.Name = "on-failure"
	case "", "any":
		r.Name = "always"
	case "unless-stopped":
		r.Name = "unless-stopped"
	default:
		b.in("condition").bad("%q is not one of none, on-failure, any", p.Condition)
	}
	if p.MaxAttempts != nil {
		switch {
		case *p.MaxAttempts > math.MaxInt32:
			b.in("max_attempts").bad("is too large")
		case r.Name != "on-failure":
			b.in("max_attempts").bad("is supported with condition on-failure only")
		default:
			r.MaxRetries = int32(*p.MaxAttempts)
		}
	}
	return r
}

func (c *converter) health(a at, h *types.HealthCheckConfig) *v1.HealthCheck {
	if h == nil {
		return nil
	}
	if h.Disable {
		return &v1.HealthCheck{Test: []string{"NONE"}}
	}
	out := &v1.HealthCheck{Test: h.Test}
	if len(h.Test) == 1 && h.Test[0] != "NONE" {
		a.in("test").bad("%s needs a command", h.Test[0])
	}
	set := func(field string, d *types.Duration) *durationpb.Duration {
		if d == nil {
			return nil
		}
		return c.duration(a.in(field), *d)
	}
	out.Interval = set("interval", h.Interval)
	out.Timeout = set("timeout", h.Timeout)
	out.StartPeriod = set("start_period", h.StartPeriod)
	out.StartInterval = set("start_interval", h.StartInterval)
	if h.Retries != nil {
		if *h.Retries > math.MaxInt32 {
			a.in("retries").bad("is too large")
		} else {
			out.Retries = int32(*h.Retries)
		}
	}
	return out
}

func (c *converter) dependencies(a at, deps types.DependsOnConfig) []*v1.Dependency {
	var out []*v1.Dependency
	for _, name := range sortedKeys(deps) {
		d := deps[name]
		if _, active := c.project.Services[name]; !active {
			continue // not required, and its profile is not active
		}
		condition := d.Condition
		if condition == "" {
			condition = types.ServiceConditionStarted
		}
		switch condition {
		case types.ServiceConditionStarted, types.ServiceConditionHealthy, types.ServiceConditionCompletedSuccessfully:
		default:
			a.in(name).bad("condition %q is not known", d.Condition)
		}
		out = append(out, &v1.Dependency{Service: name, Condition: condition, Required: d.Required, Restart: d.Restart})
	}
	return out
}

func (c *converter) links(a at, links []string) {
	for _, l := range links {
		if name, alias, ok := strings.Cut(l, ":"); ok && alias != name {
			a.bad("%q: aliases of links are not supported; give %s a network alias", l, name)
		}
	}
}

func (c *converter) deploy(a at, d *types.DeployConfig, spec *v1.ServiceSpec) {
	spec.Labels = d.Labels
	if d.Mode != "" && d.Mode != "replicated" {
		a.in("mode").bad("%q is not supported: only replicated", d.Mode)
	}
	for _, con := range d.Placement.Constraints {
		k, v, ok := strings.Cut(con, "==")
		k, v = strings.TrimSpace(k), strings.TrimSpace(v)
		switch {
		case ok && k == "node.hostname" && v != "":
			spec.Template.HostAffinity = append(spec.Template.HostAffinity, v)
		case ok && k == "node.labels.zone" && v != "":
			spec.Template.ZoneAffinity = append(spec.Template.ZoneAffinity, v)
		default:
			a.in("placement.constraints").bad("%q is not supported: only node.hostname == HOST and node.labels.zone == ZONE", con)
		}
	}
	if len(spec.Template.ZoneAffinity) > 1 {
		a.in("placement.constraints").bad("no host can be in all of these zones: %s", strings.Join(spec.Template.ZoneAffinity, ", "))
	}
	if len(spec.Template.HostAffinity) > 1 {
		a.in("placement.constraints").bad("no host can have all of these names: %s", strings.Join(spec.Template.HostAffinity, ", "))
	}
	if n := d.Placement.MaxReplicas; n > maxReplicas {
		a.in("placement.max_replicas_per_node").bad("%d is more than %d", n, maxReplicas)
	} else if n > 0 {
		spec.Company = append(spec.Company, &v1.CompanyRule{Service: spec.Name, Layer: "host", AtMost: int32(n - 1)})
	}
	u := d.UpdateConfig
	if u == nil {
		return
	}
	switch u.Order {
	case "", "stop-first", "start-first":
		spec.UpdateOrder = u.Order
	default:
		a.in("update_config.order").bad("%q is not one of stop-first, start-first", u.Order)
	}
	if u.Parallelism != nil {
		n := *u.Parallelism
		if n == 0 { // all at once
			n = uint64(max(1, spec.Replicas))
		}
		spec.UpdateParallelism = int32(min(n, maxReplicas))
	}
}
