package hostnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// dropBusy takes services out of w that would hide a program of this host: one
// that listens on the same port. Published ports are rules, not sockets, so the
// kernel itself would not mind. Only ports that are not ours already are tried.
func (t *tables) dropBusy(w *wanted) error {
	var errs []error
	for k, bs := range w.services {
		if len(bs) == 0 || t.cur != nil && len(t.cur.services[k]) > 0 {
			continue
		}
		err := tryBind(k)
		switch {
		case err == nil:
			continue
		case errors.Is(err, unix.EADDRINUSE):
			err = fmt.Errorf("published port %s: another program of this host listens there: stop it, or publish another port: %w", k, errdefs.ErrAlreadyExists)
		case errors.Is(err, unix.EADDRNOTAVAIL):
			err = fmt.Errorf("published port %s: this host does not have that address: %w", k, errdefs.ErrFailedPrecondition)
		default:
			err = fmt.Errorf("published port %s: %w", k, err)
		}
		errs = append(errs, err)
		delete(w.services, k)
	}
	slices.SortFunc(errs, func(a, b error) int { return compareStrings(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func compareStrings(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// tryBind binds a socket, without listening, and closes it.
func tryBind(k svcKey) error {
	typ := unix.SOCK_STREAM
	switch k.proto {
	case unix.IPPROTO_UDP:
		typ = unix.SOCK_DGRAM
	case unix.IPPROTO_SCTP:
		return nil // few kernels have it, and then nobody listens
	}
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if typ == unix.SOCK_STREAM { // connections that are just closing don't count
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	ip := k.ip
	if k.port == 53 && ip.IsUnspecified() {
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1}) // not our own name server
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Port: int(k.port), Addr: ip.As4()})
}
