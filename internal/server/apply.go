package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// DefaultVolumeSize is a volume's size when none is asked for; disks are sparse.
const DefaultVolumeSize = 10 << 30

// diff is what an Apply will write, and what will come of it.
type diff struct {
	s    *Server
	req  *v1.ApplyProjectRequest
	snap *store.Snapshot
	tx   *store.Txn

	plan    *v1.Plan
	changed []string
	fresh   []*v1.Container // that will be made, for the preview
	gone    []string        // ids of containers that will go
	scope   map[string]bool
}

func (d *diff) now() *timestamppb.Timestamp { return timestamppb.New(d.s.clock.Now()) }

func (d *diff) act(kind, what, text string) *v1.PlanAction {
	a := &v1.PlanAction{Kind: kind, Container: what, Text: text}
	d.plan.Actions = append(d.plan.Actions, a)
	return a
}

// newDiff compares a request with the state. It writes nothing.
func (s *Server) newDiff(r *v1.ApplyProjectRequest) (*diff, error) {
	snap := s.store.Snapshot()
	d := &diff{s: s, req: r, snap: snap, tx: s.store.Txn(), plan: &v1.Plan{Revision: snap.Revision}, scope: scope(r)}
	if err := d.project(); err != nil {
		return nil, err
	}
	if err := d.networks(); err != nil {
		return nil, err
	}
	rename, err := d.volumes()
	if err != nil {
		return nil, err
	}
	templates := map[string]*v1.ContainerSpec{}
	for _, sp := range r.Services {
		if d.scope[sp.Name] {
			templates[sp.Name] = sp.Template
		}
	}
	mine := func(c *v1.Container) bool {
		return c.Meta.Project == r.Project && !c.OneOff && (templates[c.Service] != nil || c.Service != "" && r.RemoveOrphans)
	}
	if err := portConflicts(control.Claimed(snap), templates, mine).err(); err != nil {
		return nil, err
	}
	old := map[string]*v1.Service{}
	for _, x := range snap.Services {
		if x.Meta.Project == r.Project {
			old[x.Meta.Name] = x
		}
	}
	for _, sp := range r.Services {
		if d.scope[sp.Name] {
			if err := d.service(sp, old[sp.Name], rename); err != nil {
				return nil, err
			}
		}
		delete(old, sp.Name)
	}
	var orphans []string
	for n, x := range old {
		if x.Meta.Deleting {
			continue
		}
		orphans = append(orphans, n)
		if r.RemoveOrphans {
			d.removeService(x)
		}
	}
	slices.Sort(orphans)
	if len(orphans) > 0 && !r.RemoveOrphans {
		d.plan.Warnings = append(d.plan.Warnings, fmt.Sprintf("services that the file does not have: %s (--remove-orphans removes them)", strings.Join(orphans, ", ")))
	}
	return d, d.preview()
}

func (d *diff) project() error {
	r := d.req
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(&v1.ApplyProjectRequest{Services: r.Services, Networks: r.Networks, Volumes: r.Volumes})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	hash := hex.EncodeToString(sum[:12])
	p, err := store.Get[*v1.Project](d.s.store, projectKey(r.Project))
	if errdefs.IsNotFound(err) {
		d.tx.Create(&v1.Project{Meta: &v1.Meta{Id: "p-" + d.s.ctl.NewID(8), Name: r.Project, CreatedAt: d.now(), Generation: 1},
			ComposeHash: hash, WorkingDir: r.WorkingDir, ConfigFiles: r.ConfigFiles})
		return nil
	}
	if err != nil {
		return err
	}
	if p.Meta.Deleting {
		return fmt.Errorf("project %s is being removed: wait until it is gone (`tandem ps -a -p %s`): %w", r.Project, r.Project, errdefs.ErrFailedPrecondition)
	}
	n := proto.Clone(p).(*v1.Project)
	if len(r.Only) == 0 {
		n.ComposeHash = hash
	}
	n.WorkingDir, n.ConfigFiles = r.WorkingDir, r.ConfigFiles
	if !proto.Equal(n, p) {
		d.tx.Update(n)
	} else {
		d.tx.Check(p)
	}
	return nil
}

