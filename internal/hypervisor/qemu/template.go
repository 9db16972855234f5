package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/files"
	"tandem/internal/hypervisor/qmp"
)

// manifest says what a template can be cloned into. It is written last: a
// template without one does not exist.
type manifest struct {
	Format       int       `json:"format"`
	Name         string    `json:"name"`
	QEMU         string    `json:"qemu"` // version with the package's: state is read by the very binary that wrote it
	Accelerator  string    `json:"accelerator"`
	Hardware     string    `json:"hardware"` // digest of static devices, ceiling and kernel command line
	CPUs         int       `json:"ceiling_cpus"`
	Memory       int64     `json:"ceiling_memory"`
	GuestVersion string    `json:"guest_version"`
	HostKernel   string    `json:"host_kernel"`
	HostBoot     string    `json:"host_boot"` // matters for KVM: CPU, microcode and TSC are those of one boot
	CreatedAt    time.Time `json:"created_at"`
	MemorySize   int64     `json:"memory_size"`
	StateSize    int64     `json:"state_size"`
	StateSHA256  string    `json:"state_sha256"`
}

const (
	manifestFormat = 1
	maxState       = 64 * mib
)

// fits says whether a machine can be started from the template.
func (t manifest) fits(l launch, h host) error {
	differ := func(what, have, want any) error {
		return fmt.Errorf("the template was made for %s, this is %v (boot cold, and make it anew): %w",
			fmt.Sprint(what, " ", have), want, errdefs.ErrFailedPrecondition)
	}
	switch {
	case t.Format != manifestFormat:
		return differ("format", t.Format, manifestFormat)
	case t.QEMU != h.version:
		return differ("QEMU", t.QEMU, h.version)
	case t.Accelerator != h.accel:
		return differ("accelerator", t.Accelerator, h.accel)
	case t.CPUs != l.spec.Ceiling.CPUs:
		return differ("a ceiling of CPUs", t.CPUs, l.spec.Ceiling.CPUs)
	case t.Memory != l.spec.Ceiling.Memory:
		return differ("a ceiling of bytes", t.Memory, l.spec.Ceiling.Memory)
	case t.GuestVersion != l.spec.GuestVersion:
		return differ("guest", t.GuestVersion, l.spec.GuestVersion)
	case t.Hardware != l.digest():
		return differ("devices and command line", t.Hardware, l.digest())
	case t.Accelerator == "kvm" && (t.HostBoot != h.boot || t.HostKernel != h.kernel):
		return differ("host boot", t.HostBoot, h.boot)
	}
	return nil
}

// sealed is a template in memory that nobody, its clones' VMMs included, can
// change any more.
type sealed struct {
	manifest manifest
	memory   *os.File // memfd sealed against writing
	state    string   // file
}

func (d *Driver) templateDir(name string) string {
	return filepath.Join(d.opt.StateDir, "templates", name)
}

func validTemplate(name string) error {
	if !validDisk.MatchString(name) || strings.HasPrefix(name, ".") {
		return fmt.Errorf("template name %q: must be 1 to 64 of A-Z, a-z, 0-9, _, -, and . not first: %w", name, errdefs.ErrInvalidArgument)
	}
	return nil
}

// SaveTemplate implements hypervisor.Driver. The machine must have been started
// with ForTemplate; it is deleted, also when saving fails halfway.
func (d *Driver) SaveTemplate(ctx context.Context, id, name string) error {
	if err := validTemplate(name); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(d.templateDir(name), "manifest.json")); err == nil {
		return fmt.Errorf("template %s: %w", name, errdefs.ErrAlreadyExists)
	}
	saved := false
	err := d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		m.mu.Lock()
		r := m.run
		if m.channel != nil {
			_ = m.channel.Close()
			m.channel = nil
		}
		m.mu.Unlock()
		if !r.ForTemplate || len(r.Disks)+len(r.NICs) > 0 {
			return fmt.Errorf("machine %s was not started for a template, or has devices attached: %w", id, errdefs.ErrFailedPrecondition)
		}
		saved = true
		if err := d.saveTemplate(ctx, m, q, name); err != nil {
			return fmt.Errorf("save machine %s as template %s: %w", id, name, err)
		}
		return nil
	})
	if saved {
		err = errors.Join(err, d.Delete(context.WithoutCancel(ctx), id))
	}
	return err
}

