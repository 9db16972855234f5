package guest

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watchUevents does what udev does elsewhere: CPUs that come are put online,
// limits follow memory. It runs in PID 1, so that it works while no agent does.
func watchUevents(log *slog.Logger) {
	for {
		err := listenUevents(log)
		log.Error("uevents", "error", err)
		time.Sleep(time.Second)
	}
}

// listenUevents follows CPUs and memory until something fails.
func listenUevents(log *slog.Logger) error {
	look := func() { // after events were lost, and for those before we listened
		onlineCPUs(log)
		scaleLimits()
	}
	return eachUevent(look, func(action, subsystem string) {
		switch {
		case subsystem == "cpu" && action == "add":
			onlineCPUs(log)
		case subsystem == "memory" && (action == "add" || action == "online"):
			scaleLimits()
		}
	})
}

// eachUevent calls each for what the kernel tells of its devices, and lost when
// some of that may have been missed, as at the beginning. It ends with an error.
func eachUevent(lost func(), each func(action, subsystem string)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1<<20)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return err
	}
	lost()
	buf := make([]byte, 16<<10)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			lost()
			continue
		case err != nil:
			return err
		}
		if nl, ok := from.(*unix.SockaddrNetlink); !ok || nl.Pid != 0 {
			continue // not from the kernel
		}
		action, subsystem := "", ""
		for _, kv := range bytes.Split(buf[:n], []byte{0}) {
			switch k, v, _ := strings.Cut(string(kv), "="); k {
			case "ACTION":
				action = v
			case "SUBSYSTEM":
				subsystem = v
			}
		}
		each(action, subsystem)
	}
}

// onlineCPUs puts every CPU that is present online. (OfflineCPUs is only followed
// by an unplug, whose event is not an "add".)
func onlineCPUs(log *slog.Logger) {
	files, _ := filepath.Glob("/sys/devices/system/cpu/cpu[0-9]*/online")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || strings.TrimSpace(string(b)) != "0" {
			continue
		}
		if err := os.WriteFile(f, []byte("1"), 0); err != nil {
			log.Error("bring a CPU online", "path", f, "error", err)
		}
	}
}
