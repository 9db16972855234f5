package agent

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

func TestRuntimeNetwork(t *testing.T) {
	front := &v1.NetworkSpec{Id: "n-f", Cidr: "10.64.0.0/24", Mtu: 1500}
	back := &v1.NetworkSpec{Id: "n-b", Cidr: "10.64.1.0/24", Mtu: 1400, Internal: true}
	addrs := []*v1.NetworkAddress{{NetworkId: "n-b", Ip: "10.64.1.5"}, {NetworkId: "n-f", Ip: "10.64.0.5"}}
	for name, x := range map[string]struct {
		a    *v1.ContainerAssignment
		nets []*v1.NetworkSpec
		want *v1.RuntimeNetwork
	}{
		"none": {&v1.ContainerAssignment{}, nil, &v1.RuntimeNetwork{Mode: "none"}},
		"of an older server": {&v1.ContainerAssignment{Ip: "10.64.0.5", Network: "n-f"}, []*v1.NetworkSpec{front},
			&v1.RuntimeNetwork{Address: "10.64.0.5/32", Mtu: 1500, Source: "10.64.0.5", Addresses: []*v1.RuntimeAddress{{Address: "10.64.0.5/32", Network: "10.64.0.0/24"}}}},
		"internal": {&v1.ContainerAssignment{Ip: "10.64.1.5", Network: "n-b", Addresses: addrs[:1]}, []*v1.NetworkSpec{back},
			&v1.RuntimeNetwork{Address: "10.64.1.5/32", Mtu: 1400, Addresses: []*v1.RuntimeAddress{{Address: "10.64.1.5/32", Network: "10.64.1.0/24"}}}},
		"both": {&v1.ContainerAssignment{Ip: "10.64.1.5", Network: "n-b", Addresses: addrs}, []*v1.NetworkSpec{back, front},
			&v1.RuntimeNetwork{Address: "10.64.1.5/32", Mtu: 1400, Source: "10.64.0.5", Addresses: []*v1.RuntimeAddress{
				{Address: "10.64.1.5/32", Network: "10.64.1.0/24"}, {Address: "10.64.0.5/32", Network: "10.64.0.0/24"}}}},
	} {
		x.a.Spec = &v1.ContainerSpec{}
		if x.want.Mode == "" {
			x.want.Mode, x.want.Gateway, x.want.DnsServers, x.want.DnsOptions = "routed", "169.254.1.1", []string{"169.254.1.1"}, []string{"ndots:0"}
		}
		if got, err := runtimeNetwork(x.a, x.nets, false); err != nil || !proto.Equal(got, x.want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, x.want)
		}
	}
}

// TestSeveralNetworks: the host's network, what is told, and what an incomplete intent
// keeps have all addresses; a container whose list changes is made anew.
func TestSeveralNetworks(t *testing.T) {
	rigged(t, func(r *rig) {
		r.machine("m-1")
		r.spec.Networks = []*v1.NetworkSpec{{Id: "n-f", Project: "p", Cidr: "10.64.0.0/24"}, {Id: "n-b", Project: "p", Cidr: "10.64.1.0/24"}}
		addrs := func(host string) []*v1.NetworkAddress {
			return []*v1.NetworkAddress{{NetworkId: "n-f", Ip: "10.64.0." + host}, {NetworkId: "n-b", Ip: "10.64.1." + host}}
		}
		for id, machine := range map[string]string{"c-1": "m-1", "c-2": ""} {
			c := r.container(id, machine)
			c.Ip, c.Network, c.Addresses = "10.64.0."+id[2:], "n-f", addrs(id[2:])
		}
		r.container("c-3", "").Ip = "10.64.0.3"
		r.spec.Names = []*v1.NameRecord{{Network: "n-f", Name: "web", Ips: []string{"10.64.0.2"}}, {Network: "n-b", Name: "web", Ips: []string{"10.64.1.2"}}}
		r.apply()
		r.until(time.Minute, "running", func() bool {
			return r.state("c-1", running)() && r.state("c-2", running)() && r.state("c-3", running)()
		})
		check := func() {
			t.Helper()
			s := r.a.networkState()
			got := map[string]string{}
			for _, c := range s.Containers {
				got[c.ID] = fmt.Sprint(c.IP, c.Further)
			}
			if fmt.Sprint(got) != "map[c-2:10.64.0.2[10.64.1.2] c-3:10.64.0.3[]]" {
				t.Errorf("metal: %v", got)
			}
			clients := map[string]bool{}
			for _, c := range s.Clients {
				clients[fmt.Sprint(c)] = true
			}
			if len(clients) != 2 || !clients["[10.64.0.1 10.64.1.1]"] || !clients["[10.64.0.2 10.64.1.2]"] || len(s.Names) != 2 {
				t.Errorf("clients: %v, names %v", clients, s.Names)
			}
		}
		check()
		for _, st := range r.full().Containers {
			want := map[string]string{"c-1": "[10.64.0.1 10.64.1.1]", "c-2": "[10.64.0.2 10.64.1.2]", "c-3": "[]"}
			if fmt.Sprint(st.Ips) != want[st.Id] {
				t.Errorf("%s is told to have %v", st.Id, st.Ips)
			}
		}
		whole := cloneSpec(r.spec)
		r.spec.Incomplete, r.spec.Containers, r.spec.Names = true, nil, nil
		r.apply()
		check()

		fixed, _ := hashes(whole.Containers[0])
		less := proto.CloneOf(whole.Containers[0])
		less.Addresses = less.Addresses[:1]
		if now, _ := hashes(less); now == fixed {
			t.Error("a container that leaves a network is not made anew")
		}
	})
}