func (d *Driver) saveTemplate(ctx context.Context, m *machine, q *qmp.Client, name string) (err error) {
	// Killed from here on, the machine is one that never ran.
	if err := m.change(func(r *run) { r.Phase = phaseStarting }); err != nil {
		return err
	}
	defer func() {
		m.mu.Lock()
		m.run.Phase = phaseStopping // its end is wanted
		m.mu.Unlock()
	}()
	tmp, err := os.MkdirTemp(filepath.Join(d.opt.StateDir, "templates"), ".tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	state, err := os.OpenFile(filepath.Join(tmp, "state"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := outgoing(ctx, q, state); err != nil {
		return err
	}
	mf := manifest{
		Format: manifestFormat, Name: name, QEMU: d.host.version, Accelerator: d.host.accel,
		Hardware: m.launch(memoryTemplate).digest(),
		CPUs:     m.spec.Ceiling.CPUs, Memory: m.spec.Ceiling.Memory, GuestVersion: m.spec.GuestVersion,
		HostKernel: d.host.kernel, HostBoot: d.host.boot, CreatedAt: time.Now().UTC(), MemorySize: baseMemory,
	}
	if mf.StateSize, mf.StateSHA256, err = sum(state); err != nil {
		return err
	}
	// The VMM must be gone before its memory is the template's.
	m.mu.Lock()
	h, exited := m.proc, m.exited
	m.run.Phase = phaseStopping
	m.mu.Unlock()
	memory := filepath.Join(tmp, "memory")
	if err := os.Link(m.file("ram"), memory); err != nil {
		return err
	}
	if h != nil {
		if err := h.kill(); err != nil {
			return err
		}
		select {
		case <-exited:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	f, err := os.OpenFile(memory, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = errors.Join(f.Chown(os.Geteuid(), os.Getegid()), f.Chmod(0o400), f.Sync(), f.Close(), state.Chmod(0o400), state.Sync())
	if err != nil {
		return err
	}
	if err := writeJSON(filepath.Join(tmp, "manifest.json"), mf); err != nil {
		return err
	}
	if err := os.Rename(tmp, d.templateDir(name)); err != nil {
		return err
	}
	return files.SyncDir(filepath.Dir(tmp))
}

// outgoing writes the state of the machine, all but its shared memory, to a file.
func outgoing(ctx context.Context, q *qmp.Client, to *os.File) error {
	if err := q.Do(ctx, "stop", nil, nil); err != nil {
		return err
	}
	if err := capabilities(ctx, q); err != nil {
		return err
	}
	if err := q.DoWithFiles(ctx, "getfd", qmp.Args{"fdname": "state"}, nil, to); err != nil {
		return err
	}
	if err := q.Do(ctx, "migrate", qmp.Args{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	return migrated(ctx, q)
}

// incoming loads a template's state into a VMM that waits for it, and lets it go.
func incoming(ctx context.Context, q *qmp.Client, t *sealed) error {
	f, err := os.Open(t.state)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := capabilities(ctx, q); err != nil {
		return err
	}
	if err := q.DoWithFiles(ctx, "getfd", qmp.Args{"fdname": "state"}, nil, f); err != nil {
		return err
	}
	if err := q.Do(ctx, "migrate-incoming", qmp.Args{"uri": "fd:state"}, nil); err != nil {
		return err
	}
	if err := migrated(ctx, q); err != nil {
		return err
	}
	return q.Do(ctx, "cont", nil, nil)
}

func capabilities(ctx context.Context, q *qmp.Client) error {
	return q.Do(ctx, "migrate-set-capabilities", qmp.Args{"capabilities": []qmp.Args{
		{"capability": "x-ignore-shared", "state": true},
		{"capability": "events", "state": true},
	}}, nil)
}

// migrated waits for the end of a migration of either direction.
func migrated(ctx context.Context, q *qmp.Client) error {
	sub := q.Subscribe()
	defer sub.Close()
	for {
		var info struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := q.Do(ctx, "query-migrate", nil, &info); err != nil {
			return err
		}
		switch info.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("state transfer %s: %s: %w", info.Status, info.Error, errdefs.ErrInternal)
		}
		tick, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		_, err := sub.Wait(tick, func(e qmp.Event) bool { return e.Name == "MIGRATION" })
		cancel()
		if err != nil && ctx.Err() != nil {
			return err
		}
	}
}

// loadTemplate returns a template in memory, loading it at its first use.
func (d *Driver) loadTemplate(ctx context.Context, name string) (*sealed, error) {
	if err := validTemplate(name); err != nil {
		return nil, err
	}
	d.tmu.Lock()
	defer d.tmu.Unlock()
	if t := d.templates[name]; t != nil {
		return t, nil
	}
	dir := d.templateDir(name)
	t := &sealed{state: filepath.Join(dir, "state")}
	err := readJSON(filepath.Join(dir, "manifest.json"), &t.manifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("template %s: %w", name, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, fmt.Errorf("template %s: %w: %w", name, err, errdefs.ErrFailedPrecondition)
	}
	damaged := func(what string) error {
		return fmt.Errorf("template %s is damaged: %s (delete it): %w", name, what, errdefs.ErrFailedPrecondition)
	}
	state, err := os.Open(t.state)
	if err != nil {
		return nil, damaged(err.Error())
	}
	size, digest, err := sum(state)
	_ = state.Close()
	if err != nil || size != t.manifest.StateSize || digest != t.manifest.StateSHA256 {
		return nil, damaged("its state is not what was saved")
	}
	memory, err := os.Open(filepath.Join(dir, "memory"))
	if err != nil {
		return nil, damaged(err.Error())
	}
	defer memory.Close()
	if fi, err := memory.Stat(); err != nil || fi.Size() != t.manifest.MemorySize || fi.Size() != baseMemory {
		return nil, damaged("its memory has another size")
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if t.memory, err = memoryCopy("tandem-template-"+name, memory, baseMemory); err != nil {
		return nil, fmt.Errorf("load template %s: %w", name, err)
	}
	d.templates[name] = t
	return t, nil
}

// memoryCopy returns a copy of a file in memory, without its empty pages, that
// can be mapped privately and never be written again, whoever opens it.
func memoryCopy(name string, from *os.File, size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	err = f.Truncate(size)
	buf := make([]byte, mib)
	zero := make([]byte, 4096)
	for off := int64(0); err == nil && off < size; {
		data, serr := unix.Seek(int(from.Fd()), off, unix.SEEK_DATA)
		if errors.Is(serr, unix.ENXIO) {
			break // nothing but a hole is left
		} else if serr != nil {
			data = off // a file system that knows no holes
		}
		n, rerr := from.ReadAt(buf[:min(int64(len(buf)), size-data)], data)
		for p := 0; p < n && err == nil; p += 4096 {
			page := buf[p:min(p+4096, n)]
			if string(page) != string(zero[:len(page)]) {
				_, err = f.WriteAt(page, data+int64(p))
			}
		}
		if rerr != nil && !errors.Is(rerr, io.EOF) {
			err = rerr
		}
		if n == 0 {
			break
		}
		off = data + int64(n)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("copy %s to memory: %w", from.Name(), err)
	}
	_ = unix.Fadvise(int(from.Fd()), 0, 0, unix.FADV_DONTNEED) // once in memory is enough
	return f, nil
}

// newMemoryFile makes the file that is the memory of a template to be.
func newMemoryFile(path string, who identity) (*os.File, error) {
	_ = os.Remove(path)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	err = f.Truncate(baseMemory)
	if err == nil && !who.keep {
		err = f.Chown(int(who.uid), int(who.gid))
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Templates implements hypervisor.Driver.
func (d *Driver) Templates(context.Context) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(d.opt.StateDir, "templates"))
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	names := []string{}
	for _, e := range entries {
		if validTemplate(e.Name()) != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(d.templateDir(e.Name()), "manifest.json")); err == nil {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// DeleteTemplate implements hypervisor.Driver. Clones that run keep their memory.
func (d *Driver) DeleteTemplate(_ context.Context, name string) error {
	if err := validTemplate(name); err != nil {
		return err
	}
	d.tmu.Lock()
	defer d.tmu.Unlock()
	if t := d.templates[name]; t != nil {
		_ = t.memory.Close()
		delete(d.templates, name)
	}
	// The manifest goes first: what is left after a crash is no template.
	dir := d.templateDir(name)
	err := os.Remove(filepath.Join(dir, "manifest.json"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete template %s: %w", name, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("delete template %s: %w", name, err)
	}
	return nil
}

func sum(f *os.File) (int64, string, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return 0, "", err
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, maxState+1))
	if err == nil && n > maxState {
		err = fmt.Errorf("%s: longer than %d MiB", f.Name(), maxState/mib)
	}
	return n, hex.EncodeToString(h.Sum(nil)), err
}
