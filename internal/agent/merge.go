package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/network"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// diskName gives a disk the one name it has everywhere: id of the attachment,
// SCSI serial (at most 36 characters) and id of the mount in the guest.
func diskName(prefix, id string) string {
	if prefix == "" && len(id) <= 36 {
		return id
	}
	sum := id
	if hexa, ok := strings.CutPrefix(id, "sha256:"); ok && len(hexa) == 64 {
		sum = hexa
	} else {
		h := sha256.Sum256([]byte(id))
		sum = hex.EncodeToString(h[:])
	}
	if prefix == "" {
		prefix = "v-"
	}
	return prefix + sum[:32]
}

// layerDisk names the disk of a layer by its diffID.
func layerDisk(diffID string) string { return diskName("l-", diffID) }

// volumeDisk names the disk of a volume by its id.
func volumeDisk(id string) string { return diskName("", id) }

// scratchID is the volume that holds a machine's writable layers and logs.
func scratchID(machine string) string { return "scratch-" + machine }

// anonymousID is the volume behind an anonymous mount of a container: the same
// name each time, so that a repeated step finds it again, and one that tells whose
// it is when no record does (see anonymousOf).
func anonymousID(container, target string) string {
	h := sha256.Sum256([]byte(target))
	return anonymousOf(container) + hex.EncodeToString(h[:6])
}

// anonymousOf is what the names of a container's anonymous volumes begin with.
func anonymousOf(container string) string {
	h := sha256.Sum256([]byte(container))
	return "anon-" + hex.EncodeToString(h[:8]) + "-"
}

// anonymousOwner cuts a name to what anonymousOf gives; false: it is none of these.
func anonymousOwner(volume string) (string, bool) {
	hexes, ok := strings.CutPrefix(volume, "anon-")
	owner, _, two := strings.Cut(hexes, "-")
	return "anon-" + owner + "-", ok && two
}

// ownDisk tells volumes that the agent makes by itself from named ones.
func ownDisk(id string) bool {
	return strings.HasPrefix(id, "scratch-") || strings.HasPrefix(id, "anon-")
}

// volumeUse is one volume that a container mounts.
type volumeUse struct {
	ID        string
	Target    string
	ReadOnly  bool
	Anonymous bool
}

// volumesOf lists the volumes of a container: assigned ones, anonymous ones of
// its spec, and those that its image declares and nothing covers.
func volumesOf(a *v1.ContainerAssignment, img *v1.ImageConfig) ([]volumeUse, error) {
	var out []volumeUse
	covered := map[string]bool{}
	assigned := map[string]*v1.AssignedMount{}
	for _, m := range a.Volumes {
		assigned[path.Clean(m.Target)] = m
	}
	for _, m := range a.Spec.Mounts {
		target := path.Clean(m.Target)
		if !path.IsAbs(target) || covered[target] {
			return nil, fmt.Errorf("mount target %q is not absolute or is there twice: %w", m.Target, errdefs.ErrInvalidArgument)
		}
		covered[target] = true
		if m.Type != v1.Mount_TYPE_VOLUME {
			continue
		}
		switch am := assigned[target]; {
		case am != nil:
			out = append(out, volumeUse{ID: am.VolumeId, Target: target, ReadOnly: am.ReadOnly || m.ReadOnly})
		case m.Source == "":
			out = append(out, volumeUse{ID: anonymousID(a.Id, target), Target: target, ReadOnly: m.ReadOnly, Anonymous: true})
		default:
			return nil, fmt.Errorf("volume %q for %s has no disk assigned on this host: %w", m.Source, target, errdefs.ErrInvalidArgument)
		}
	}
	for target, am := range assigned {
		if !covered[target] {
			covered[target] = true
			out = append(out, volumeUse{ID: am.VolumeId, Target: target, ReadOnly: am.ReadOnly})
		}
	}
	for _, v := range img.GetVolumes() {
		target := path.Clean("/" + v)
		if target != "/" && !covered[target] {
			covered[target] = true
			out = append(out, volumeUse{ID: anonymousID(a.Id, target), Target: target, Anonymous: true})
		}
	}
	slices.SortFunc(out, func(x, y volumeUse) int { return strings.Compare(x.Target, y.Target) })
	return out, nil
}

