package bed

import (
	"fmt"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Machine stands for a virtual machine: a namespace whose eth0 is wired to a tap
// of the host as QEMU wires a virtio NIC, frame by frame.
type Machine struct {
	*NS
	MAC  net.HardwareAddr
	host *os.File

	mu   sync.Mutex
	seen [][]byte
}

// NewMachine attaches a machine to an existing tap of this process's namespace.
// Its eth0 has the addresses (as /32) and a default route by 169.254.1.1.
func NewMachine(t testing.TB, tap, mac string, ips ...string) *Machine {
	t.Helper()
	m := &Machine{NS: NewNS(t)}
	var err error
	if m.MAC, err = net.ParseMAC(mac); err != nil {
		t.Fatal(err)
	}
	if m.host, err = openTap(tap); err != nil {
		t.Fatal(err)
	}
	var guest *os.File
	if err := m.Do(func() (err error) { guest, err = openTap("eth0"); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.host.Close(); guest.Close() })
	eth, err := m.NL.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func() error{
		func() error { return m.NL.LinkSetHardwareAddr(eth, m.MAC) },
		func() error { return m.NL.LinkSetUp(eth) },
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	for _, ip := range ips {
		if err := m.NL.AddrAdd(eth, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(32, 32)}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(ips) > 0 {
		if err := m.NL.RouteAdd(&netlink.Route{
			LinkIndex: eth.Attrs().Index, Gw: net.IPv4(169, 254, 1, 1).To4(), Flags: int(netlink.FLAG_ONLINK),
			Src: net.ParseIP(ips[0]).To4(),
		}); err != nil {
			t.Fatal(err)
		}
	}
	go m.pump(m.host, guest, m.note)
	go m.pump(guest, m.host, nil)
	return m
}

// Send puts a raw frame on the wire, past the machine's own kernel.
func (m *Machine) Send(frame []byte) error {
	_, err := m.host.Write(frame)
	return err
}

// Seen waits until the host has sent a frame that ok accepts.
func (m *Machine) Seen(d time.Duration, ok func(frame []byte) bool) bool {
	for end := time.Now().Add(d); ; time.Sleep(2 * time.Millisecond) {
		m.mu.Lock()
		for _, f := range m.seen {
			if ok(f) {
				m.mu.Unlock()
				return true
			}
		}
		m.mu.Unlock()
		if time.Now().After(end) {
			return false
		}
	}
}

func (m *Machine) note(f []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen = append(m.seen, append([]byte(nil), f...)); len(m.seen) > 4096 {
		m.seen = m.seen[2048:]
	}
}

func (m *Machine) pump(from, to *os.File, tee func([]byte)) {
	buf := make([]byte, 65536)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		if tee != nil {
			tee(buf[:n])
		}
		to.Write(buf[:n])
	}
}

func openTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	r, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "tap "+name), nil
}

// Wire joins this process's namespace and another by a veth pair.
func Wire(t testing.TB, name, cidr string, peer *NS, peerName, peerCIDR string) {
	t.Helper()
	la := netlink.NewLinkAttrs()
	la.Name = name
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: la, PeerName: peerName, PeerNamespace: netlink.NsFd(peer.Fd())}); err != nil {
		t.Fatal(err)
	}
	here, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(here) })
	there, err := peer.NL.LinkByName(peerName)
	if err != nil {
		t.Fatal(err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		t.Fatal(err)
	}
	b, err := netlink.ParseAddr(peerCIDR)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		netlink.AddrAdd(here, a), netlink.LinkSetUp(here), peer.NL.AddrAdd(there, b), peer.NL.LinkSetUp(there),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}
