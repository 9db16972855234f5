package control

import (
	"context"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// collect removes records that are to go, once nothing is left of what they
// stand for: a container or machine when its agent says so, a network when its
// containers are gone, a project when all of it is.
func (c *Controller) collect(ctx context.Context) (time.Duration, error) {
	snap := c.store.Snapshot()
	known := make(map[string]bool)
	for _, h := range snap.Hosts {
		known[h.Meta.Id] = true
	}
	// A host that is no more takes all that it had with it; one whose record can't
	// be read is still there.
	lost := snap.Unreadable(store.Hosts)
	noHost := func(id string) bool { return id == "" || !known[id] && !lost }
	again := time.Duration(0)
	// Each record goes in a transaction of its own: one that changes meanwhile
	// does not keep the others.
	var failed error
	del := func(r store.Record) bool {
		err := c.store.Delete(ctx, r)
		switch k := store.KeyOf(r); {
		case err == nil:
			c.tell("collect", []decision{{string(k.Kind) + " " + k.Name, "is forgotten", "nothing is left of it"}})
		case !errdefs.IsNotFound(err):
			failed = err
		}
		return err == nil
	}
	left := map[string]int{} // project -> what is left of it
	inMachine := map[string]int{}
	networkUsed, volumeUsed := map[string]bool{}, map[string]bool{}
	tx := c.store.Txn()
	gone := map[string]bool{}
	var said []decision
	for _, x := range snap.Containers {
		if x.Meta.Deleting {
			ok := noHost(x.GetAssignment().GetHostId())
			if !ok {
				var retry time.Duration
				ok, retry = c.Hosts.gone(x.Assignment.HostId, x.Meta.Id, x.Meta.Revision, snap.Revision)
				if retry > 0 {
					again = retry
				}
			}
			if ok {
				c.tombs.add(x)
				tx.Delete(x)
				gone[x.Meta.Id] = true
				said = append(said, decision{"container " + x.Meta.Name, "is forgotten", "nothing is left of it"})
				continue
			}
		}
		left[x.Meta.Project]++
		inMachine[x.GetAssignment().GetMachineId()]++
		for _, n := range attachments(x) {
			networkUsed[x.Meta.Project+"/"+n] = true
		}
		for _, v := range NamedVolumes(x.GetSpec()) {
			volumeUsed[x.Meta.Project+"/"+v] = true
		}
	}
	if _, err := tx.Commit(ctx); err != nil {
		return 0, err
	}
	c.tell("collect", said)
	for id := range gone {
		c.Hosts.forget(id)
	}
	for _, m := range snap.Machines {
		if !m.Meta.Deleting || inMachine[m.Meta.Id] > 0 {
			continue
		}
		ok := noHost(m.HostId)
		if !ok {
			var retry time.Duration
			ok, retry = c.Hosts.gone(m.HostId, m.Meta.Id, m.Meta.Revision, snap.Revision)
			if retry > 0 {
				again = retry
			}
		}
		if ok && del(m) {
			c.Hosts.forget(m.Meta.Id)
		}
	}
	going := map[string]*v1.Project{}
	for _, p := range snap.Projects {
		if p.Meta.Deleting {
			going[p.Meta.Name] = p
		}
	}
	services := map[svcKey]int{}
	for _, x := range snap.Containers {
		if !gone[x.Meta.Id] && !x.OneOff {
			services[svcKey{x.Meta.Project, x.Service}]++
		}
	}
	for _, s := range snap.Services {
		if (s.Meta.Deleting || going[s.Meta.Project] != nil) && services[svcKey{s.Meta.Project, s.Meta.Name}] == 0 && del(s) {
			continue
		}
		left[s.Meta.Project]++
	}
	for _, v := range snap.Volumes {
		if v.Meta.Deleting && !volumeUsed[v.Meta.Project+"/"+v.Meta.Name] {
			ok := noHost(v.HostId)
			if ok = ok || c.Hosts.volumeGone(v.HostId, v.Meta.Id); ok && del(v) {
				c.Hosts.forget(v.Meta.Id)
				continue
			}
		}
		if v.Meta.Deleting {
			left[v.Meta.Project]++
		}
	}
	for _, n := range snap.Networks {
		if (n.Meta.Deleting || going[n.Meta.Project] != nil) && !networkUsed[n.Meta.Project+"/"+n.Meta.Name] {
			if going[n.Meta.Project] != nil && left[n.Meta.Project] > 0 {
				continue
			}
			if del(n) {
				continue
			}
		}
		if going[n.Meta.Project] != nil {
			left[n.Meta.Project]++
		}
	}
	for name, p := range going {
		if left[name] == 0 {
			del(p)
		}
	}
	return again, failed
}

// attachments are the names of the networks of a container; one that says nothing
// is in its project's default network, one without a network of its own in none.
func attachments(x *v1.Container) []string { return Attachments(x.GetSpec()) }

// Attachments are the names of the networks that a container is to be in.
func Attachments(s *v1.ContainerSpec) []string {
	if s.GetNetworkMode() == "none" || s.GetNetworkMode() == "host" {
		return nil
	}
	if len(s.GetNetworks()) == 0 {
		return []string{"default"}
	}
	var out []string
	for _, n := range s.Networks {
		out = append(out, n.Network)
	}
	return out
}

// NamedVolumes are the names of the volumes that a container mounts.
func NamedVolumes(s *v1.ContainerSpec) []string {
	var out []string
	for _, m := range s.GetMounts() {
		if m.Type == v1.Mount_TYPE_VOLUME && m.Source != "" {
			out = append(out, m.Source)
		}
	}
	return out
}