// runtimeSpec merges what the image says, what the user wants and what was
// prepared into what a runtime runs. The rules are Docker's.
func runtimeSpec(a *v1.ContainerAssignment, img *v1.ImageConfig, layers []string, vols []volumeUse, nets []*v1.NetworkSpec) (*v1.RuntimeSpec, error) {
	s := a.Spec
	metal := a.MachineId == ""
	if img == nil {
		img = &v1.ImageConfig{}
	}
	out := &v1.RuntimeSpec{
		Id: a.Id, Name: a.Name, Hostname: s.Hostname, Domainname: s.Domainname,
		Args: mergeArgs(s, img), Cwd: first(s.WorkingDir, img.WorkingDir, "/"), User: first(s.User, img.User), GroupAdd: s.GroupAdd,
		Tty: s.Tty, StdinOpen: s.StdinOpen, StdinOnce: s.StdinOnce, ReadOnly: s.ReadOnly, Privileged: s.Privileged, Init: s.Init,
		CapAdd: s.CapAdd, CapDrop: s.CapDrop, SecurityOpt: s.SecurityOpt, Layers: layers, Files: s.Files, Ulimits: s.Ulimits,
		Devices: s.Devices, Sysctls: s.Sysctls, Resources: s.Resources, OomScoreAdj: s.OomScoreAdj, ShmSizeBytes: s.ShmSizeBytes,
		Log: s.Log, StopSignal: first(s.StopSignal, img.StopSignal), ExtraHosts: s.ExtraHosts,
	}
	if len(out.Args) == 0 {
		return nil, fmt.Errorf("neither the image %s nor the container says which command to run (give one): %w", s.Image, errdefs.ErrInvalidArgument)
	}
	if out.Hostname == "" {
		out.Hostname = a.Id[:min(12, len(a.Id))]
	}
	out.Env = mergeEnv(s, img, out.Hostname)
	out.Labels = map[string]string{}
	maps.Copy(out.Labels, img.Labels)
	maps.Copy(out.Labels, s.Labels)

	byTarget := map[string]volumeUse{}
	for _, v := range vols {
		byTarget[v.Target] = v
	}
	for _, m := range s.Mounts {
		target := path.Clean(m.Target)
		switch m.Type {
		case v1.Mount_TYPE_VOLUME:
			v := byTarget[target]
			out.Mounts = append(out.Mounts, &v1.RuntimeMount{Type: v1.RuntimeMount_TYPE_DISK, Source: volumeDisk(v.ID), Target: target,
				ReadOnly: v.ReadOnly, Subpath: m.Subpath, CopyUp: !m.NoCopy && !v.ReadOnly && m.Subpath == ""})
			delete(byTarget, target)
		case v1.Mount_TYPE_BIND:
			if !metal {
				return nil, fmt.Errorf("bind mount of %s: a machine can't see the host's files (use a volume, or isolation: metal): %w", m.Source, errdefs.ErrFailedPrecondition)
			}
			out.Mounts = append(out.Mounts, &v1.RuntimeMount{Type: v1.RuntimeMount_TYPE_BIND, Source: m.Source, Target: target,
				ReadOnly: m.ReadOnly, Subpath: m.Subpath, Propagation: m.Propagation})
		case v1.Mount_TYPE_TMPFS:
			out.Mounts = append(out.Mounts, &v1.RuntimeMount{Type: v1.RuntimeMount_TYPE_TMPFS, Target: target, ReadOnly: m.ReadOnly,
				SizeBytes: m.TmpfsSizeBytes, Mode: m.TmpfsMode})
		default:
			return nil, fmt.Errorf("mount at %s has an unknown type %v: %w", target, m.Type, errdefs.ErrInvalidArgument)
		}
	}
	for _, target := range slices.Sorted(maps.Keys(byTarget)) {
		v := byTarget[target]
		out.Mounts = append(out.Mounts, &v1.RuntimeMount{Type: v1.RuntimeMount_TYPE_DISK, Source: volumeDisk(v.ID), Target: target,
			ReadOnly: v.ReadOnly, CopyUp: !v.ReadOnly})
	}
	var err error
	out.Network, err = runtimeNetwork(a, nets, metal)
	return out, err
}

