package oci

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// devices sets the device nodes and what the device controller lets through.
// runc itself makes /dev/null, zero, full, random, urandom, tty and ptmx.
func (r *Runtime) devices(sp *specs.Spec, s *v1.RuntimeSpec) error {
	res := &specs.LinuxResources{}
	sp.Linux.Resources = res
	if s.Privileged {
		res.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		return r.allDevices(sp)
	}
	// Docker's: make any node, use the harmless ones.
	res.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	for _, k := range []string{"c", "b"} {
		res.Devices = append(res.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: k, Access: "m"})
	}
	for _, d := range s.Devices {
		perms := d.Permissions
		if perms == "" {
			perms = "rwm"
		}
		if strings.Trim(perms, "rwm") != "" {
			return fmt.Errorf("container %s: permissions %q of device %s: %w", s.Id, perms, d.PathOnHost, errdefs.ErrInvalidArgument)
		}
		to := d.PathInContainer
		if to == "" {
			to = d.PathOnHost
		}
		if !path.IsAbs(to) || !path.IsAbs(d.PathOnHost) {
			return fmt.Errorf("container %s: device %q must be an absolute path: %w", s.Id, d.PathOnHost, errdefs.ErrInvalidArgument)
		}
		err := eachDevice(d.PathOnHost, func(p string, dev specs.LinuxDevice) {
			dev.Path = path.Join(to, strings.TrimPrefix(p, d.PathOnHost))
			sp.Linux.Devices = append(sp.Linux.Devices, dev)
			major, minor := dev.Major, dev.Minor
			res.Devices = append(res.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: dev.Type, Major: &major, Minor: &minor, Access: perms})
		})
		if err != nil {
			return fmt.Errorf("container %s: device %s: %w: %w", s.Id, d.PathOnHost, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// allDevices gives a privileged container this kernel's nodes.
func (r *Runtime) allDevices(sp *specs.Spec) error {
	skip := []string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console"}
	return eachDevice("/dev", func(p string, dev specs.LinuxDevice) {
		for _, s := range skip {
			if p == s || strings.HasPrefix(p, s+"/") {
				return
			}
		}
		switch p { // runc makes these
		case "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx":
			return
		}
		dev.Path = p
		sp.Linux.Devices = append(sp.Linux.Devices, dev)
	})
}

// eachDevice calls fn for a node, or for all nodes of a directory.
func eachDevice(root string, fn func(p string, d specs.LinuxDevice)) error {
	if real, err := filepath.EvalSymlinks(root); err == nil && real != root {
		return eachDevice(real, func(p string, d specs.LinuxDevice) { fn(root+strings.TrimPrefix(p, real), d) })
	}
	found := false
	err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && p != root {
				return nil
			}
			return err
		}
		if e.Type()&fs.ModeDevice == 0 {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return nil
		}
		d := specs.LinuxDevice{Type: "b", Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev))}
		if st.Mode&unix.S_IFMT == unix.S_IFCHR {
			d.Type = "c"
		}
		mode := os.FileMode(st.Mode & 0o777)
		uid, gid := st.Uid, st.Gid
		d.FileMode, d.UID, d.GID = &mode, &uid, &gid
		found = true
		fn(p, d)
		return nil
	})
	if err == nil && !found && root != "/dev" {
		err = errors.New("no device node is there")
	}
	return err
}
