package compose

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	v1 "tandem/api/tandem/v1"
)

// attach sets the network mode or the networks of a service.
func (c *converter) attach(a at, s *types.ServiceConfig, t *v1.ContainerSpec, replicas int32) {
	switch mode := s.NetworkMode; mode {
	case "":
	case "none":
		t.NetworkMode = "none"
	case "host":
		t.NetworkMode = "host"
		if t.Isolation != v1.Isolation_ISOLATION_METAL {
			a.in("network_mode").bad("host is the network of the host: it needs x-tandem.isolation: metal")
		}
		if len(t.Ports) > 0 {
			a.in("ports").note("has no effect with network_mode host")
			t.Ports = nil
		}
	default:
		a.in("network_mode").bad("%q is not supported; use none, or host with x-tandem.isolation: metal", mode)
	}
	if t.NetworkMode == "none" && len(t.Ports) > 0 {
		a.in("ports").bad("there is nothing to publish with network_mode none")
	}
	if s.NetworkMode != "" {
		return
	}
	for _, name := range networkOrder(s.Networks) {
		n := &v1.NetworkAttachment{Network: name}
		if cfg, b := s.Networks[name], a.in("networks."+name); cfg != nil {
			n.Aliases = cfg.Aliases
			if !cfg.ServiceNameAliasEnabled() {
				b.in("use_service_name_alias").bad("names of services always resolve")
			}
			if ip := cfg.Ipv4Address; ip != "" {
				if p, err := netip.ParseAddr(ip); err != nil || !p.Is4() {
					b.in("ipv4_address").bad("%q is not an IPv4 address", ip)
				} else if replicas > 1 {
					b.in("ipv4_address").bad("a fixed address goes with one replica, not %d", replicas)
				}
				n.Ipv4 = ip
			}
		}
		t.Networks = append(t.Networks, n)
	}
}

// networkOrder sorts the networks of a service: by gw_priority, then by priority, the
// highest first, then by name. Compose files have no order of their own here.
func networkOrder(nets map[string]*types.ServiceNetworkConfig) []string {
	names := sortedKeys(nets)
	slices.SortStableFunc(names, func(x, y string) int {
		a, b := nets[x], nets[y]
		if a == nil {
			a = &types.ServiceNetworkConfig{}
		}
		if b == nil {
			b = &types.ServiceNetworkConfig{}
		}
		return cmp.Or(cmp.Compare(b.GatewayPriority, a.GatewayPriority), cmp.Compare(b.Priority, a.Priority))
	})
	return names
}

func (c *converter) network(a at, name string, n *types.NetworkConfig) *v1.NetworkRequest {
	out := &v1.NetworkRequest{Name: name, Internal: n.Internal, Labels: n.Labels}
	if n.External {
		a.in("external").bad("networks belong to their project; external ones are not supported yet")
	} else if n.Name != "" && n.Name != c.project.Name+"_"+name {
		a.in("name").note("has no effect: networks are named within their project; this one is %s", name)
	}
	switch n.Driver {
	case "", "default", "bridge", "overlay":
	default:
		a.in("driver").bad("%q is not supported; leave it out", n.Driver)
	}
	if n.EnableIPv4 != nil && !*n.EnableIPv4 {
		a.in("enable_ipv4").bad("every network has IPv4")
	}
	if n.EnableIPv6 != nil && *n.EnableIPv6 {
		a.in("enable_ipv6").bad("IPv6 is not supported yet")
	}
	ipam := a.in("ipam")
	if d := n.Ipam.Driver; d != "" && d != "default" {
		ipam.in("driver").bad("%q is not supported; leave it out", d)
	}
	if len(n.Ipam.Config) > 1 {
		ipam.in("config").bad("one subnet per network is supported")
	}
	for _, pool := range n.Ipam.Config {
		if pool == nil || pool.Subnet == "" {
			continue
		}
		p, err := netip.ParsePrefix(pool.Subnet)
		if err != nil || !p.Addr().Is4() || p.Bits() < 8 || p.Bits() > 28 {
			ipam.in("config.subnet").bad("%q is not an IPv4 subnet between /8 and /28", pool.Subnet)
			continue
		}
		out.Cidr = p.Masked().String()
	}
	return out
}

func (c *converter) ports(a at, list []types.ServicePortConfig) []*v1.PortMapping {
	var out []*v1.PortMapping
	for _, p := range list {
		m := &v1.PortMapping{ContainerPort: p.Target, Protocol: strings.ToLower(p.Protocol), HostIp: p.HostIP}
		if m.Protocol == "" {
			m.Protocol = "tcp"
		}
		if m.Protocol != "tcp" && m.Protocol != "udp" {
			a.bad("protocol %q is not supported; use tcp or udp", p.Protocol)
		}
		if p.Target == 0 || p.Target > 65535 {
			a.bad("container port %d is not between 1 and 65535", p.Target)
		}
		if p.HostIP != "" {
			if _, err := netip.ParseAddr(p.HostIP); err != nil {
				a.bad("host address %q is not an IP address", p.HostIP)
			}
		}
		switch p.Mode {
		case "", "ingress":
		case "host":
			a.note("mode host of port %d has no effect: ports are published on every host", p.Target)
		default:
			a.bad("mode %q is not supported", p.Mode)
		}
		if p.Published != "" {
			n, err := strconv.ParseUint(p.Published, 10, 16)
			if err != nil {
				a.bad("published port %q is not one port; a free one of a range can't be picked, leave it out to have any", p.Published)
			}
			m.HostPort = uint32(n)
		}
		out = append(out, m)
	}
	return out
}

func (c *converter) extraHosts(a at, hosts types.HostsList) []string {
	var out []string
	for _, name := range sortedKeys(hosts) {
		for _, ip := range hosts[name] {
			if _, err := netip.ParseAddr(ip); err != nil {
				a.bad("%s=%s: %q is not an IP address", name, ip, ip)
				continue
			}
			out = append(out, name+":"+ip)
		}
	}
	return out
}
