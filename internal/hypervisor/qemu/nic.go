package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/hypervisor"
	"tandem/internal/hypervisor/qmp"
)

func (n nic) netdev() string { return fmt.Sprintf("net%d", n.Slot) }
func (n nic) device() string { return fmt.Sprintf("nic%d", n.Slot) }

// AttachNIC implements hypervisor.Driver.
func (d *Driver) AttachNIC(ctx context.Context, id string, want hypervisor.NIC) error {
	mac, err := net.ParseMAC(want.MAC)
	if err != nil || len(mac) != 6 || mac[0]&1 != 0 || !validDisk.MatchString(want.ID) || want.MTU != 0 && (want.MTU < 68 || want.MTU > 65535) {
		return fmt.Errorf("NIC %q with MAC %q and MTU %d: bad id, MAC or MTU: %w", want.ID, want.MAC, want.MTU, errdefs.ErrInvalidArgument)
	}
	return d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		if err := m.attachNIC(ctx, q, want, mac.String()); err != nil {
			return fmt.Errorf("attach NIC %s to machine %s: %w", want.ID, id, err)
		}
		return nil
	})
}

func (m *machine) attachNIC(ctx context.Context, q *qmp.Client, want hypervisor.NIC, mac string) error {
	if m.forTemplate() {
		return fmt.Errorf("a machine that will be a template takes no NICs: %w", errdefs.ErrFailedPrecondition)
	}
	taken := map[int]bool{}
	m.mu.Lock()
	for _, have := range m.run.NICs {
		if have.NIC.ID == want.ID {
			m.mu.Unlock()
			if have.NIC == want {
				return nil
			}
			return fmt.Errorf("another NIC of this name is attached: %w", errdefs.ErrAlreadyExists)
		}
		taken[have.Slot] = true
	}
	m.mu.Unlock()
	n := nic{NIC: want}
	for taken[n.Slot] {
		n.Slot++
	}
	if n.Slot >= maxNICs {
		return fmt.Errorf("the machine has %d NICs already: %w", maxNICs, errdefs.ErrResourceExhausted)
	}
	tap, err := openTap(want.Tap)
	if err != nil {
		return err
	}
	defer tap.Close()
	if err := m.change(func(r *run) { r.NICs = append(r.NICs, n) }); err != nil {
		m.forgetNIC(n)
		return err
	}
	err = plugNIC(ctx, q, n, tap, mac)
	if err != nil && !errors.Is(err, qmp.ErrClosed) {
		undo, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if unplug(undo, q, n.device()) == nil && removeNetdev(undo, q, n) == nil {
			m.forgetNIC(n)
		}
	}
	return err
}

func plugNIC(ctx context.Context, q *qmp.Client, n nic, tap *os.File, mac string) error {
	if err := q.DoWithFiles(ctx, "getfd", qmp.Args{"fdname": n.netdev()}, nil, tap); err != nil {
		return err
	}
	if err := q.Do(ctx, "netdev_add", qmp.Args{"type": "tap", "id": n.netdev(), "fd": n.netdev()}, nil); err != nil {
		_ = q.Do(ctx, "closefd", qmp.Args{"fdname": n.netdev()}, nil)
		return err
	}
	dev := qmp.Args{
		"driver": "virtio-net-pci", "id": n.device(), "netdev": n.netdev(),
		"bus": fmt.Sprintf("rp%d", n.Slot), "mac": mac, "romfile": "",
	}
	if n.NIC.MTU != 0 {
		dev["host_mtu"] = n.NIC.MTU
	}
	return q.Do(ctx, "device_add", dev, nil)
}

// openTap opens a tap device that exists.
func openTap(name string) (*os.File, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("tap %q: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if _, err := net.InterfaceByName(name); err != nil { // opening one that is not there would make it
		return nil, fmt.Errorf("tap %s is not on this host: %w", name, errdefs.ErrNotFound)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		_ = unix.Close(fd)
		if errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("tap %s is in use by another machine: %w", name, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("open tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// DetachNIC implements hypervisor.Driver. It waits for the guest to let go.
func (d *Driver) DetachNIC(ctx context.Context, id, name string) error {
	return d.with(ctx, id, func(ctx context.Context, m *machine, q *qmp.Client) error {
		m.mu.Lock()
		var n *nic
		for _, have := range m.run.NICs {
			if have.NIC.ID == name {
				n = &have
				break
			}
		}
		m.mu.Unlock()
		if n == nil {
			return nil
		}
		err := unplug(ctx, q, n.device())
		if err == nil {
			err = removeNetdev(ctx, q, *n)
		}
		if err != nil {
			return fmt.Errorf("detach NIC %s of machine %s: %w", name, id, err)
		}
		m.forgetNIC(*n)
		return nil
	})
}

func removeNetdev(ctx context.Context, q *qmp.Client, n nic) error {
	err := q.Do(ctx, "netdev_del", qmp.Args{"id": n.netdev()}, nil)
	if qmp.IsNotFound(err) || qmp.IsRefused(err) && strings.Contains(err.Error(), "not found") {
		return nil
	}
	return err
}

func (m *machine) forgetNIC(n nic) {
	err := m.change(func(r *run) {
		var left []nic
		for _, have := range r.NICs {
			if have.Slot != n.Slot {
				left = append(left, have)
			}
		}
		r.NICs = left
	})
	if err != nil {
		m.d.log.Error("record a detached NIC", "machine", m.id, "nic", n.NIC.ID, "error", err)
	}
}
