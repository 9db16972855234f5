package control

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// ServiceHash tells two templates apart: containers of another hash are replaced.
// depends_on only orders starts, so it does not count.
func ServiceHash(t *v1.ContainerSpec) string {
	t = clone(t)
	if t != nil {
		t.DependsOn = nil
	}
	b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(t)
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:12])
}

// SameHash compares hashes without the salt that force_recreate adds.
func SameHash(a, b string) bool {
	a, _, _ = strings.Cut(a, "+")
	b, _, _ = strings.Cut(b, "+")
	return a == b
}

// ContainerName is the name of the n-th container of a service.
func ContainerName(s *v1.Service, n int32) string {
	if s.ContainerName != "" {
		return s.ContainerName
	}
	return fmt.Sprintf("%s-%s-%d", s.Meta.Project, s.Meta.Name, n)
}

// deploy makes containers what services say.
func (c *Controller) deploy(ctx context.Context) (time.Duration, error) {
	snap := c.store.Snapshot()
	d := &deployment{c: c, snap: snap, tx: c.store.Txn(), names: map[store.Key]bool{}, groups: map[svcKey][]*v1.Container{}, services: map[svcKey]*v1.Service{}, projects: map[string]*v1.Project{}}
	for _, p := range snap.Projects {
		d.projects[p.Meta.Name] = p
	}
	for _, s := range snap.Services {
		d.services[svcKey{s.Meta.Project, s.Meta.Name}] = s
	}
	for _, x := range snap.Containers {
		d.names[store.KeyOf(x)] = true
	}
	for _, x := range active(snap.Containers) { // moves look after the others
		if x.Service != "" && !x.OneOff {
			k := svcKey{x.Meta.Project, x.Service}
			d.groups[k] = append(d.groups[k], x)
		}
	}
	for _, k := range snap.Corrupt {
		d.names[k] = true // it runs, for all that is known: its place is taken
	}
	for _, s := range snap.Services {
		d.service(s)
	}
	for _, x := range snap.Containers {
		d.single(x)
	}
	_, err := d.tx.Commit(ctx)
	if err == nil {
		c.tell("deploy", d.said)
	}
	return d.again, err
}

// deployment is one run of the deploy controller.
type deployment struct {
	c        *Controller
	snap     *store.Snapshot
	tx       *store.Txn
	names    map[store.Key]bool
	groups   map[svcKey][]*v1.Container // all of a service, going ones too
	services map[svcKey]*v1.Service
	projects map[string]*v1.Project
	marked   map[string]bool
	again    time.Duration
	said     []decision
}

// remove marks a container as going. What `down` said last of how long it may take
// to end counts; what a stop or restart said before does not.
func (d *deployment) remove(x *v1.Container, why string) {
	if x.Meta.Deleting || d.marked[x.Meta.Id] {
		return
	}
	if d.marked == nil {
		d.marked = map[string]bool{}
	}
	d.marked[x.Meta.Id] = true
	x = clone(x)
	x.Meta.Deleting = true
	x.Meta.Generation++
	if p := d.projects[x.Meta.Project]; p != nil && !p.Meta.Deleting {
		x.StopTimeout = nil
	}
	d.tx.Update(x)
	d.said = append(d.said, decision{x.Meta.Name, "is to go", why})
}

// goes says whether a service is to go as a whole.
func (d *deployment) goes(s *v1.Service) bool {
	p := d.projects[s.Meta.Project]
	return s.Meta.Deleting || p.GetMeta().GetDeleting() || p == nil && !d.broken(store.Projects, "", s.Meta.Project)
}

// broken says that a record is there but can't be read: nothing goes for that.
func (d *deployment) broken(kind store.Kind, project, name string) bool {
	return d.snap.Broken(store.Key{Kind: kind, Project: project, Name: name})
}

// service brings one service a step further.
func (d *deployment) service(s *v1.Service) {
	all := d.groups[svcKey{s.Meta.Project, s.Meta.Name}]
	if d.goes(s) {
		if !d.neededByOthers(s) {
			why := "service " + s.Meta.Name + " goes"
			if !s.Meta.Deleting {
				why = "project " + s.Meta.Project + " goes"
			}
			for _, x := range all {
				d.remove(x, why)
			}
		}
		return
	}
	if s.OneOff {
		return
	}
	var fresh, stale []*v1.Container
	going := 0
	for _, x := range all {
		switch {
		case x.Meta.Deleting:
			going++
		case x.ServiceHash == s.Hash:
			fresh = append(fresh, x)
		default:
			stale = append(stale, x)
		}
	}
	byOrdinal := func(a, b *v1.Container) int { return cmp.Compare(a.Ordinal, b.Ordinal) }
	slices.SortFunc(fresh, byOrdinal)
	slices.SortFunc(stale, byOrdinal)
	want := int(s.Replicas)

	// Fewer: stale ones go first, then the highest.
	for len(fresh) > want {
		d.remove(fresh[len(fresh)-1], fmt.Sprintf("service %s wants %d", s.Meta.Name, want))
		fresh = fresh[:len(fresh)-1]
	}
	if len(stale) == 0 {
		d.create(s, all, want-len(fresh), len(fresh))
		return
	}
	for len(fresh)+len(stale) > want && len(stale) > 0 && s.UpdateOrder != "start-first" {
		d.remove(stale[len(stale)-1], fmt.Sprintf("service %s wants %d", s.Meta.Name, want))
		stale = stale[:len(stale)-1]
		going++
	}
	// Replace: at most parallelism at a time are away or not yet ready.
	par := max(int(s.UpdateParallelism), 1)
	if s.UpdateParallelism == 0 {
		par = max(want, 1) // Compose replaces all at once unless told otherwise
	}
	unready := 0
	for _, x := range fresh {
		if !settled(x) {
			unready++
		}
	}
	if s.UpdateOrder == "start-first" && s.ContainerName == "" {
		ready := len(fresh) - unready
		for excess := ready + len(stale) - max(want, ready); excess > 0 && len(stale) > 0; excess-- {
			d.remove(stale[0], "a new one of service "+s.Meta.Name+" is ready")
			stale = stale[1:]
		}
		d.create(s, all, min(want-len(fresh), par-unready), len(fresh))
		return
	}
	room := par - unready - going
	missing := want - len(fresh) - len(stale) - going
	if missing > 0 && going == 0 {
		n := min(missing, max(par-unready, 0))
		d.create(s, all, n, len(fresh)+len(stale))
		room -= n
	}
	for ; room > 0 && len(stale) > 0; room-- {
		d.remove(stale[0], "service "+s.Meta.Name+" has changed")
		stale = stale[1:]
	}
}

