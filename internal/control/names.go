package control

import (
	"cmp"
	"slices"

	v1 "tandem/api/tandem/v1"
)

// nameRecords lists what resolves in each network: services, containers, their
// aliases and short ids, each also with ".project". A service's name gives the
// addresses of its running containers; while none runs, of all that are placed,
// so that who starts before it finds the name.
func nameRecords(cs []*v1.Container, networks map[string]string) []*v1.NameRecord {
	type key struct{ network, name string }
	type addrs struct{ running, all []string }
	m := map[key]*addrs{}
	for _, c := range cs {
		if c.Meta.Deleting || c.Stopped {
			continue
		}
		state := c.GetStatus().GetState()
		running := state == v1.ContainerState_CONTAINER_STATE_RUNNING || state == v1.ContainerState_CONTAINER_STATE_PAUSED
		for _, n := range attachments(c) {
			id := networks[c.Meta.Project+"/"+n]
			ip := addressIn(c, id)
			if id == "" || ip == "" {
				continue
			}
			own := finalName(c)
			names := []string{own, own + "." + c.Meta.Project, c.Meta.Id[:min(12, len(c.Meta.Id))]}
			if c.Service != "" && !c.OneOff {
				names = append(names, c.Service, c.Service+"."+c.Meta.Project)
			}
			if h := c.GetSpec().GetHostname(); h != "" {
				names = append(names, h)
			}
			for _, a := range c.GetSpec().GetNetworks() {
				if a.Network == n {
					names = append(names, a.Aliases...)
				}
			}
			for _, name := range names {
				k := key{id, dnsName(name)}
				if m[k] == nil {
					m[k] = &addrs{}
				}
				m[k].all = append(m[k].all, ip)
				if running {
					m[k].running = append(m[k].running, ip)
				}
			}
		}
	}
	out := make([]*v1.NameRecord, 0, len(m))
	for k, a := range m {
		ips := a.running
		if len(ips) == 0 {
			ips = a.all
		}
		slices.Sort(ips)
		out = append(out, &v1.NameRecord{Network: k.network, Name: k.name, Ips: slices.Compact(ips)})
	}
	slices.SortFunc(out, func(a, b *v1.NameRecord) int {
		return cmp.Or(cmp.Compare(a.Network, b.Network), cmp.Compare(a.Name, b.Name))
	})
	return out
}
