package agent

import (
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// complement adds to an incomplete intent all that the one before had and that is
// not in it: a server that can't read a record does not know what it stands for,
// so it stays as it was, with its addresses, ports and names. Volumes that are
// named as deleted are not brought back.
func complement(spec, old *v1.HostSpec) {
	var ids = map[string]bool{}
	for _, m := range spec.Machines {
		ids["m "+m.Id] = true
	}
	for _, c := range spec.Containers {
		ids["c "+c.Id] = true
	}
	for _, v := range spec.Volumes {
		ids["v "+v.Id] = true
	}
	for _, id := range spec.DeletedVolumes {
		ids["v "+id] = true
	}
	for _, n := range spec.Networks {
		ids["n "+n.Id] = true
	}
	for _, m := range old.GetMachines() {
		if !ids["m "+m.Id] {
			spec.Machines = append(spec.Machines, m)
		}
	}
	for _, v := range old.GetVolumes() {
		if !ids["v "+v.Id] {
			spec.Volumes = append(spec.Volumes, v)
		}
	}
	for _, n := range old.GetNetworks() {
		if !ids["n "+n.Id] {
			spec.Networks = append(spec.Networks, n)
		}
	}
	kept, addresses := map[string]bool{}, map[string]bool{}
	for _, c := range old.GetContainers() {
		if !ids["c "+c.Id] {
			spec.Containers = append(spec.Containers, c)
			kept[c.Id], addresses[c.Ip] = true, c.Ip != ""
			for _, x := range c.Addresses {
				addresses[x.Ip] = true
			}
		}
	}
	keepPorts(spec, old, kept)
	keepNames(spec, old, addresses)
}

// keepPorts keeps the published ports of kept containers.
func keepPorts(spec, old *v1.HostSpec, kept map[string]bool) {
	type key struct {
		protocol, ip string
		port         uint32
	}
	have := map[key]*v1.PublishedPort{}
	of := func(p *v1.PublishedPort) key { return key{p.Protocol, p.HostIp, p.HostPort} }
	for _, p := range spec.Ports {
		have[of(p)] = p
	}
	for _, p := range old.GetPorts() {
		var backends []*v1.Backend
		for _, b := range p.Backends {
			if kept[b.ContainerId] {
				backends = append(backends, b)
			}
		}
		if len(backends) == 0 {
			continue
		}
		if now := have[of(p)]; now != nil {
			now.Backends = append(now.Backends, backends...)
			continue
		}
		p = proto.CloneOf(p)
		p.Backends = backends
		spec.Ports = append(spec.Ports, p)
	}
}

// keepNames keeps the names of kept containers' addresses.
func keepNames(spec, old *v1.HostSpec, kept map[string]bool) {
	type key struct{ network, name string }
	have := map[key]*v1.NameRecord{}
	for _, r := range spec.Names {
		have[key{r.Network, r.Name}] = r
	}
	for _, r := range old.GetNames() {
		var ips []string
		for _, ip := range r.Ips {
			if kept[ip] {
				ips = append(ips, ip)
			}
		}
		if len(ips) == 0 {
			continue
		}
		if now := have[key{r.Network, r.Name}]; now != nil {
			now.Ips = append(now.Ips, ips...)
			continue
		}
		r = proto.CloneOf(r)
		r.Ips = ips
		spec.Names = append(spec.Names, r)
	}
}
