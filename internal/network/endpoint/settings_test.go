package endpoint_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"tandem/internal/network/endpoint"
	"tandem/internal/network/internal/bed"
)

// This kernel's end of a link is a router's port from the beginning, by whatever way
// it came to be so, and is made one again.
func TestSettings(t *testing.T) {
	want := map[string]string{
		"ipv6/conf/IF/disable_ipv6": "1", "ipv4/conf/IF/rp_filter": "1", "ipv4/conf/IF/proxy_arp": "1",
		"ipv4/conf/IF/send_redirects": "0", "ipv4/conf/IF/accept_redirects": "0", "ipv4/neigh/IF/proxy_delay": "0",
	}
	file := func(key, name string) string {
		return filepath.Join("/proc/sys/net", strings.Replace(key, "IF", name, 1))
	}
	check := func(name string) {
		t.Helper()
		for key, value := range want {
			if b, err := os.ReadFile(file(key, name)); err != nil || strings.TrimSpace(string(b)) != value {
				t.Errorf("%s: %q, want %s (%v)", file(key, name), b, value, err)
			}
		}
	}
	for _, sole := range []bool{false, true} {
		// Not what containers of a guest may have, where nothing keeps them from 127.0.0.1.
		want["ipv4/conf/IF/route_localnet"] = map[bool]string{true: "0", false: "1"}[sole]
		m, err := endpoint.New(endpoint.Options{NetnsDir: filepath.Join(t.TempDir(), "netns"), Sole: sole, RouteLocalnet: !sole})
		if err != nil {
			t.Fatal(err)
		}
		name := m.HostName("c")
		if err := m.Prepare(t.Context(), "c", routed("10.64.0.5")); err != nil {
			t.Fatal(err)
		}
		check(name)
		if _, err := m.Setup(t.Context(), "c", routed("10.64.0.5")); err != nil {
			t.Fatal(err)
		}
		check(name)
		for key, value := range want {
			if strings.HasSuffix(key, "route_localnet") && sole {
				continue // it is left alone there
			}
			other := map[string]string{"0": "1", "1": "0"}[value]
			if err := os.WriteFile(file(key, name), []byte(other), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		p, err := m.Setup(t.Context(), "c", routed("10.64.0.5"))
		if err != nil {
			t.Fatal(err)
		}
		check(name)
		// What is this kernel's default is not the container's.
		if out, err := bed.OpenNS(t, p).Run("cat", "/proc/sys/net/ipv6/conf/lo/disable_ipv6"); err != nil || out != "0\n" {
			t.Errorf("the container's loopback has no IPv6: %q %v", out, err)
		}
		if err := m.Teardown(t.Context(), "c"); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Whatever becomes of a prepared link before its Setup, the network is right after it.
func TestPreparedAndChanged(t *testing.T) {
	m, dir := manager(t)
	ctx := context.Background()
	peer, err := m.Setup(ctx, "peer", routed("10.64.0.9"))
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(id string) error{
		"nothing": func(string) error { return nil },
		"link removed": func(id string) error {
			l, err := netlink.LinkByName(m.HostName(id))
			if err == nil {
				err = netlink.LinkDel(l)
			}
			return err
		},
		"namespace unmounted": func(id string) error { return unix.Unmount(filepath.Join(dir, id), unix.MNT_DETACH) },
		"other address":       func(id string) error { return m.Prepare(ctx, id, routed("10.64.0.6")) },
		"prepared again":      func(id string) error { return m.Prepare(ctx, id, routed("10.64.0.5")) },
		"torn down":           func(id string) error { return m.Teardown(ctx, id) },
	} {
		t.Run(what, func(t *testing.T) {
			if err := m.Prepare(ctx, "c", routed("10.64.0.5")); err != nil {
				t.Fatal(err)
			}
			if err := change("c"); err != nil {
				t.Fatal(err)
			}
			p, err := m.Setup(ctx, "c", routed("10.64.0.5"))
			if err != nil {
				t.Fatal(err)
			}
			ns := bed.OpenNS(t, p)
			if err := talk(t, bed.OpenNS(t, peer), ns, "10.64.0.5"); err != nil {
				t.Error(err)
			}
			if err := m.Teardown(ctx, "c"); err != nil {
				t.Error(err)
			}
		})
	}
}
