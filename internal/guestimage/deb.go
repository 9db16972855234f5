package guestimage

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
)

// metaPackage depends on Debian's newest cloud kernel.
const metaPackage = "linux-image-cloud-amd64"

// kernelPackage is what is used of a kernel's package.
type kernelPackage struct {
	release string
	vmlinuz []byte
	modules map[string][]byte // by name
	builtin map[string]bool
}

// readPackage unpacks a .deb in memory.
func readPackage(ctx context.Context, deb string) (*kernelPackage, error) {
	if _, err := os.Stat(deb); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	c := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.Start(); err != nil {
		return nil, fmt.Errorf("dpkg-deb (install the package dpkg): %w", err)
	}
	k, err := readTar(out)
	if err != nil {
		c.Process.Kill()
	} else {
		_, err = io.Copy(io.Discard, out)
	}
	if werr := c.Wait(); err == nil && werr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s: %w", werr, strings.TrimSpace(stderr.String()), errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, err
	}
	if k.vmlinuz == nil || len(k.modules) == 0 {
		return nil, fmt.Errorf("has no /boot/vmlinuz-* or no modules; take linux-image-*-cloud-amd64: %w", errdefs.ErrInvalidArgument)
	}
	return k, nil
}

func readTar(r io.Reader) (*kernelPackage, error) {
	k := &kernelPackage{modules: map[string][]byte{}, builtin: map[string]bool{}}
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return k, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		name := path.Clean("/" + h.Name)
		isModule := strings.HasSuffix(name, ".ko")
		isKernel := strings.HasPrefix(name, "/boot/vmlinuz-")
		isBuiltin := path.Base(name) == "modules.builtin"
		if h.Typeflag != tar.TypeReg || !isModule && !isKernel && !isBuiltin {
			continue
		}
		if h.Size > maxKernel {
			return nil, fmt.Errorf("%s is too large: %w", name, errdefs.ErrInvalidArgument)
		}
		b, err := io.ReadAll(t)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		switch {
		case isKernel:
			k.vmlinuz, k.release = b, strings.TrimPrefix(name, "/boot/vmlinuz-")
		case isBuiltin:
			for _, l := range strings.Fields(string(b)) {
				k.builtin[moduleName(l)] = true
			}
		default:
			k.modules[moduleName(name)] = b
		}
	}
}

// download finds the kernel's package in cache, or gets it with apt-get. When
// apt knows no newer one or is not there, the newest in the cache does.
func download(ctx context.Context, cache string) (string, error) {
	if cache == "" {
		return "", fmt.Errorf("guest image: neither a kernel package nor a cache directory given: %w", errdefs.ErrInvalidArgument)
	}
	cache, err := filepath.Abs(cache)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	pkg, aptErr := resolvePackage(ctx)
	if aptErr == nil {
		if have := newest(filepath.Join(cache, pkg.name+"_"+escape(pkg.version)+"_*.deb")); have != "" {
			return have, nil
		}
		if aptErr = fetchPackage(ctx, cache, pkg); aptErr == nil {
			if have := newest(filepath.Join(cache, pkg.name+"_"+escape(pkg.version)+"_*.deb")); have != "" {
				return have, nil
			}
			aptErr = errors.New("apt-get brought no file")
		}
	}
	if have := newest(filepath.Join(cache, "linux-image-*-cloud-amd64_*.deb")); have != "" {
		return have, nil
	}
	return "", fmt.Errorf("guest image: no kernel package: %w; run `apt-get update`, or give a linux-image-*-cloud-amd64 .deb: %w",
		aptErr, errdefs.ErrUnavailable)
}

type aptPackage struct{ name, version string }

// escape writes a version as apt does in file names (an epoch's colon).
func escape(version string) string { return strings.ReplaceAll(version, ":", "%3a") }

// resolvePackage asks apt which kernel the meta package depends on.
func resolvePackage(ctx context.Context) (aptPackage, error) {
	out, err := run(ctx, "", "apt-cache", "--no-all-versions", "show", metaPackage)
	if err != nil {
		return aptPackage{}, err
	}
	for _, l := range strings.Split(out, "\n") {
		deps, ok := strings.CutPrefix(l, "Depends:")
		if !ok {
			continue
		}
		for _, d := range strings.Split(deps, ",") {
			name, rest, _ := strings.Cut(strings.TrimSpace(d), " ")
			version := strings.Trim(strings.TrimSpace(rest), "()= ")
			if strings.HasPrefix(name, "linux-image-") && version != "" {
				return aptPackage{name, version}, nil
			}
		}
	}
	return aptPackage{}, fmt.Errorf("apt does not know on which kernel %s depends", metaPackage)
}

// fetchPackage downloads into a directory of its own first: a file in the cache is whole.
func fetchPackage(ctx context.Context, cache string, p aptPackage) error {
	tmp, err := os.MkdirTemp(cache, ".download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := run(ctx, tmp, "apt-get", "-q", "download", p.name+"="+p.version); err != nil {
		return err
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	for _, d := range debs {
		if err := os.Rename(d, filepath.Join(cache, filepath.Base(d))); err != nil {
			return err
		}
	}
	return nil
}

func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = dir
	c.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

// newest is the file that was written last of those that match.
func newest(pattern string) string {
	files, _ := filepath.Glob(pattern)
	sort.Slice(files, func(i, j int) bool {
		a, errA := os.Stat(files[i])
		b, errB := os.Stat(files[j])
		return errA == nil && errB == nil && a.ModTime().After(b.ModTime())
	})
	if len(files) == 0 {
		return ""
	}
	return files[0]
}
