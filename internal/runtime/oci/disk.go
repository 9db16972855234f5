package oci

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// disk is a mounted block image. Its directory has a short name (a number),
// because overlay takes at most 4096 bytes of options for all layers.
type disk struct {
	name string // directory below diskDir
	req  *v1.MountDiskRequest
}

// loadDisks finds the disks of earlier processes; those that are not mounted any
// more are forgotten.
func (r *Runtime) loadDisks() error {
	es, err := os.ReadDir(r.diskDir(""))
	if err != nil {
		return fmt.Errorf("runtime: %w", err)
	}
	mounts, err := mountsBelow(r.diskDir(""))
	if err != nil {
		return err
	}
	for _, e := range es {
		n := e.Name()
		base, isRecord := strings.CutSuffix(n, ".json")
		if isRecord {
			if slices.Contains(mounts, r.diskDir(base)) {
				b, err := os.ReadFile(r.diskDir(n))
				d := &disk{name: base, req: &v1.MountDiskRequest{}}
				if err == nil {
					err = json.Unmarshal(b, d.req)
				}
				if err == nil {
					r.disks[d.req.Id] = d
					continue
				}
				r.log.Warn("record of a disk can't be read; unmounting it", "path", r.diskDir(n), "error", err)
				if err := unix.Unmount(r.diskDir(base), 0); err != nil {
					return fmt.Errorf("unmount %s: %w", r.diskDir(base), err)
				}
			}
			_ = os.Remove(r.diskDir(n))
		}
	}
	for _, e := range es {
		if e.IsDir() && !r.diskNameUsed(e.Name()) {
			if slices.Contains(mounts, r.diskDir(e.Name())) {
				if err := unix.Unmount(r.diskDir(e.Name()), 0); err != nil {
					return fmt.Errorf("unmount %s: %w", r.diskDir(e.Name()), err)
				}
			}
			_ = os.Remove(r.diskDir(e.Name()))
		}
	}
	return nil
}

func (r *Runtime) diskNameUsed(name string) bool {
	for _, d := range r.disks {
		if d.name == name {
			return true
		}
	}
	return false
}

