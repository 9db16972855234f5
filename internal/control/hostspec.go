package control

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// hostSpec is all that one host shall run, from one snapshot. What is to go is
// simply not in it; only data must be named to be removed. While a record can't be
// read the spec is incomplete, and the agent removes nothing.
func hostSpec(snap *store.Snapshot, hostID, clusterID string) *v1.HostSpec {
	spec := &v1.HostSpec{Revision: snap.Revision, ClusterId: clusterID,
		Incomplete: snap.Unreadable(store.Machines, store.Containers, store.Volumes, store.Networks)}
	machines := map[string]bool{}
	for _, m := range snap.Machines {
		if m.HostId != hostID || m.Meta.Deleting {
			continue
		}
		machines[m.Meta.Id] = true
		spec.Machines = append(spec.Machines, &v1.MachineAssignment{
			Id: m.Meta.Id, Name: m.Meta.Name, Project: m.Meta.Project, Isolation: m.Isolation, Size: m.Size, Ceiling: m.Ceiling,
			Stopped: m.Stopped, Generation: m.Meta.Generation, RestartGeneration: m.RestartGeneration, Mac: m.Mac, Prefixes: m.Prefixes,
		})
	}
	volumes := map[string]*v1.Volume{}
	for _, v := range snap.Volumes {
		volumes[v.Meta.Project+"/"+v.Meta.Name] = v
		switch {
		case v.HostId != hostID:
		case v.Meta.Deleting:
			spec.DeletedVolumes = append(spec.DeletedVolumes, v.Meta.Id)
		default:
			spec.Volumes = append(spec.Volumes, &v1.VolumeAssignment{Id: v.Meta.Id, Name: v.Meta.Name, Project: v.Meta.Project, SizeBytes: v.SizeBytes})
		}
	}
	services := map[svcKey]*v1.Service{}
	for _, s := range snap.Services {
		services[svcKey{s.Meta.Project, s.Meta.Name}] = s
	}
	live := active(snap.Containers)
	groups, queue := byService(live), waitsItsTurn(snap.Containers)
	used := map[string]bool{}
	for _, c := range snap.Containers {
		a := c.GetAssignment()
		if a.GetHostId() == hostID && c.Meta.Deleting && c.StopTimeout != nil {
			spec.Leaving = append(spec.Leaving, &v1.LeavingContainer{Id: c.Meta.Id, StopTimeout: c.StopTimeout})
		}
		if a.GetHostId() != hostID || c.Meta.Deleting || (a.MachineId != "" && !machines[a.MachineId]) {
			continue
		}
		for _, x := range addresses(c) {
			used[x.NetworkId] = true
		}
		x := &v1.ContainerAssignment{
			Id: c.Meta.Id, Name: finalName(c), Project: c.Meta.Project, Service: c.Service, MachineId: a.MachineId, Spec: c.Spec,
			Ip: a.Ip, Network: a.NetworkId, Addresses: a.Addresses, Stopped: c.Stopped || c.GivesWayTo != "", Paused: c.Paused, Generation: c.Meta.Generation,
			RestartGeneration: c.RestartGeneration, StopTimeout: c.StopTimeout,
			Hold: !c.Stopped && (queue[c.Meta.Id] || waitsFor(c, services, groups) != ""),
		}
		if x.StopTimeout == nil {
			x.StopTimeout = c.GetSpec().GetStopGracePeriod()
		}
		for _, m := range c.GetSpec().GetMounts() {
			if v := volumes[c.Meta.Project+"/"+m.Source]; m.Type == v1.Mount_TYPE_VOLUME && m.Source != "" && v != nil {
				x.Volumes = append(x.Volumes, &v1.AssignedMount{Target: m.Target, VolumeId: v.Meta.Id, ReadOnly: m.ReadOnly})
			}
		}
		spec.Containers = append(spec.Containers, x)
	}
	ids := networkIDs(snap.Networks)
	allow := bridged(snap.Containers, ids)
	for _, n := range snap.Networks {
		if used[n.Meta.Id] {
			spec.Networks = append(spec.Networks, &v1.NetworkSpec{Id: n.Meta.Id, Project: n.Meta.Project, Name: n.Meta.Name, Cidr: n.Cidr,
				Mtu: n.Mtu, Internal: n.Internal, Allow: allow[n.Meta.Id]})
		}
	}
	spec.Ports = publishedPorts(live)
	for _, r := range nameRecords(live, ids) {
		if used[r.Network] {
			spec.Names = append(spec.Names, r)
		}
	}
	return spec
}

// networkIDs maps "project/name" to a network's id.
func networkIDs(ns []*v1.Network) map[string]string {
	m := make(map[string]string, len(ns))
	for _, n := range ns {
		m[n.Meta.Project+"/"+n.Meta.Name] = n.Meta.Id
	}
	return m
}

// bridged lets networks of a project talk to each other when a container is in
// both and has one address only, in the first: older versions placed it.
func bridged(cs []*v1.Container, ids map[string]string) map[string][]string {
	pairs := map[[2]string]bool{}
	for _, c := range cs {
		at := attachments(c)
		if a := c.GetAssignment(); len(at) < 2 || c.Meta.Deleting || a.GetIp() == "" || len(a.Addresses) > 0 {
			continue
		}
		for _, a := range at {
			for _, b := range at {
				x, y := ids[c.Meta.Project+"/"+a], ids[c.Meta.Project+"/"+b]
				if x != y && x != "" && y != "" {
					pairs[[2]string{x, y}] = true
				}
			}
		}
	}
	out := map[string][]string{}
	for p := range pairs {
		out[p[0]] = append(out[p[0]], p[1])
	}
	for _, l := range out {
		slices.Sort(l)
	}
	return out
}

// sameSpec compares what two specs ask for; revisions don't count.
func sameSpec(a, b *v1.HostSpec) bool {
	if a == nil || b == nil {
		return a == b
	}
	ra, rb := a.Revision, b.Revision
	a.Revision, b.Revision = 0, 0
	defer func() { a.Revision, b.Revision = ra, rb }()
	return proto.Equal(a, b)
}

// dnsName is a name as resolvers ask for it.
func dnsName(s string) string { return strings.ToLower(s) }
