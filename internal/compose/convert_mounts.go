package compose

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

func (c *converter) mounts(a at, s *types.ServiceConfig, iso v1.Isolation) []*v1.Mount {
	var out []*v1.Mount
	for _, v := range s.Volumes {
		b := a.in("volumes")
		if !path.IsAbs(v.Target) || path.Clean(v.Target) == "/" {
			b.bad("target %q must be an absolute path below /", v.Target)
			continue
		}
		m := &v1.Mount{Source: v.Source, Target: path.Clean(v.Target), ReadOnly: v.ReadOnly}
		switch v.Type {
		case types.VolumeTypeVolume:
			m.Type = v1.Mount_TYPE_VOLUME
			if v.Volume != nil {
				m.NoCopy, m.Subpath = v.Volume.NoCopy, v.Volume.Subpath
				if m.Subpath != "" && !filepath.IsLocal(m.Subpath) {
					b.bad("subpath %q must stay inside the volume", m.Subpath)
				}
			}
		case types.VolumeTypeBind:
			m.Type = v1.Mount_TYPE_BIND
			if iso != v1.Isolation_ISOLATION_METAL {
				b.bad("bind mount %s: the files of the host are not visible in a machine; use a named volume, configs, or x-tandem.isolation: metal", v.Source)
				continue
			}
			if v.Bind != nil {
				m.Propagation = v.Bind.Propagation
				if !slices.Contains([]string{"", "rprivate", "private", "rshared", "shared", "rslave", "slave"}, m.Propagation) {
					b.bad("propagation %q is not known", m.Propagation)
				}
			}
		case types.VolumeTypeTmpfs:
			m.Type, m.Source = v1.Mount_TYPE_TMPFS, ""
			if v.Tmpfs != nil {
				m.TmpfsSizeBytes = c.bytes(b, v.Tmpfs.Size)
				m.TmpfsMode = v.Tmpfs.Mode & 0o7777
			}
		default:
			b.bad("type %q is not supported; use volume, tmpfs, or bind on metal", v.Type)
			continue
		}
		out = append(out, m)
	}
	for _, t := range s.Tmpfs {
		out = append(out, c.tmpfs(a.in("tmpfs"), t))
	}
	return out
}

// tmpfs reads "/run:size=64m,mode=1777".
func (c *converter) tmpfs(a at, text string) *v1.Mount {
	target, options, _ := strings.Cut(text, ":")
	m := &v1.Mount{Type: v1.Mount_TYPE_TMPFS, Target: path.Clean(target)}
	if !path.IsAbs(target) || m.Target == "/" {
		a.bad("target %q must be an absolute path below /", target)
	}
	for o := range strings.SplitSeq(options, ",") {
		k, v, _ := strings.Cut(o, "=")
		switch k {
		case "", "rw", "noexec", "nosuid", "nodev":
		case "ro":
			m.ReadOnly = true
		case "size":
			n, err := resource.ParseMemory(v)
			if err != nil {
				a.bad("%s: size %q is not a number of bytes with a unit", target, v)
			}
			m.TmpfsSizeBytes = n
		case "mode":
			n, err := strconv.ParseUint(v, 8, 32)
			if err != nil || n > 0o7777 {
				a.bad("%s: mode %q is not an octal file mode", target, v)
			}
			m.TmpfsMode = uint32(n)
		default:
			a.bad("%s: option %q is not supported; size and mode are", target, o)
		}
	}
	return m
}

func (c *converter) volume(a at, name string, v *types.VolumeConfig) *v1.VolumeRequest {
	out := &v1.VolumeRequest{Name: name, Labels: v.Labels, External: bool(v.External)}
	switch {
	case bool(v.External):
		out.ExternalName = v.Name
		if out.ExternalName == "" {
			out.ExternalName = name
		}
	case v.Name != "" && v.Name != c.project.Name+"_"+name:
		a.in("name").note("has no effect: volumes are named within their project; this one is %s", name)
	}
	if v.Driver != "" && v.Driver != "local" {
		a.in("driver").bad("%q is not supported yet; use local", v.Driver)
	}
	out.SizeBytes = c.volumePolicy(a.in(extension), v.Extensions[extension])
	return out
}

// files are a service's configs and secrets.
func (c *converter) files(a at, s *types.ServiceConfig) []*v1.File {
	var out []*v1.File
	add := func(b at, ref types.FileReferenceConfig, obj types.FileObjectConfig, place, dir string, secret bool) {
		o := at{c.report, place + "." + ref.Source}
		if obj.External {
			o.in("external").bad("there is no store for it yet: use file or environment")
			return
		}
		content, err := c.content(obj)
		if err != nil {
			o.bad("%s", err)
			return
		}
		target := ref.Target
		if target == "" {
			target = ref.Source
		}
		if !path.IsAbs(target) {
			target = dir + "/" + target
		}
		f := &v1.File{Target: path.Clean(target), Content: content, Mode: 0o444, Secret: secret}
		if strings.HasSuffix(target, "/") || f.Target == "/" {
			b.bad("target %q is not a file", target)
		}
		if ref.Mode != nil {
			if *ref.Mode < 0 || *ref.Mode > 0o7777 {
				b.bad("mode %o of %s is not a file mode", int64(*ref.Mode), ref.Source)
			}
			f.Mode = uint32(*ref.Mode) & 0o7777
		}
		f.Uid = c.id(b.in("uid"), ref.UID)
		f.Gid = c.id(b.in("gid"), ref.GID)
		out = append(out, f)
	}
	for _, r := range s.Configs {
		add(a.in("configs"), types.FileReferenceConfig(r), types.FileObjectConfig(c.project.Configs[r.Source]), "configs", "", false)
	}
	for _, r := range s.Secrets {
		add(a.in("secrets"), types.FileReferenceConfig(r), types.FileObjectConfig(c.project.Secrets[r.Source]), "secrets", "/run/secrets", true)
	}
	return out
}

func (c *converter) id(a at, text string) uint32 {
	if text == "" {
		return 0
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		a.bad("%q is not a number; names of users are known in the container only", text)
	}
	return uint32(n)
}

// content reads what a config or secret holds. Errors never show it.
func (c *converter) content(o types.FileObjectConfig) ([]byte, error) {
	switch {
	case o.Environment != "":
		v, ok := c.project.Environment[o.Environment]
		if !ok {
			return nil, fmt.Errorf("environment variable %s is not set", o.Environment)
		}
		o.Content = v
		fallthrough
	case o.File == "":
		if len(o.Content) > MaxFile {
			return nil, fmt.Errorf("is larger than %s", resource.FormatMemory(MaxFile))
		}
		return []byte(o.Content), nil
	}
	info, err := os.Stat(o.File)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("file %s does not exist", o.File)
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", o.File)
	}
	f, err := os.Open(o.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxFile {
		return nil, fmt.Errorf("file %s is larger than %s", o.File, resource.FormatMemory(MaxFile))
	}
	return b, nil
}