// Mount implements runtime.Runtime.
func (r *Runtime) Mount(ctx context.Context, q *v1.MountDiskRequest) (string, error) {
	if q.GetId() == "" || len(q.Id) > 256 {
		return "", fmt.Errorf("disk id %q: %w", q.GetId(), errdefs.ErrInvalidArgument)
	}
	q = proto.CloneOf(q)
	if q.FsType == "" {
		q.FsType = "ext4"
	}
	if q.FsType != "ext4" && q.FsType != "erofs" {
		return "", fmt.Errorf("disk %s: file system %q is not supported (ext4, erofs): %w", q.Id, q.FsType, errdefs.ErrInvalidArgument)
	}
	if (q.Path != "") == (q.Serial != "") || (q.Path != "") != r.o.Metal {
		want := map[bool]string{true: "a path", false: "a serial"}[r.o.Metal]
		return "", fmt.Errorf("disk %s: this kernel finds disks by %s only: %w", q.Id, want, errdefs.ErrInvalidArgument)
	}
	r.diskMu.Lock()
	defer r.diskMu.Unlock()
	r.mu.Lock()
	have := r.disks[q.Id]
	r.mu.Unlock()
	if have != nil {
		if !proto.Equal(have.req, q) {
			return "", fmt.Errorf("disk %s is mounted from elsewhere or in another way; unmount it first: %w", q.Id, errdefs.ErrFailedPrecondition)
		}
		return r.diskDir(have.name), nil
	}
	d := &disk{req: q}
	for n := 1; ; n++ {
		d.name = strconv.FormatInt(int64(n), 36)
		if _, err := os.Lstat(r.diskDir(d.name)); errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	b, err := json.Marshal(q)
	if err == nil {
		err = os.Mkdir(r.diskDir(d.name), 0o755)
	}
	if err != nil {
		return "", fmt.Errorf("mount disk %s: %w", q.Id, err)
	}
	err = replaceFile(r.diskDir(d.name)+".json", b, 0o600)
	if err == nil {
		err = r.mountDisk(ctx, q, r.diskDir(d.name))
	}
	if err != nil {
		os.Remove(r.diskDir(d.name))
		os.Remove(r.diskDir(d.name) + ".json")
		return "", fmt.Errorf("mount disk %s: %w", q.Id, err)
	}
	r.mu.Lock()
	r.disks[q.Id] = d
	r.mu.Unlock()
	return r.diskDir(d.name), nil
}

func (r *Runtime) mountDisk(ctx context.Context, q *v1.MountDiskRequest, dir string) error {
	flags := uintptr(unix.MS_NODEV | unix.MS_NOATIME)
	if q.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	dev := ""
	if r.o.Metal {
		f, name, err := loopDevice(q.Path, q.ReadOnly)
		if err != nil {
			return err
		}
		defer f.Close() // autoclear: the mount holds it from here on
		dev = name
	} else {
		var err error
		if dev, err = findDisk(ctx, q.Serial, r.o.DeviceTimeout); err != nil {
			return err
		}
	}
	data := ""
	switch {
	case q.FsType == "ext4" && q.ReadOnly:
		data = "noload" // a read-only image has no journal to play back
	case q.FsType == "ext4":
		data = "noinit_itable" // the file is sparse: zeroing its inode tables would only fill it
	}
	if err := unix.Mount(dev, dir, q.FsType, flags, data); err != nil {
		return fmt.Errorf("%s of %s: %w", q.FsType, dev, err)
	}
	if !q.ReadOnly {
		// mkfs leaves it; programs that want an empty directory stumble over it.
		_ = unix.Rmdir(filepath.Join(dir, "lost+found"))
	}
	return nil
}

// Unmount implements runtime.Runtime.
func (r *Runtime) Unmount(ctx context.Context, id string) error {
	r.diskMu.Lock()
	defer r.diskMu.Unlock()
	r.mu.Lock()
	d := r.disks[id]
	user := ""
	if d != nil {
		for _, c := range r.ctrs {
			if usesDisk(c.spec, id) {
				user = c.id
			}
		}
	}
	r.mu.Unlock()
	if d == nil {
		return nil
	}
	if user != "" {
		return fmt.Errorf("disk %s is used by container %s; delete that first: %w", id, user, errdefs.ErrFailedPrecondition)
	}
	dir := r.diskDir(d.name)
	deadline := time.Now().Add(5 * time.Second)
	for wait := 5 * time.Millisecond; ; wait = min(2*wait, 200*time.Millisecond) {
		err := unix.Unmount(dir, 0)
		if err == nil || err == unix.EINVAL || err == unix.ENOENT {
			break
		}
		if err != unix.EBUSY {
			return fmt.Errorf("unmount disk %s: %w", id, err)
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("disk %s is busy: %w", id, errdefs.ErrFailedPrecondition)
		}
		time.Sleep(wait)
	}
	r.mu.Lock()
	delete(r.disks, id)
	r.mu.Unlock()
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unmount disk %s: %w", id, err)
	}
	_ = os.Remove(dir + ".json")
	return nil
}

// unmountUnused unmounts the disks of an earlier process that no container uses.
// On metal the caller lived in that process, and has forgotten them with it; a
// guest's caller is on its host, knows them still, and unmounts them itself.
func (r *Runtime) unmountUnused(ctx context.Context) {
	r.mu.Lock()
	var unused []string
next:
	for id := range r.disks {
		for _, c := range r.ctrs {
			if usesDisk(c.spec, id) {
				continue next
			}
		}
		unused = append(unused, id)
	}
	r.mu.Unlock()
	for _, id := range unused {
		if err := r.Unmount(ctx, id); err != nil {
			r.log.Warn("unmount a disk that no container uses", "disk", id, "error", err)
		}
	}
}

