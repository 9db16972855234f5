package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"tandem/internal/guest/layout"
)

// hotplugPatience is how long a device that the host has attached may take to
// appear, if the caller's context does not end before.
const hotplugPatience = 20 * time.Second

// poll calls ready until it is true, errs, or time is over: again whenever a
// device has come, and now and then.
func poll(ctx context.Context, what string, ready func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, hotplugPatience)
	defer cancel()
	wait := time.Millisecond
	for {
		arrival, told := arrived.next()
		ok, err := ready()
		if ok || err != nil {
			return err
		}
		if told { // looking is work that keeps the device from coming
			wait = max(wait, 50*time.Millisecond)
		}
		select {
		case <-arrival:
		case <-ctx.Done():
			return fmt.Errorf("%s did not appear in this guest: %w", what, errdefs.ErrFailedPrecondition)
		case <-time.After(wait):
			wait = min(2*wait, 50*time.Millisecond)
		}
	}
}

// waitModules waits until PID 1 has loaded the modules of devices.
func waitModules(ctx context.Context) error {
	return poll(ctx, "the drivers", func() (bool, error) {
		_, err := os.Stat(layout.LateDone)
		return err == nil, nil
	})
}

// findDisk waits for the SCSI disk with a serial and returns its device.
func findDisk(ctx context.Context, serial string) (dev string, err error) {
	err = poll(ctx, fmt.Sprintf("disk with serial %q", serial), func() (bool, error) {
		pages, _ := filepath.Glob("/sys/block/sd*/device/vpd_pg80")
		for _, p := range pages {
			b, err := os.ReadFile(p)
			// Unit serial number page: header of four bytes, then the text.
			if err == nil && len(b) > 4 && strings.TrimSpace(string(b[4:])) == serial {
				dev = "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(p)))
				return opens(dev), nil
			}
		}
		return false, nil
	})
	return dev, err
}

// opens is false while a disk that was just attached is still being read in: its
// device exists, but opening it fails (ENXIO).
func opens(dev string) bool {
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// mountScratch puts the disk for writable layers and logs in its place.
func mountScratch(ctx context.Context, serial string) error {
	if serial == "" {
		return nil
	}
	dev, err := findDisk(ctx, serial)
	if err != nil {
		return err
	}
	var want, have unix.Stat_t
	if err := unix.Stat(dev, &want); err != nil {
		return fmt.Errorf("scratch disk %s: %w", dev, err)
	}
	if err := unix.Stat(layout.StateDir, &have); err == nil && have.Dev == want.Rdev {
		return nil // it is there already
	}
	// What the kernel finds broken must not take the guest with it.
	// The image is sparse: zeroing its inode tables would only fill it, and for
	// minutes keep a small machine busy.
	err = unix.Mount(dev, layout.StateDir, "ext4", unix.MS_NOATIME|unix.MS_NOSUID|unix.MS_NODEV, "errors=remount-ro,noinit_itable")
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("scratch disk %q (%s) has no ext4 file system; format it on the host: %w: %w", serial, dev, err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("mount scratch disk %q (%s): %w", serial, dev, err)
	}
	return os.Chmod(layout.StateDir, 0o711)
}