func (d *diff) networks() error {
	want := map[string]*v1.NetworkRequest{}
	for _, n := range d.req.Networks {
		want[n.Name] = n
	}
	for _, sp := range d.req.Services {
		for _, n := range control.Attachments(sp.Template) {
			if want[n] == nil {
				want[n] = &v1.NetworkRequest{Name: n}
			}
		}
	}
	have := map[string]*v1.Network{}
	for _, n := range d.snap.Networks {
		if n.Meta.Project == d.req.Project {
			have[n.Meta.Name] = n
		}
	}
	carver := d.s.ctl.Carver(d.snap)
	for _, name := range sortedKeys(want) {
		w, old := want[name], have[name]
		if old == nil {
			cidr, err := carver.Take(w.Cidr)
			if err != nil {
				return fmt.Errorf("network %s: %w", name, err)
			}
			d.tx.Create(&v1.Network{Meta: &v1.Meta{Id: "n-" + d.s.ctl.NewID(6), Project: d.req.Project, Name: name, CreatedAt: d.now(), Generation: 1},
				Cidr: cidr, Internal: w.Internal, Labels: w.Labels})
			d.act("create-network", "", fmt.Sprintf("create network %s (%s)", name, cidr))
			continue
		}
		if old.Meta.Deleting {
			return fmt.Errorf("network %s is being removed: try again in a moment: %w", name, errdefs.ErrFailedPrecondition)
		}
		if w.Cidr != "" && w.Cidr != old.Cidr {
			return fmt.Errorf("network %s has range %s and can't change to %s while it exists: run `tandem down` first: %w", name, old.Cidr, w.Cidr, errdefs.ErrFailedPrecondition)
		}
		n := proto.Clone(old).(*v1.Network)
		n.Internal, n.Labels = w.Internal, w.Labels
		if !proto.Equal(n, old) {
			n.Meta.Generation++
			d.tx.Update(n)
			d.changed = append(d.changed, "network "+name)
			d.act("update-network", "", "change network "+name)
		}
	}
	return nil
}

// volumes returns how external volumes are called in the project.
func (d *diff) volumes() (map[string]string, error) {
	rename := map[string]string{}
	for _, w := range d.req.Volumes {
		name := w.Name
		if w.External {
			name = cmp.Or(w.ExternalName, w.Name)
			rename[w.Name] = name
		}
		old, err := store.Get[*v1.Volume](d.s.store, store.Key{Kind: store.Volumes, Project: d.req.Project, Name: name})
		switch {
		case err == nil && old.Meta.Deleting:
			return nil, fmt.Errorf("volume %s is being removed: try again in a moment: %w", name, errdefs.ErrFailedPrecondition)
		case err == nil && !w.External:
			n := proto.Clone(old).(*v1.Volume)
			n.Labels = w.Labels
			if w.SizeBytes != 0 {
				n.SizeBytes = w.SizeBytes
			}
			if n.SizeBytes < old.SizeBytes {
				return nil, fmt.Errorf("volume %s has %d bytes and can't shrink to %d: %w", name, old.SizeBytes, w.SizeBytes, errdefs.ErrFailedPrecondition)
			}
			if !proto.Equal(n, old) {
				n.Meta.Generation++
				d.tx.Update(n)
				d.act("update-volume", "", "change volume "+name)
			}
		case err == nil:
		case !errdefs.IsNotFound(err):
			return nil, err
		case w.External:
			return nil, fmt.Errorf("external volume %s is not there: `tandem -p %s volume create %s` makes it: %w", name, d.req.Project, name, errdefs.ErrFailedPrecondition)
		default:
			d.tx.Create(d.s.newVolume(d.req.Project, name, w.SizeBytes, w.Labels))
			d.act("create-volume", "", "create volume "+name)
		}
	}
	return rename, nil
}

func (s *Server) newVolume(project, name string, size int64, labels map[string]string) *v1.Volume {
	return &v1.Volume{Meta: &v1.Meta{Id: "v-" + s.ctl.NewID(8), Project: project, Name: name, CreatedAt: timestamppb.New(s.clock.Now()), Generation: 1},
		Driver: "disk", SizeBytes: cmp.Or(size, DefaultVolumeSize), Labels: labels}
}

// service compares one service and says what will become of its containers; the
// deploy controller does it.
func (d *diff) service(sp *v1.ServiceSpec, old *v1.Service, rename map[string]string) error {
	r := d.req
	t := proto.Clone(sp.Template).(*v1.ContainerSpec)
	for _, m := range t.Mounts {
		if to, ok := rename[m.Source]; ok && m.Type == v1.Mount_TYPE_VOLUME {
			m.Source = to
		}
	}
	n := &v1.Service{Meta: &v1.Meta{Project: r.Project, Name: sp.Name, CreatedAt: d.now(), Generation: 1}}
	if old != nil {
		if old.Meta.Deleting {
			return fmt.Errorf("service %s is being removed: try again in a moment: %w", sp.Name, errdefs.ErrFailedPrecondition)
		}
		n = proto.Clone(old).(*v1.Service)
	} else {
		n.Meta.Id = "s-" + d.s.ctl.NewID(8)
	}
	n.Replicas, n.Labels, n.Scale = sp.Replicas, sp.Labels, sp.Scale
	n.Spread, n.Company, n.Uncovered = sp.Spread, sp.Company, sp.Uncovered
	n.Replicas, n.ScaleStatus = control.ScaledReplicas(sp, old)
	n.UpdateOrder, n.UpdateParallelism, n.ContainerName, n.Stopped = sp.UpdateOrder, sp.UpdateParallelism, sp.ContainerName, r.NoStart
	d.applied(n, t)
	hash := control.ServiceHash(t)
	switch {
	case old == nil:
		n.Template, n.Hash = t, hash
	case r.ForceRecreate:
		n.Template, n.Hash = t, hash+"+"+d.s.ctl.NewID(4)
	case r.NoRecreate:
	case !control.SameHash(hash, old.Hash):
		n.Template, n.Hash = t, hash
	default:
		n.Template = t // depends_on may differ
	}
	if old == nil {
		d.tx.Create(n)
		d.changed = append(d.changed, sp.Name)
	} else if !proto.Equal(n, old) {
		n.Meta.Generation++
		d.tx.Update(n)
		d.changed = append(d.changed, sp.Name)
	} else {
		d.tx.Check(old)
	}
	d.containers(n)
	return nil
}