func usesDisk(s *v1.RuntimeSpec, id string) bool {
	if slices.Contains(s.GetLayers(), id) {
		return true
	}
	for _, m := range s.GetMounts() {
		if m.Type == v1.RuntimeMount_TYPE_DISK && m.Source == id {
			return true
		}
	}
	return false
}

// findDisk waits for the block device with a serial number, and until it can be
// opened: a disk that was just attached is there a moment before it can be.
func findDisk(ctx context.Context, serial string, timeout time.Duration) (string, error) {
	if len(serial) > 64 {
		return "", fmt.Errorf("disk serial %q: %w", serial, errdefs.ErrInvalidArgument)
	}
	deadline := time.Now().Add(timeout)
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		var last error
		if dev := lookForDisk(serial); dev != "" {
			if last = opens(dev); last == nil {
				return dev, nil
			}
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("disk with serial %s: %w", serial, ctx.Err())
		}
		if time.Now().After(deadline) && last != nil {
			return "", fmt.Errorf("the disk with serial %s can't be opened after %v: %w", serial, timeout, last)
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("no disk with serial %s appeared within %v: %w", serial, timeout, errdefs.ErrNotFound)
		}
		time.Sleep(wait)
	}
}

// opens says whether a device, or what stands behind its node, is ready.
func opens(dev string) error {
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func lookForDisk(serial string) string {
	names, _ := filepath.Glob("/sys/block/*/device/vpd_pg80")
	for _, p := range names {
		b, err := os.ReadFile(p)
		// Page 0x80: four bytes of header, then the serial number.
		if err != nil || len(b) < 4 || strings.TrimRight(strings.TrimSpace(string(b[4:])), "\x00") != serial {
			continue
		}
		dev := "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(p)))
		if _, err := os.Stat(dev); err == nil {
			return dev
		}
	}
	names, _ = filepath.Glob("/sys/block/vd*/serial")
	for _, p := range names {
		if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == serial {
			return "/dev/" + filepath.Base(filepath.Dir(p))
		}
	}
	return ""
}

// loopDevice puts a file behind a loop device that goes with its last user.
func loopDevice(path string, readOnly bool) (*os.File, string, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	back, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, "", err
	}
	defer back.Close()
	if st, err := back.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, "", fmt.Errorf("%s is no image file: %w", path, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, "", fmt.Errorf("loop devices: %w", err)
	}
	defer ctl.Close()
	var last error
	for try := 0; try < 100; try++ { // others take devices too
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, "", fmt.Errorf("no loop device is free: %w: %w", err, errdefs.ErrResourceExhausted)
		}
		name := "/dev/loop" + strconv.Itoa(n)
		dev, err := os.OpenFile(name, mode, 0)
		if errors.Is(err, os.ErrNotExist) { // no devtmpfs: make the node
			_ = unix.Mknod(name, unix.S_IFBLK|0o660, int(unix.Mkdev(7, uint32(n))))
			dev, err = os.OpenFile(name, mode, 0)
		}
		if err != nil {
			last = err
			continue
		}
		cfg := unix.LoopConfig{Fd: uint32(back.Fd()), Size: 4096}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		if readOnly {
			cfg.Info.Flags |= unix.LO_FLAGS_READ_ONLY
		}
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			return dev, name, nil
		}
		dev.Close()
		last = err
		if err != unix.EBUSY {
			break
		}
	}
	return nil, "", fmt.Errorf("loop device for %s: %w", path, last)
}

// mountsBelow lists mount points at or under dir in the order they were made.
func mountsBelow(dir string) ([]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("mounts: %w", err)
	}
	defer f.Close()
	var points []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	dir = filepath.Clean(dir)
	for sc.Scan() {
		fs := strings.Fields(sc.Text())
		if len(fs) < 5 {
			continue
		}
		p := unescape.Replace(fs[4])
		if p == dir || strings.HasPrefix(p, dir+"/") {
			points = append(points, p)
		}
	}
	return points, sc.Err()
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
