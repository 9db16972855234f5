package endpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// setting is one of what makes this kernel's end of a link a router's port: a file
// below /proc/sys/net, with the link's name, or "default", between before and after.
type setting struct {
	before, after, value string
	attr                 int  // its number in IFLA_INET_CONF; 0: it has none
	byDefault            bool // what the kernel has for new links can be set without harm to containers
}

// The numbers are those of IPV4_DEVCONF_* in the kernel's linux/ip.h.
var portSettings = []setting{
	{before: "ipv6/conf/", after: "/disable_ipv6", value: "1", byDefault: true},
	{before: "ipv4/conf/", after: "/rp_filter", value: "1", attr: 8},
	{before: "ipv4/conf/", after: "/proxy_arp", value: "1", attr: 3},
	{before: "ipv4/conf/", after: "/send_redirects", value: "0", attr: 6},
	{before: "ipv4/conf/", after: "/accept_redirects", value: "0", attr: 4},
	{before: "ipv4/neigh/", after: "/proxy_delay", value: "0", byDefault: true},
}

var routeLocalnet = setting{before: "ipv4/conf/", after: "/route_localnet", value: "1", attr: 26}

// set makes it so for link name. A kernel without IPv6 has nothing to set there.
func (s setting) set(name string) error {
	err := sysctl(s.before+name+s.after, s.value)
	if errors.Is(err, fs.ErrNotExist) && s.before[:4] == "ipv6" {
		return nil
	}
	return err
}

// defaults makes what can be what new links have by themselves, and says what that is.
// New namespaces don't inherit these.
func defaults() (done []setting, err error) {
	for _, s := range portSettings {
		if !s.byDefault {
			continue
		}
		err := s.set("default")
		if errors.Is(err, fs.ErrNotExist) {
			continue // each link then has its own
		}
		if err != nil {
			return nil, err
		}
		done = append(done, s)
	}
	return done, nil
}

// settings makes this kernel's end a router's port, whatever it was.
func (m *Manager) settings(name string) error {
	for _, s := range m.port {
		if err := s.set(name); err != nil {
			return err
		}
	}
	return forwarding()
}

// settle is settings for a link that was just made, in fewer steps: a file of it below
// /proc/sys costs a kernel that is emulated 3 ms.
func (m *Manager) settle(host netlink.Link) error {
	var conf []setting
	for _, s := range m.port {
		switch {
		case slices.Contains(m.byself, s):
		case s.attr != 0:
			conf = append(conf, s)
		default:
			if err := s.set(host.Attrs().Name); err != nil {
				return err
			}
		}
	}
	if err := m.setConf(host.Attrs().Index, conf); err != nil {
		return fmt.Errorf("settings of %s: %w", host.Attrs().Name, err)
	}
	return forwarding()
}

// iflaInetConf is IFLA_INET_CONF of the kernel's linux/if_link.h.
const iflaInetConf = 1

// setConf sets several IPv4 settings of a link with one message.
func (m *Manager) setConf(index int, list []setting) error {
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC|unix.NLA_F_NESTED, nil)
	conf := spec.AddRtAttr(unix.AF_INET|unix.NLA_F_NESTED, nil).AddRtAttr(iflaInetConf|unix.NLA_F_NESTED, nil)
	for _, s := range list {
		var v uint32
		if s.value != "0" {
			v = 1
		}
		conf.AddRtAttr(s.attr, binary.NativeEndian.AppendUint32(nil, v))
	}
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	req.AddData(spec)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: m.raw}} // in the manager's namespace
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// forwarding turns the kernel into a router, if it is not one. Writing it resets
// other settings of all interfaces: only when needed.
func forwarding() error {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err == nil && len(b) > 0 && b[0] == '1' {
		return nil
	}
	return sysctl("ipv4/ip_forward", "1")
}
