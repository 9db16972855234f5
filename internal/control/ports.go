package control

import (
	"cmp"
	"slices"

	v1 "tandem/api/tandem/v1"
)

// publishedPorts lists every published port with the containers behind it.
// Containers that publish the same port share it: traffic is balanced over the
// ready ones.
func publishedPorts(cs []*v1.Container) []*v1.PublishedPort {
	type key struct {
		proto, ip string
		port      uint32
	}
	m := map[key]*v1.PublishedPort{}
	for _, c := range cs {
		a := c.GetAssignment()
		if a.GetIp() == "" || c.Meta.Deleting || c.Stopped {
			continue
		}
		for _, p := range a.Ports {
			if p.HostPort == 0 {
				continue
			}
			k := key{Protocol(p), p.HostIp, p.HostPort}
			if m[k] == nil {
				m[k] = &v1.PublishedPort{Protocol: k.proto, HostIp: k.ip, HostPort: k.port}
			}
			m[k].Backends = append(m[k].Backends, &v1.Backend{Ip: a.Ip, Port: p.ContainerPort, ContainerId: c.Meta.Id, Ready: Ready(c)})
		}
	}
	out := make([]*v1.PublishedPort, 0, len(m))
	for _, p := range m {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *v1.PublishedPort) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.HostIp, b.HostIp))
	})
	return out
}

// Protocol of a port mapping, "tcp" unless it says so.
func Protocol(p *v1.PortMapping) string { return cmp.Or(p.GetProtocol(), "tcp") }

// The ports that are chosen when none is asked for: beyond the kernel's own.
const (
	firstPort = 49153
	lastPort  = 65535
)

type portKey struct {
	proto string
	port  uint32
}

// choosePorts fills in host ports that are left to the server. taken is updated.
func choosePorts(ports []*v1.PortMapping, taken map[portKey]bool) []*v1.PortMapping {
	var out []*v1.PortMapping
	for _, p := range ports {
		p = clone(p)
		p.Protocol = Protocol(p)
		for n := uint32(firstPort); p.HostPort == 0 && n <= lastPort; n++ {
			if !taken[portKey{p.Protocol, n}] {
				p.HostPort = n
			}
		}
		taken[portKey{p.Protocol, p.HostPort}] = true
		out = append(out, p)
	}
	return out
}

func takenPorts(cs []*v1.Container) map[portKey]bool {
	m := map[portKey]bool{}
	for _, c := range cs {
		for _, p := range c.GetSpec().GetPorts() {
			m[portKey{Protocol(p), p.HostPort}] = true
		}
		for _, p := range c.GetAssignment().GetPorts() {
			m[portKey{Protocol(p), p.HostPort}] = true
		}
	}
	delete(m, portKey{"tcp", 0})
	delete(m, portKey{"udp", 0})
	return m
}