// containers foresees what the deploy controller will do.
func (d *diff) containers(n *v1.Service) {
	have := 0
	var stale, fresh []*v1.Container
	for _, c := range d.snap.Containers {
		if c.Meta.Project != n.Meta.Project || c.Service != n.Meta.Name || c.OneOff || c.Meta.Deleting {
			if c.Meta.Project == n.Meta.Project && n.ContainerName != "" && c.Meta.Name == n.ContainerName && c.Service != n.Meta.Name {
				d.plan.Warnings = append(d.plan.Warnings, fmt.Sprintf("service %s waits until container %s is gone: it has its name", n.Meta.Name, c.Meta.Name))
			}
			continue
		}
		have++
		if c.ServiceHash == n.Hash {
			fresh = append(fresh, c)
		} else {
			stale = append(stale, c)
		}
	}
	byOrdinal := func(a, b *v1.Container) int { return cmp.Compare(a.Ordinal, b.Ordinal) }
	slices.SortFunc(fresh, byOrdinal)
	slices.SortFunc(stale, byOrdinal)
	want := int(n.Replicas)
	for len(fresh) > want {
		c := fresh[len(fresh)-1]
		fresh = fresh[:len(fresh)-1]
		d.gone = append(d.gone, c.Meta.Id)
		d.act("remove", c.Meta.Name, "remove "+c.Meta.Name+": one less is wanted")
	}
	replace := min(len(stale), want-len(fresh))
	for i, c := range stale {
		d.gone = append(d.gone, c.Meta.Id)
		if i < replace {
			d.act("recreate", c.Meta.Name, "replace "+c.Meta.Name+": its definition has changed")
		} else {
			d.act("remove", c.Meta.Name, "remove "+c.Meta.Name+": one less is wanted")
		}
	}
	taken := map[int32]bool{}
	for _, c := range fresh {
		taken[c.Ordinal] = true
	}
	o := int32(0)
	for i := range want - len(fresh) {
		for o++; taken[o]; o++ {
		}
		c := d.s.ctl.NewContainer(n, o)
		d.fresh = append(d.fresh, c)
		if i >= replace {
			d.act("create", c.Meta.Name, "create "+c.Meta.Name+" from "+n.Template.GetImage())
		}
	}
	if d.req.NoStart {
		return
	}
	for _, c := range fresh {
		st := c.GetStatus()
		failed := control.Ended(c) && st.ExitCode != 0 || st.GetState() == v1.ContainerState_CONTAINER_STATE_FAILED
		if !c.Stopped && !failed {
			continue
		}
		c = proto.Clone(c).(*v1.Container)
		if !c.Stopped {
			c.RestartGeneration++
		}
		c.Stopped = false
		c.Meta.Generation++
		d.tx.Update(c)
		d.changed = append(d.changed, c.Meta.Name)
		d.act("start", c.Meta.Name, "start "+c.Meta.Name+" again")
	}
}

func (d *diff) removeService(x *v1.Service) {
	x = proto.Clone(x).(*v1.Service)
	x.Meta.Deleting = true
	x.Meta.Generation++
	d.tx.Update(x)
	d.changed = append(d.changed, x.Meta.Name)
	for _, c := range d.snap.Containers {
		if c.Meta.Project == x.Meta.Project && c.Service == x.Meta.Name && !c.Meta.Deleting {
			d.gone = append(d.gone, c.Meta.Id)
			d.act("remove", c.Meta.Name, "remove "+c.Meta.Name+": its service is no more in the file")
		}
	}
}

// preview asks the planner where the new containers would go.
func (d *diff) preview() error {
	if d.req.NoStart || len(d.fresh) == 0 {
		return nil
	}
	p, err := d.s.ctl.Preview(context.Background(), d.fresh, d.gone)
	if err != nil {
		return fmt.Errorf("placing the containers: %w", err)
	}
	d.s.addPlan(d.plan, p, d.fresh)
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
