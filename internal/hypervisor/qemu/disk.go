package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

// lunsPerTarget spreads disks over SCSI targets: slot n is target n/128, LUN n%128.
const lunsPerTarget = 128

var validDisk = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

func (d disk) node() string   { return fmt.Sprintf("d%d", d.Slot) }
func (d disk) device() string { return fmt.Sprintf("disk%d", d.Slot) }

// AttachDisk implements hypervisor.Driver. The file is opened here and handed
// over: the VMM could not open it by itself.
func (d *Driver) AttachDisk(ctx context.Context, id string, want hypervisor.Disk) error {
	if !validDisk.MatchString(want.ID) || len(want.Serial) > 36 || !printable(want.Serial) {
		return fmt.Errorf("disk %q, serial %q: bad id or serial: %w", want.ID, want.Serial, errdefs.ErrInvalidArgument)
	}
	return d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		if err := m.attachDisk(ctx, q, want); err != nil {
			return fmt.Errorf("attach disk %s to machine %s: %w", want.ID, id, err)
		}
		return nil
	})
}

func (m *machine) attachDisk(ctx context.Context, q *qmp.Client, want hypervisor.Disk) error {
	if m.forTemplate() {
		return fmt.Errorf("a machine that will be a template takes no disks: %w", errdefs.ErrFailedPrecondition)
	}
	taken := map[int]bool{}
	m.mu.Lock()
	for _, have := range m.run.Disks {
		if have.Disk.ID == want.ID {
			m.mu.Unlock()
			if have.Disk == want {
				return nil
			}
			return fmt.Errorf("another disk of this name is attached: %w", errdefs.ErrAlreadyExists)
		}
		taken[have.Slot] = true
	}
	m.mu.Unlock()
	dk := disk{Disk: want}
	for taken[dk.Slot] {
		dk.Slot++
	}
	if dk.Slot >= maxDisks {
		return fmt.Errorf("the machine has %d disks already: %w", maxDisks, errdefs.ErrResourceExhausted)
	}
	f, driver, err := openDisk(want)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := m.change(func(r *run) { r.Disks = append(r.Disks, dk) }); err != nil {
		m.forgetDisk(dk)
		return err
	}
	if err := plugDisk(ctx, q, dk, f, driver); err != nil {
		if !errors.Is(err, qmp.ErrClosed) && m.undoDisk(q, dk) == nil {
			m.forgetDisk(dk)
		}
		if strings.Contains(err.Error(), " lock") {
			return fmt.Errorf("it is in use by another machine: %w: %w", err, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	return nil
}

func openDisk(want hypervisor.Disk) (f *os.File, driver string, err error) {
	mode := os.O_RDWR
	if want.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err = os.OpenFile(want.Path, mode, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	} else if err != nil {
		return nil, "", err
	}
	fi, err := f.Stat()
	if err == nil {
		switch mode := fi.Mode(); {
		case mode.IsRegular():
			driver = "file"
		case mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0:
			driver = "host_device"
		default:
			err = fmt.Errorf("%s is neither a file nor a block device: %w", want.Path, errdefs.ErrInvalidArgument)
		}
	}
	if err == nil {
		var size int64
		if size, err = f.Seek(0, io.SeekEnd); err == nil && (size == 0 || size%512 != 0) {
			err = fmt.Errorf("%s has %d bytes; a disk has a multiple of 512: %w", want.Path, size, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, "", err
	}
	return f, driver, nil
}

func plugDisk(ctx context.Context, q *qmp.Client, dk disk, f *os.File, driver string) error {
	set := 100 + dk.Slot
	if err := q.DoWithFiles(ctx, "add-fd", qmp.Args{"fdset-id": set}, nil, f); err != nil {
		return err
	}
	// The node keeps a descriptor of its own.
	defer func() { _ = q.Do(ctx, "remove-fd", qmp.Args{"fdset-id": set}, nil) }()
	file := qmp.Args{
		"driver": driver, "node-name": fmt.Sprintf("f%d", dk.Slot),
		"filename": fmt.Sprintf("/dev/fdset/%d", set), "read-only": dk.Disk.ReadOnly, "auto-read-only": false,
	}
	node := qmp.Args{"driver": "raw", "node-name": dk.node(), "read-only": dk.Disk.ReadOnly, "auto-read-only": false, "file": file}
	if dk.Disk.ReadOnly {
		file["locking"] = "off" // many machines share it
	} else {
		file["locking"] = "on" // two writers would destroy it
		file["discard"], node["discard"] = "unmap", "unmap"
	}
	if err := q.Do(ctx, "blockdev-add", node, nil); err != nil {
		return err
	}
	dev := qmp.Args{
		"driver": "scsi-hd", "id": dk.device(), "bus": "scsi0.0", "drive": dk.node(),
		"channel": 0, "scsi-id": dk.Slot / lunsPerTarget, "lun": dk.Slot % lunsPerTarget, "rotation_rate": 1,
	}
	if dk.Disk.Serial != "" {
		dev["serial"] = dk.Disk.Serial
	}
	return q.Do(ctx, "device_add", dev, nil)
}

// DetachDisk implements hypervisor.Driver.
func (d *Driver) DetachDisk(ctx context.Context, id, name string) error {
	return d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		m.mu.Lock()
		var dk *disk
		for i := range m.run.Disks {
			if m.run.Disks[i].Disk.ID == name {
				c := m.run.Disks[i]
				dk = &c
			}
		}
		m.mu.Unlock()
		if dk == nil {
			return nil
		}
		if err := unplug(ctx, q, dk.device()); err != nil {
			return fmt.Errorf("detach disk %s of machine %s: %w", name, id, err)
		}
		if err := removeNode(ctx, q, dk.node()); err != nil {
			return fmt.Errorf("detach disk %s of machine %s: %w", name, id, err)
		}
		m.forgetDisk(*dk)
		return nil
	})
}

// removeNode drops a block node whose device is gone; the device's last
// requests may hold it for a moment.
func removeNode(ctx context.Context, q *qmp.Client, node string) error {
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := q.Do(ctx, "blockdev-del", qmp.Args{"node-name": node}, nil)
		if err == nil || qmp.IsRefused(err) && strings.Contains(err.Error(), "Failed to find node") {
			return nil
		}
		if !qmp.IsRefused(err) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// undoDisk removes what an attach that failed has left, whatever became of the
// caller's context.
func (m *machine) undoDisk(q *qmp.Client, dk disk) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := unplug(ctx, q, dk.device()); err != nil {
		return err
	}
	return removeNode(ctx, q, dk.node())
}

func (m *machine) forgetDisk(dk disk) {
	err := m.change(func(r *run) {
		var left []disk
		for _, have := range r.Disks {
			if have.Slot != dk.Slot {
				left = append(left, have)
			}
		}
		r.Disks = left
	})
	if err != nil { // stays in the record; found gone when the machine is adopted
		m.d.log.Error("record a detached disk", "machine", m.id, "disk", dk.Disk.ID, "error", err)
	}
}

// reconcileDevices corrects the record by what the VMM has: a driver may have
// been killed in the middle of an attach or a detach.
func (m *machine) reconcileDevices(ctx context.Context, q *qmp.Client) error {
	there, err := devices(ctx, q)
	if err != nil {
		return err
	}
	m.mu.Lock()
	r := m.run
	m.mu.Unlock()
	changed := false
	var disks []disk
	for _, dk := range r.Disks {
		if there[dk.device()] {
			disks = append(disks, dk)
			continue
		}
		changed = true
		if err := removeNode(ctx, q, dk.node()); err != nil {
			return err
		}
		_ = q.Do(ctx, "remove-fd", qmp.Args{"fdset-id": 100 + dk.Slot}, nil)
	}
	var nics []nic
	for _, n := range r.NICs {
		if there[n.device()] {
			nics = append(nics, n)
			continue
		}
		changed = true
		if err := removeNetdev(ctx, q, n); err != nil {
			return err
		}
	}
	if !changed {
		return nil
	}
	return m.change(func(r *run) { r.Disks, r.NICs = disks, nics })
}

func printable(s string) bool {
	for _, c := range s {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}
