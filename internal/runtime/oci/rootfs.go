package oci

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	v1 "tandem/api/tandem/v1"
)

// Directories and files of a container below runDir(id):
//
//	rootfs/      overlay of its layers and its writable layer
//	config.json  the bundle's spec
//	etc/         hosts, hostname, resolv.conf
//	files/       tmpfs with secrets and configs
//	sub/<n>/     subpaths of volumes, bind-mounted
func (r *Runtime) rootfs(id string) string { return filepath.Join(r.runDir(id), "rootfs") }

// mountRoot puts the root file system together if it is not there yet.
func (r *Runtime) mountRoot(s *v1.RuntimeSpec) error {
	dir := r.rootfs(s.Id)
	if err := os.Mkdir(dir, 0o755); err != nil { // it is there: mounted, perhaps
		if points, err := mountsBelow(dir); err != nil || slices.Contains(points, dir) {
			return err
		}
	}
	if len(s.Layers) == 0 {
		return fmt.Errorf("container %s has no layers: %w", s.Id, errdefs.ErrInvalidArgument)
	}
	var lower []string
	r.mu.Lock()
	for i := len(s.Layers) - 1; i >= 0; i-- { // overlay wants the top one first
		d := r.disks[s.Layers[i]]
		if d == nil {
			r.mu.Unlock()
			return fmt.Errorf("container %s: layer %s is not mounted: %w", s.Id, s.Layers[i], errdefs.ErrFailedPrecondition)
		}
		if !slices.Contains(lower, d.name) { // the same layer twice changes nothing
			lower = append(lower, d.name)
		}
	}
	r.mu.Unlock()
	upper, work := filepath.Join(r.stateDir(s.Id), "upper"), filepath.Join(r.stateDir(s.Id), "work")
	if err := mkdirs(0o755, dir, upper, work); err != nil {
		return fmt.Errorf("container %s: %w", s.Id, err)
	}
	if err := copyRootAttrs(r.diskDir(lower[0]), upper); err != nil {
		return fmt.Errorf("container %s: %w", s.Id, err)
	}
	opts := "lowerdir=" + strings.Join(lower, ":") + ",upperdir=" + escapeOverlay(upper) + ",workdir=" + escapeOverlay(work)
	if len(opts) >= os.Getpagesize() {
		return fmt.Errorf("container %s: %d layers are too many for overlay: %w", s.Id, len(lower), errdefs.ErrInvalidArgument)
	}
	if err := mountIn(r.diskDir(""), "overlay", dir, "overlay", unix.MS_NOATIME, opts); err != nil {
		return fmt.Errorf("container %s: overlay of %d layers: %w", s.Id, len(lower), err)
	}
	return nil
}

