package oci

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/capability"
	"github.com/moby/sys/user"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// defaultCaps are Docker's.
var defaultCaps = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// boundingSet lists what this process, and so any container, can have at most.
func boundingSet() ([]string, error) {
	all, err := capability.ListSupported()
	if err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	var out []string
	for _, c := range all {
		if ok, err := capability.GetBound(c); err == nil && ok {
			out = append(out, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	return out, nil
}

// capabilities applies cap_add and cap_drop to the default set.
func (r *Runtime) capabilities(s *v1.RuntimeSpec) ([]string, error) {
	if s.Privileged {
		return r.caps, nil
	}
	norm := func(names []string) (out []string, all bool, err error) {
		for _, n := range names {
			n = strings.ToUpper(n)
			if n == "ALL" || n == "CAP_ALL" {
				all = true
				continue
			}
			if !strings.HasPrefix(n, "CAP_") {
				n = "CAP_" + n
			}
			if !slices.ContainsFunc(capability.ListKnown(), func(c capability.Cap) bool { return "CAP_"+strings.ToUpper(c.String()) == n }) {
				return nil, false, fmt.Errorf("capability %q is not known: %w", n, errdefs.ErrInvalidArgument)
			}
			out = append(out, n)
		}
		return out, all, nil
	}
	add, addAll, err := norm(s.CapAdd)
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := norm(s.CapDrop)
	if err != nil {
		return nil, err
	}
	set := slices.Clone(defaultCaps)
	switch {
	case addAll:
		set = slices.Clone(r.caps)
	case dropAll:
		set = nil
	}
	set = slices.DeleteFunc(set, func(c string) bool { return slices.Contains(drop, c) })
	for _, c := range add {
		if !slices.Contains(set, c) {
			set = append(set, c)
		}
	}
	return slices.DeleteFunc(set, func(c string) bool {
		missing := !slices.Contains(r.caps, c)
		if missing && slices.Contains(add, c) {
			r.log.Warn("capability left out: this process lacks it", "container", s.Id, "capability", c)
		}
		return missing
	}), nil
}

func capSets(caps []string, uid uint32) *specs.LinuxCapabilities {
	c := &specs.LinuxCapabilities{Bounding: caps}
	if uid == 0 {
		c.Effective, c.Permitted = caps, caps
	}
	return c
}

type account struct {
	specs.User
	home string
}

// rootFile opens a file of a container's root for reading; links can't lead out
// of it. Without the file the reader is empty.
func rootFile(root, name string) (io.ReadCloser, error) {
	h, err := securejoin.OpenInRoot(root, name)
	if errors.Is(err, fs.ErrNotExist) {
		return io.NopCloser(strings.NewReader("")), nil
	}
	if err != nil {
		return nil, err
	}
	defer h.Close()
	f, err := securejoin.Reopen(h, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, fmt.Errorf("%s in the image is no regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	return struct {
		io.Reader
		io.Closer
	}{io.LimitReader(f, 4<<20), f}, nil
}

// resolveUser finds ids, groups and home in the root's passwd and group files.
func resolveUser(root, who string, groups []string) (*account, error) {
	passwd, err := rootFile(root, "/etc/passwd")
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", who, err)
	}
	defer passwd.Close()
	group, err := rootFile(root, "/etc/group")
	if err != nil {
		return nil, fmt.Errorf("user %q: %w", who, err)
	}
	defer group.Close()
	u, err := user.GetExecUser(who, &user.ExecUser{Home: "/"}, passwd, group)
	if err != nil {
		return nil, fmt.Errorf("user %q: %w: %w", who, err, errdefs.ErrInvalidArgument)
	}
	a := &account{home: u.Home}
	a.UID, a.GID = uint32(u.Uid), uint32(u.Gid)
	// Docker puts the primary group among the additional ones.
	a.AdditionalGids = []uint32{a.GID}
	for _, g := range u.Sgids {
		a.AdditionalGids = append(a.AdditionalGids, uint32(g))
	}
	if len(groups) > 0 {
		g2, err := rootFile(root, "/etc/group")
		if err != nil {
			return nil, fmt.Errorf("groups: %w", err)
		}
		defer g2.Close()
		gids, err := user.GetAdditionalGroups(groups, g2)
		if err != nil {
			return nil, fmt.Errorf("groups %q: %w: %w", groups, err, errdefs.ErrInvalidArgument)
		}
		for _, g := range gids {
			a.AdditionalGids = append(a.AdditionalGids, uint32(g))
		}
	}
	slices.Sort(a.AdditionalGids)
	a.AdditionalGids = slices.Compact(a.AdditionalGids)
	return a, nil
}

// userName finds a name for an id in the root's passwd; the number if there is none.
func userNames(root string) func(uid uint32) string {
	names := map[uint32]string{}
	if f, err := rootFile(root, "/etc/passwd"); err == nil {
		defer f.Close()
		if us, err := user.ParsePasswd(f); err == nil {
			for _, u := range us {
				if _, dup := names[uint32(u.Uid)]; !dup {
					names[uint32(u.Uid)] = u.Name
				}
			}
		}
	}
	return func(uid uint32) string {
		if n, ok := names[uid]; ok {
			return n
		}
		return strconv.FormatUint(uint64(uid), 10)
	}
}
