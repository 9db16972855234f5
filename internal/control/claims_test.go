package control

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/control/fakehost"
	"tandem/internal/store"
)

// damage makes the newest value, or all values, of a record unreadable. The store
// is closed.
func damage(t *testing.T, dir string, k store.Key, all bool) {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(dir, "etcd/member/snap/db"), 0o600, &bbolt.Options{Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("key"))
		bad := map[string][]byte{}
		err := b.ForEach(func(rev, v []byte) error {
			kv := &mvccpb.KeyValue{}
			if err := proto.Unmarshal(v, kv); err != nil {
				return err
			}
			if string(kv.Key) != store.Prefix+string(k.Kind)+"/"+k.Project+"/"+k.Name || len(kv.Value) == 0 {
				return nil
			}
			if !all {
				clear(bad)
			}
			kv.Value = []byte("\xff\xff rubbish")
			v, err := proto.Marshal(kv)
			bad[string(bytes.Clone(rev))] = v
			return err
		})
		if err == nil && len(bad) == 0 {
			t.Errorf("there is no %s", k)
		}
		for rev, v := range bad {
			if err == nil {
				err = b.Put([]byte(rev), v)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

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
			damage(t, l.dir, store.Key{Kind: store.Containers, Project: "p", Name: "bbb"}, all)
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
				s = l.until("with no host that could tell, both wait and say why", func(s *store.Snapshot) bool {
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