// runtimeNetwork is the network of a container; nets are those of its addresses.
func runtimeNetwork(a *v1.ContainerAssignment, nets []*v1.NetworkSpec, metal bool) (*v1.RuntimeNetwork, error) {
	n := &v1.RuntimeNetwork{Mode: "routed", Gateway: network.Gateway, DnsServers: a.Spec.Dns, DnsSearch: a.Spec.DnsSearch}
	if len(n.DnsServers) == 0 {
		n.DnsServers = []string{network.Gateway}
		n.DnsOptions = []string{"ndots:0"}
	}
	switch mode := a.Spec.NetworkMode; mode {
	case "none":
		return &v1.RuntimeNetwork{Mode: "none"}, nil
	case "host":
		if !metal {
			return nil, fmt.Errorf("network_mode host: a container in a machine has no way into the host's network (publish ports, or use isolation: metal): %w", errdefs.ErrFailedPrecondition)
		}
		return &v1.RuntimeNetwork{Mode: "host", DnsServers: a.Spec.Dns, DnsSearch: a.Spec.DnsSearch}, nil
	case "", "bridge", "default", "routed":
		if a.Ip == "" {
			return &v1.RuntimeNetwork{Mode: "none"}, nil
		}
		n.Address = a.Ip + "/32"
		ips := append([]string{a.Ip}, further(a)...)
		for i, s := range nets[:min(len(nets), len(ips))] {
			n.Addresses = append(n.Addresses, &v1.RuntimeAddress{Address: ips[i] + "/32", Network: s.Cidr})
			// One interface carries all: what passes in the smallest passes in each.
			if s.Mtu != 0 && (n.Mtu == 0 || s.Mtu < n.Mtu) {
				n.Mtu = s.Mtu
			}
			// From an internal network there is no way out.
			if n.Source == "" && !s.Internal {
				n.Source = ips[i]
			}
		}
		return n, nil
	default:
		return nil, fmt.Errorf("network_mode %q is unknown (\"\", none or host): %w", mode, errdefs.ErrInvalidArgument)
	}
}

// mergeArgs follows Docker: an entrypoint of the user's drops the image's
// command; an empty one only the image's entrypoint.
func mergeArgs(s *v1.ContainerSpec, img *v1.ImageConfig) []string {
	entry, cmd := s.Entrypoint.GetValues(), s.Command.GetValues()
	if len(entry) == 0 {
		if len(cmd) == 0 && s.Command == nil {
			cmd = img.Command
		}
		if s.Entrypoint == nil {
			entry = img.Entrypoint
		}
	}
	if len(entry) == 1 && entry[0] == "" {
		entry = nil
	}
	return append(slices.Clone(entry), cmd...)
}

func mergeEnv(s *v1.ContainerSpec, img *v1.ImageConfig, hostname string) []string {
	base := []string{defaultPath, "HOSTNAME=" + hostname}
	if s.Tty {
		base = append(base, "TERM=xterm")
	}
	var out []string
	at := map[string]int{}
	for _, kv := range slices.Concat(base, img.Env, s.Env) {
		k, _, _ := strings.Cut(kv, "=")
		if i, ok := at[k]; ok {
			out[i] = kv
			continue
		}
		at[k] = len(out)
		out = append(out, kv)
	}
	return out
}

// mergeHealth gives the check that counts, or nil: the user's, with what it
// leaves open taken from the image's.
func mergeHealth(s *v1.ContainerSpec, img *v1.ImageConfig) *v1.HealthCheck {
	h, base := s.GetHealthcheck(), img.GetHealthcheck()
	if h == nil {
		h, base = base, nil
	}
	if h == nil {
		return nil
	}
	out := &v1.HealthCheck{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod, StartInterval: h.StartInterval, Retries: h.Retries}
	if base != nil {
		if len(out.Test) == 0 {
			out.Test = base.Test
		}
		if out.Interval == nil {
			out.Interval = base.Interval
		}
		if out.Timeout == nil {
			out.Timeout = base.Timeout
		}
		if out.StartPeriod == nil {
			out.StartPeriod = base.StartPeriod
		}
		if out.StartInterval == nil {
			out.StartInterval = base.StartInterval
		}
		if out.Retries == 0 {
			out.Retries = base.Retries
		}
	}
	if len(out.Test) == 0 || out.Test[0] == "NONE" || (len(out.Test) == 1) {
		return nil
	}
	return out
}

func first(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}
