package oci

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// mounts adds the kernel's file systems, the container's own files, secrets and
// the user's mounts, parents before children.
func (r *Runtime) mounts(ctx context.Context, sp *specs.Spec, s *v1.RuntimeSpec) error {
	shm := s.ShmSizeBytes
	if shm == 0 {
		shm = 64 << 20
	}
	sysOpt := "ro"
	if s.Privileged {
		sysOpt = "rw"
	}
	sp.Mounts = []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", sysOpt}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{sysOpt, "nosuid", "noexec", "nodev"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(shm, 10)}},
	}
	etc := filepath.Join(r.runDir(s.Id), "etc")
	var own []specs.Mount
	for _, n := range []string{"resolv.conf", "hostname", "hosts"} {
		own = append(own, bind(filepath.Join(etc, n), "/etc/"+n, false, "rprivate"))
	}
	for i, f := range s.Files {
		own = append(own, bind(filepath.Join(r.runDir(s.Id), "files", strconv.Itoa(i)), path.Clean(f.Target), true, "rprivate"))
	}
	for i, m := range s.Mounts {
		om, err := r.userMount(ctx, s, i, m)
		if err != nil {
			return err
		}
		own = append(own, om)
	}
	// A user's mount of the same place wins over ours, kernel file systems included.
	taken := map[string]bool{}
	for _, m := range s.Mounts {
		taken[path.Clean(m.Target)] = true
	}
	keep := func(m specs.Mount, users bool) bool { return users || !taken[m.Destination] }
	sp.Mounts = slices.DeleteFunc(sp.Mounts, func(m specs.Mount) bool { return !keep(m, false) })
	userFrom := len(own) - len(s.Mounts)
	for i, m := range own {
		if keep(m, i >= userFrom) {
			sp.Mounts = append(sp.Mounts, m)
		}
	}
	sort.SliceStable(sp.Mounts, func(a, b int) bool { return depth(sp.Mounts[a].Destination) < depth(sp.Mounts[b].Destination) })
	return nil
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

func bind(src, dst string, readOnly bool, propagation string) specs.Mount {
	m := specs.Mount{Destination: dst, Type: "bind", Source: src, Options: []string{"rbind", propagation}}
	if readOnly {
		m.Options = append(m.Options, "ro")
	}
	return m
}

var propagations = []string{"private", "rprivate", "shared", "rshared", "slave", "rslave"}

func (r *Runtime) userMount(ctx context.Context, s *v1.RuntimeSpec, i int, m *v1.RuntimeMount) (specs.Mount, error) {
	target := path.Clean(m.Target)
	fail := func(err error) (specs.Mount, error) {
		return specs.Mount{}, fmt.Errorf("container %s: mount on %s: %w", s.Id, target, err)
	}
	switch m.Type {
	case v1.RuntimeMount_TYPE_TMPFS:
		mode := m.Mode
		if mode == 0 {
			mode = 0o1777
		}
		o := []string{"nosuid", "nodev", "noexec", fmt.Sprintf("mode=%o", mode)}
		if m.SizeBytes > 0 {
			o = append(o, "size="+strconv.FormatInt(m.SizeBytes, 10))
		}
		if m.ReadOnly {
			o = append(o, "ro")
		}
		return specs.Mount{Destination: target, Type: "tmpfs", Source: "tmpfs", Options: o}, nil

	case v1.RuntimeMount_TYPE_BIND:
		prop := m.Propagation
		if prop == "" {
			prop = "rprivate"
		}
		if !slices.Contains(propagations, prop) {
			return fail(fmt.Errorf("propagation %q: %w", prop, errdefs.ErrInvalidArgument))
		}
		if !path.IsAbs(m.Source) {
			return fail(fmt.Errorf("source %q is not absolute: %w", m.Source, errdefs.ErrInvalidArgument))
		}
		if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(m.Source, 0o755); err != nil { // as Docker does
				return fail(err)
			}
		} else if err != nil {
			return fail(err)
		}
		src := m.Source
		if m.Subpath != "" {
			var err error
			if src, err = r.subpath(s.Id, i, src, m.Subpath); err != nil {
				return fail(err)
			}
		}
		return bind(src, target, m.ReadOnly, prop), nil

	case v1.RuntimeMount_TYPE_DISK:
		r.mu.Lock()
		d := r.disks[m.Source]
		r.mu.Unlock()
		if d == nil {
			return fail(fmt.Errorf("disk %s is not mounted: %w", m.Source, errdefs.ErrFailedPrecondition))
		}
		src := r.diskDir(d.name)
		if m.CopyUp && !d.req.ReadOnly && !m.ReadOnly && m.Subpath == "" {
			if err := copyUp(ctx, r.rootfs(s.Id), target, src); err != nil {
				return fail(err)
			}
		}
		if m.Subpath != "" {
			var err error
			if src, err = r.subpath(s.Id, i, src, m.Subpath); err != nil {
				return fail(err)
			}
		}
		return bind(src, target, m.ReadOnly, "rprivate"), nil
	}
	return fail(fmt.Errorf("mount type %v: %w", m.Type, errdefs.ErrInvalidArgument))
}

// subpath binds a directory or file below base to a place of ours. It is opened
// once with links kept inside base, so that a container which writes to the same
// volume can't swap it afterwards.
func (r *Runtime) subpath(id string, n int, base, sub string) (string, error) {
	if path.IsAbs(sub) || slices.Contains(strings.Split(sub, "/"), "..") {
		return "", fmt.Errorf("subpath %q must be relative and without ..: %w", sub, errdefs.ErrInvalidArgument)
	}
	point := filepath.Join(r.runDir(id), "sub", strconv.Itoa(n))
	if points, err := mountsBelow(point); err != nil || slices.Contains(points, point) {
		return point, err
	}
	h, err := securejoin.OpenInRoot(base, sub)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("subpath %q is not in the volume: %w", sub, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("subpath %q: %w", sub, err)
	}
	defer h.Close()
	st, err := h.Stat()
	if err != nil {
		return "", fmt.Errorf("subpath %q: %w", sub, err)
	}
	if err := os.MkdirAll(filepath.Dir(point), 0o711); err != nil {
		return "", fmt.Errorf("subpath %q: %w", sub, err)
	}
	if st.IsDir() {
		err = os.Mkdir(point, 0o711)
	} else {
		err = os.WriteFile(point, nil, 0o600)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("subpath %q: %w", sub, err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", h.Fd()), point, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("subpath %q: %w", sub, err)
	}
	return point, nil
}
