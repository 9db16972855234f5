package control

import (
	"strings"
	"testing"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
	"tandem/internal/store/storetest"
)

// TestUnreadableRecordKeepsItsAddressAndPorts: what a container has is not given to
// another while its record can't be read: an older copy of it tells, or its host;
// while nobody can tell, whoever needs one waits and says why.
func TestUnreadableRecordKeepsItsAddressAndPorts(t *testing.T) {
	for name, all := range map[string]bool{"older copy": false, "no copy": true} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, Options{})
			h := fakehost.New(fakehost.Options{})
			l.serve(h)
			port := []*v1.PortMapping{{ContainerPort: 80}}
			single := func(name string, ports []*v1.PortMapping) *v1.Container {
				return &v1.Container{Meta: &v1.Meta{Project: "p", Name: name, Id: strings.Repeat(name, 8)}, Status: &v1.ContainerStatus{},
					Spec: &v1.ContainerSpec{Image: "x", Isolation: v1.Isolation_ISOLATION_METAL, Ports: ports}}
			}
			l.create(project("p")...)
			l.create(single("aaa", port))
			l.create(single("bbb", port))
			s := l.until("two run", running(2))
			was := map[string]*v1.Assignment{}
			for _, c := range s.Containers {
				was[c.Meta.Name] = c.Assignment
			}
			l.end()
			storetest.Damage(t, l.dir, store.Key{Kind: store.Containers, Project: "p", Name: "bbb"}, all)
			l.start(Options{})
			l.create(single("ccc", nil), single("ddd", port))
			get := func(s *store.Snapshot, name string) *v1.Container {
				for _, c := range s.Containers {
					if c.Meta.Name == name {
						return c
					}
				}
				return &v1.Container{}
			}
			if all {
				l.until("with no host that could tell, both wait and say why", func(s *store.Snapshot) bool {
					return strings.Contains(get(s, "ccc").GetStatus().GetMessage(), "container p/bbb can't be read") &&
						strings.Contains(get(s, "ddd").GetStatus().GetMessage(), "tandem state purge")
				})
			}
			l.serve(h)
			placed := func(s *store.Snapshot, name string) bool { return get(s, name).GetAssignment().GetIp() != "" }
			s = l.until("the one without ports has a place", func(s *store.Snapshot) bool { return placed(s, "ccc") && (all || placed(s, "ddd")) })
			ips := map[string]bool{}
			for _, ip := range []string{was["aaa"].Ip, was["bbb"].Ip, get(s, "ccc").Assignment.Ip} {
				if ips[ip] || ip == "" {
					t.Errorf("address %q twice", ip)
				}
				ips[ip] = true
			}
			if all {
				if get(s, "ddd").Assignment != nil {
					t.Errorf("somebody got ports that may be another's: %v", get(s, "ddd").Assignment)
				}
				if err := l.st.Purge(t.Context(), store.Key{Kind: store.Containers, Project: "p", Name: "bbb"}); err != nil {
					t.Fatal(err)
				}
				s = l.until("without the record there is nothing to wait for", func(s *store.Snapshot) bool { return placed(s, "ddd") })
			}
			d := get(s, "ddd").Assignment
			if ips[d.Ip] && d.Ip != was["bbb"].Ip {
				t.Errorf("address %s twice", d.Ip)
			}
			if !all && (d.Ip == was["bbb"].Ip || d.Ports[0].HostPort == was["bbb"].Ports[0].HostPort || d.Ports[0].HostPort == was["aaa"].Ports[0].HostPort) {
				t.Errorf("%v is a's or b's: %v", d, was)
			}
		})
	}
}
