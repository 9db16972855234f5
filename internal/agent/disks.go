package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/hypervisor"
)

// disk is a block image that containers of one kernel use.
type disk struct {
	Name     string `json:"name"` // attachment id, serial and mount id in one
	Path     string `json:"path"`
	FSType   string `json:"fs_type,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
	Volume   string `json:"volume,omitempty"` // id, when it is a volume
}

// diskSet shares the disks of one kernel among its containers: each is attached
// and mounted once, however many use it. A layer that nobody uses stays
// attached for a while (the next container of its image starts faster); a
// volume leaves at once, so that it can go elsewhere.
type diskSet struct {
	// attach and detach are nil on metal, where mounts take a path.
	attach func(ctx context.Context, d hypervisor.Disk) error
	detach func(ctx context.Context, name string) error
	// use and unuse mark volumes as held by this kernel.
	use   func(ctx context.Context, volume string) error
	unuse func(ctx context.Context, volume string) error
	idle  time.Duration
	clock Clock
	limit int // most disks at once; 0 = no limit
	// session is the kernel's, nil while there is none.
	session func() *session

	mu    sync.Mutex
	boot  string // run of the VMM that attached refers to
	disks map[string]*heldDisk
}

type heldDisk struct {
	disk
	op       sync.Mutex // one attach, mount, unmount or detach at a time
	attached bool
	mounted  string // boot that it is mounted in
	holders  map[string]bool
	since    time.Time // unused since
}

// reset forgets all attachments: the VMM is another one. Holders stay.
func (s *diskSet) reset(boot string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.boot == boot && boot != "" {
		return
	}
	s.boot = boot
	for name, d := range s.disks {
		if len(d.holders) == 0 {
			delete(s.disks, name)
			continue
		}
		nd := &heldDisk{disk: d.disk, holders: d.holders}
		s.disks[name] = nd
	}
}

// adopt takes over what an earlier agent attached to a VMM that still runs.
func (s *diskSet) adopt(boot string, attached []hypervisor.Disk) {
	s.reset(boot)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range attached {
		d := s.disks[a.ID]
		if d == nil {
			d = &heldDisk{disk: disk{Name: a.ID, Path: a.Path, ReadOnly: a.ReadOnly}, holders: map[string]bool{}, since: s.clock.Now()}
			s.disks[a.ID] = d
		}
		d.attached = true
	}
}

// running says whether there is a VMM (or host) to attach disks to.
func (s *diskSet) running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.boot != ""
}

// hold notes that a container uses disks, without touching them.
func (s *diskSet) hold(holder string, disks []disk) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range disks {
		h := s.disks[d.Name]
		if h == nil {
			h = &heldDisk{disk: d, holders: map[string]bool{}}
			s.disks[d.Name] = h
		}
		if h.disk != d { // adopted without knowing what it is
			h.disk = d
		}
		h.holders[holder] = true
	}
}

// heldBy lists the disks that a container holds.
func (s *diskSet) heldBy(holder string) []*heldDisk {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*heldDisk
	for _, d := range s.disks {
		if d.holders[holder] {
			out = append(out, d)
		}
	}
	return out
}

// attachAll attaches a container's disks to a running VMM; nothing on metal.
func (s *diskSet) attachAll(ctx context.Context, holder string) error {
	return eachDisk(s.heldBy(holder), func(d *heldDisk) error { return s.attachOne(ctx, d) })
}

func (s *diskSet) attachOne(ctx context.Context, d *heldDisk) error {
	d.op.Lock()
	defer d.op.Unlock()
	k := s.what(d)
	if k.Volume != "" && s.use != nil {
		if err := s.use(ctx, k.Volume); err != nil {
			return err
		}
	}
	if attached, _ := s.is(d); s.attach == nil || attached {
		return nil
	}
	if err := s.makeRoom(ctx, d); err != nil {
		return err
	}
	if err := s.attach(ctx, hypervisor.Disk{ID: k.Name, Path: k.Path, Serial: k.Name, ReadOnly: k.ReadOnly}); err != nil {
		return fmt.Errorf("attach disk %s: %w", k.Name, err)
	}
	s.set(d, true, "")
	return nil
}

// what a disk is.
func (s *diskSet) what(d *heldDisk) disk {
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.disk
}

// is reads a disk's state, set changes it.
func (s *diskSet) is(d *heldDisk) (attached bool, mounted string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return d.attached, d.mounted
}

func (s *diskSet) set(d *heldDisk, attached bool, mounted string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d.attached, d.mounted = attached, mounted
}

// makeRoom detaches unused disks at once when the machine has no free slot.
func (s *diskSet) makeRoom(ctx context.Context, want *heldDisk) error {
	if s.limit <= 0 {
		return nil
	}
	count := func() (n int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range s.disks {
			if d != want && d.attached {
				n++
			}
		}
		return n
	}
	if count()+1 < s.limit {
		return nil
	}
	mine := s.what(want).Name
	if sess := s.session(); sess != nil {
		if _, err := s.sweep(ctx, sess, true, func(name string) bool { return name == mine }); err != nil {
			return err
		}
	}
	if n := count(); n+1 >= s.limit {
		return fmt.Errorf("the machine has %d disks and takes no more than %d: %w", n, s.limit, errdefs.ErrResourceExhausted)
	}
	return nil
}

// mountAll mounts a container's disks in the kernel that s talks to.
func (s *diskSet) mountAll(ctx context.Context, sess *session, holder string) error {
	return eachDisk(s.heldBy(holder), func(d *heldDisk) error {
		if err := s.attachOne(ctx, d); err != nil {
			return err
		}
		d.op.Lock()
		defer d.op.Unlock()
		k := s.what(d)
		if _, mounted := s.is(d); mounted == sess.boot {
			return nil
		}
		r := &v1.MountDiskRequest{Id: k.Name, FsType: k.FSType, ReadOnly: k.ReadOnly}
		if s.attach == nil {
			r.Path = k.Path
		} else {
			r.Serial = k.Name
		}
		if _, err := sess.rt.Mount(ctx, r); err != nil {
			return fmt.Errorf("mount disk %s: %w", k.Name, err)
		}
		s.set(d, s.attach != nil, sess.boot)
		return nil
	})
}

// release ends a container's use. Its volumes are unmounted and detached now
// (with sess nil the kernel is gone, and nothing is left to unmount); an error
// means: ask again.
func (s *diskSet) release(ctx context.Context, sess *session, holder string) error {
	for _, d := range s.heldBy(holder) {
		s.mu.Lock()
		last := len(d.holders) == 1
		s.mu.Unlock()
		if last && s.what(d).Volume != "" {
			if err := s.drop(ctx, sess, d, holder); err != nil {
				return err
			}
			continue
		}
		s.mu.Lock()
		delete(d.holders, holder)
		d.since = s.clock.Now()
		s.mu.Unlock()
	}
	return nil
}

// drop takes a disk out of the kernel if nobody but except holds it.
func (s *diskSet) drop(ctx context.Context, sess *session, d *heldDisk, except string) error {
	d.op.Lock()
	defer d.op.Unlock()
	k := s.what(d)
	s.mu.Lock()
	for h := range d.holders {
		if h != except {
			delete(d.holders, except)
			s.mu.Unlock()
			return nil
		}
	}
	s.mu.Unlock()
	if sess != nil {
		if err := sess.rt.Unmount(ctx, k.Name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("unmount disk %s: %w", k.Name, err)
		}
		if s.detach != nil {
			if err := s.detach(ctx, k.Name); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("detach disk %s: %w", k.Name, err)
			}
		}
		s.set(d, false, "")
	}
	if k.Volume != "" && s.unuse != nil {
		if err := s.unuse(ctx, k.Volume); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(d.holders, except)
	if len(d.holders) == 0 && s.disks[k.Name] == d {
		delete(s.disks, k.Name)
	} else {
		d.attached, d.mounted = false, "" // somebody came meanwhile: attach it again
	}
	return nil
}

// sweep drops disks that were unused for long enough (all: at all), and says
// when to look again (zero: nothing is waiting).
func (s *diskSet) sweep(ctx context.Context, sess *session, all bool, keep func(name string) bool) (time.Duration, error) {
	var due []*heldDisk
	var again time.Duration
	now := s.clock.Now()
	s.mu.Lock()
	for _, d := range s.disks {
		if len(d.holders) > 0 || keep != nil && keep(d.Name) {
			continue
		}
		if left := s.idle - now.Sub(d.since); left > 0 && !all {
			if again == 0 || left < again {
				again = left
			}
			continue
		}
		due = append(due, d)
	}
	s.mu.Unlock()
	for _, d := range due {
		if err := s.drop(ctx, sess, d, ""); err != nil {
			s.mu.Lock()
			d.since = now // not now: try again after a while
			s.mu.Unlock()
			return s.idle, err
		}
	}
	return again, nil
}

// eachDisk works on several disks at once and returns the first error.
func eachDisk(disks []*heldDisk, fn func(*heldDisk) error) error {
	if len(disks) == 1 {
		return fn(disks[0])
	}
	errs := make(chan error, len(disks))
	for _, d := range disks {
		go func() { errs <- fn(d) }()
	}
	var err error
	for range disks {
		if e := <-errs; e != nil && err == nil {
			err = e
		}
	}
	return err
}