// settled says that a replaced container needs no more waiting.
func settled(x *v1.Container) bool {
	return x.Stopped || Ready(x) || (Ended(x) && x.Status.ExitCode == 0)
}

// create makes n further containers on the lowest ordinals that are free.
func (d *deployment) create(s *v1.Service, all []*v1.Container, n, have int) {
	taken := make(map[int32]bool)
	for _, x := range all {
		taken[x.Ordinal] = true
	}
	for o := int32(1); n > 0; o++ {
		if taken[o] {
			// A going container keeps its name until it is gone.
			if o > int32(have+len(all)+n+1) {
				return
			}
			continue
		}
		if o > s.Replicas && s.UpdateOrder != "start-first" {
			return // the place of one that is going: wait for it
		}
		if s.ContainerName != "" && (o > 1 || len(all) > 0) {
			return
		}
		x := d.c.NewContainer(s, o)
		if d.names[store.KeyOf(x)] {
			return // the name is taken by a container that is no service's: said at up
		}
		d.names[store.KeyOf(x)] = true
		d.tx.Create(x)
		d.said = append(d.said, decision{x.Meta.Name, "is made", fmt.Sprintf("service %s wants %d", s.Meta.Name, s.Replicas)})
		n--
	}
}

// NewContainer is the record of the n-th container of a service.
func (c *Controller) NewContainer(s *v1.Service, n int32) *v1.Container {
	return &v1.Container{
		Meta: &v1.Meta{Id: c.NewID(16), Project: s.Meta.Project, Name: ContainerName(s, n),
			CreatedAt: stamp(c.clock.Now()), Generation: 1},
		Service: s.Meta.Name, Ordinal: n, ServiceHash: s.Hash, Spec: clone(s.Template), Stopped: s.Stopped,
		Status: &v1.ContainerStatus{State: v1.ContainerState_CONTAINER_STATE_PENDING, CreatedAt: stamp(c.clock.Now())},
	}
}

// neededByOthers says that containers which depend on this service are still
// there: they stop first.
func (d *deployment) neededByOthers(s *v1.Service) bool {
	for k, cs := range d.groups {
		o := d.services[k]
		if k.project != s.Meta.Project || k.service == s.Meta.Name || o == nil || !d.goes(o) || len(cs) == 0 {
			continue
		}
		for _, dep := range o.GetTemplate().GetDependsOn() {
			if dep.Service == s.Meta.Name {
				return true
			}
		}
	}
	return false
}

// single looks at a container for itself: of a project that goes, of a service
// that is no more, or one that removes itself at its end.
func (d *deployment) single(x *v1.Container) {
	p := d.projects[x.Meta.Project]
	switch {
	case x.Meta.Deleting:
	case p == nil && !d.broken(store.Projects, "", x.Meta.Project), p.GetMeta().GetDeleting() && (x.Service == "" || x.OneOff):
		d.remove(x, "project "+x.Meta.Project+" goes")
	case x.Service != "" && !x.OneOff && d.services[svcKey{x.Meta.Project, x.Service}] == nil && !d.broken(store.Services, x.Meta.Project, x.Service):
		d.remove(x, "there is no service "+x.Service)
	case x.GetSpec().GetAutoRemove() && x.Status.GetStartedAt() != nil && Ended(x), x.GetSpec().GetAutoRemove() && d.givenUp(x):
		if d.c.isHeld(x) {
			d.again = time.Second
			return
		}
		d.remove(x, "it has ended, and removes itself")
	}
}

// givenUp says that a container that was to run once has failed to start for so
// long that nobody waits for it any more.
func (d *deployment) givenUp(x *v1.Container) bool {
	if x.Status.GetState() != v1.ContainerState_CONTAINER_STATE_FAILED || x.Assignment == nil {
		return false
	}
	left := failedStay - d.c.clock.Now().Sub(x.Meta.GetCreatedAt().AsTime())
	if left > 0 && (d.again == 0 || left < d.again) {
		d.again = left
	}
	return left <= 0
}

// failedStay is how long a container with auto_remove that could not start may
// still come good: its agent tries again meanwhile.
const failedStay = time.Minute