func escapeOverlay(s string) string {
	return strings.NewReplacer(`\`, `\\`, ":", `\:`, ",", `\,`).Replace(s)
}

// mkdirs makes directories, those of them that are missing. Their parents are there
// or before them in the list: this asks the kernel once for each.
func mkdirs(mode os.FileMode, dirs ...string) error {
	for _, d := range dirs {
		err := os.Mkdir(d, mode)
		if errors.Is(err, os.ErrNotExist) {
			err = os.MkdirAll(d, mode)
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

// copyRootAttrs gives a fresh upper directory the image root's mode and owner.
func copyRootAttrs(from, to string) error {
	var a, b unix.Stat_t
	if err := unix.Stat(from, &a); err != nil {
		return err
	}
	if err := unix.Stat(to, &b); err != nil {
		return err
	}
	if b.Nlink > 2 || !empty(to) {
		return nil
	}
	if err := unix.Chown(to, int(a.Uid), int(a.Gid)); err != nil {
		return err
	}
	return unix.Chmod(to, a.Mode&0o7777)
}

func empty(dir string) bool {
	f, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	names, _ := f.Readdirnames(1)
	return len(names) == 0
}

// mountIn mounts with paths in data relative to dir. The working directory is
// changed on a thread of its own, which is thrown away.
func mountIn(dir, source, target, fsType string, flags uintptr, data string) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("unshare: %w", err)
			return
		}
		if err := unix.Chdir(dir); err != nil {
			done <- fmt.Errorf("chdir %s: %w", dir, err)
			return
		}
		done <- unix.Mount(source, target, fsType, flags, data)
	}()
	return <-done
}

// prepare makes everything a start needs that is not there yet: at Create, and
// again at Start, should the kernel have been booted in between.
func (r *Runtime) prepare(ctx context.Context, s *v1.RuntimeSpec, fresh bool) error {
	if err := mkdirs(0o711, r.runDir(s.Id), filepath.Join(r.runDir(s.Id), "etc")); err != nil {
		return fmt.Errorf("container %s: %w", s.Id, err)
	}
	if err := r.mountRoot(s); err != nil {
		return err
	}
	if err := r.writeEtc(s, fresh); err != nil {
		return err
	}
	if err := r.placeFiles(s, fresh); err != nil {
		return err
	}
	return ctx.Err()
}

// placeFiles puts secrets and configs on a tmpfs. The content of secrets is not
// kept with the spec; after a boot it is gone.
func (r *Runtime) placeFiles(s *v1.RuntimeSpec, fresh bool) error {
	if len(s.Files) == 0 {
		return nil
	}
	dir := filepath.Join(r.runDir(s.Id), "files")
	points, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	if slices.Contains(points, dir) && !fresh {
		return nil
	}
	total := 0
	for _, f := range s.Files {
		if f.Secret && !fresh {
			return fmt.Errorf("container %s: its secrets went with the last boot; create it again: %w", s.Id, errdefs.ErrFailedPrecondition)
		}
		total += len(f.Content) + 4096
	}
	if !slices.Contains(points, dir) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("files of container %s: %w", s.Id, err)
		}
		opts := fmt.Sprintf("mode=0700,size=%d", total+64<<10)
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, opts); err != nil {
			return fmt.Errorf("files of container %s: %w", s.Id, err)
		}
	}
	for i, f := range s.Files {
		path := filepath.Join(dir, fmt.Sprint(i))
		mode := os.FileMode(f.Mode & 0o777)
		if f.Mode == 0 {
			mode = 0o444
		}
		err := os.WriteFile(path, f.Content, 0o600)
		err = errors.Join(err, os.Chown(path, int(f.Uid), int(f.Gid)), os.Chmod(path, mode))
		if err != nil {
			return fmt.Errorf("file %s of container %s: %w", f.Target, s.Id, err)
		}
	}
	return nil
}

// writeEtc makes the files that Docker makes, when they are not there.
func (r *Runtime) writeEtc(s *v1.RuntimeSpec, fresh bool) error {
	host, n := hostname(s), s.GetNetwork()
	ips := []string{strings.TrimSuffix(n.GetAddress(), "/32")}
	for i, a := range n.GetAddresses() {
		if i > 0 {
			ips = append(ips, strings.TrimSuffix(a.GetAddress(), "/32"))
		}
	}
	var hosts, resolv strings.Builder
	hosts.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, h := range s.ExtraHosts {
		if name, addr, ok := strings.Cut(h, ":"); ok {
			fmt.Fprintf(&hosts, "%s\t%s\n", strings.Trim(addr, "[]"), name)
		}
	}
	if ips[0] == "" {
		ips = []string{"127.0.1.1"}
	}
	for _, ip := range ips {
		if s.Domainname != "" {
			fmt.Fprintf(&hosts, "%s\t%s.%s %s\n", ip, host, s.Domainname, host)
		} else {
			fmt.Fprintf(&hosts, "%s\t%s\n", ip, host)
		}
	}
	for _, d := range n.GetDnsServers() {
		fmt.Fprintf(&resolv, "nameserver %s\n", d)
	}
	if len(n.GetDnsSearch()) > 0 {
		fmt.Fprintf(&resolv, "search %s\n", strings.Join(n.DnsSearch, " "))
	}
	if len(n.GetDnsOptions()) > 0 {
		fmt.Fprintf(&resolv, "options %s\n", strings.Join(n.DnsOptions, " "))
	}
	if n.GetMode() == "host" && len(n.GetDnsServers()) == 0 {
		b, _ := os.ReadFile("/etc/resolv.conf")
		resolv.Write(b)
	}
	for name, text := range map[string]string{"hosts": hosts.String(), "hostname": host + "\n", "resolv.conf": resolv.String()} {
		path, write := filepath.Join(r.runDir(s.Id), "etc", name), os.WriteFile
		if !fresh { // no half of a file may take another's place
			write = replaceFile
			if _, err := os.Stat(path); err == nil {
				continue // the container may have changed it
			}
		}
		if err := write(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("/etc/%s of container %s: %w", name, s.Id, err)
		}
	}
	return nil
}

func hostname(s *v1.RuntimeSpec) string {
	if s.Hostname != "" {
		return s.Hostname
	}
	return s.Id[:min(12, len(s.Id))]
}
