package policy

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"tandem/api/resource"
	v1 "tandem/api/tandem/v1"
)

func cpus(n int64) *v1.Size { return &v1.Size{CpuMilli: 1000 * n} }

func TestChange(t *testing.T) {
	two := int32(2)
	p, err := Change(nil, &v1.ChangePolicyRequest{HostLosses: &two,
		Pools:  []*v1.Pool{{Path: "/b"}, {Path: "/a/x", Reservation: cpus(2)}, {Path: "/a", Reservation: cpus(3), Limit: cpus(4)}, {Path: "/c/d", Reservation: cpus(1)}},
		Quotas: []*v1.Quota{{Project: "shop", Machines: 1}}})
	if err != nil {
		t.Fatal(err)
	}
	if r := Reserved(p); r != (resource.Size{CPU: 4000}) {
		t.Error("reserved together:", r)
	}
	before := proto.Clone(p)
	q, err := Change(p, &v1.ChangePolicyRequest{Pools: []*v1.Pool{{Path: "/a", Limit: cpus(9)}}, RemovePools: []string{"/b", "/c/d", "/nobody"}, RemoveQuotas: []string{"shop"}})
	if err != nil {
		t.Fatal(err)
	}
	want := &v1.Policy{HostLosses: 2, Pools: []*v1.Pool{{Path: "/a", Limit: cpus(9)}, {Path: "/a/x", Reservation: cpus(2)}}}
	if !proto.Equal(q, want) {
		t.Errorf("changed to %v, want %v", q, want)
	}
	if !proto.Equal(p, before) {
		t.Error("the policy before was changed itself")
	}
	if _, err := Change(q, &v1.ChangePolicyRequest{RemovePools: []string{"/a"}}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/a/x") {
		t.Error("a pool with another inside went:", err)
	}
	if _, err := Change(q, &v1.ChangePolicyRequest{RemovePools: []string{"/a", "/a/x"}}); !errdefs.IsFailedPrecondition(err) {
		t.Error("the order of removal does not matter:", err)
	}
	if _, err := Change(q, &v1.ChangePolicyRequest{RemovePools: []string{"/a/x", "/a"}}); err != nil {
		t.Error(err)
	}
}

func TestChangeRefuses(t *testing.T) {
	three, under := int32(3), int32(-1)
	for want, r := range map[string]*v1.ChangePolicyRequest{
		"there are 0, 1 and 2":              {HostLosses: &three},
		"for -1 host losses":                {HostLosses: &under},
		`pool "a"`:                          {Pools: []*v1.Pool{{Path: "a"}}},
		`pool "/"`:                          {Pools: []*v1.Pool{{Path: "/"}}},
		`pool "/a//b"`:                      {Pools: []*v1.Pool{{Path: "/a//b"}}},
		`pool "/a/../b"`:                    {Pools: []*v1.Pool{{Path: "/a/../b"}}},
		"at most 255 long":                  {Pools: []*v1.Pool{{Path: strings.Repeat("/a", 128)}}},
		"out of range":                      {Pools: []*v1.Pool{{Path: "/a", Shares: -1}}},
		"pool /b: reservation":              {Pools: []*v1.Pool{{Path: "/b", Limit: cpus(-1)}}},
		"more than its limit of 1c":         {Pools: []*v1.Pool{{Path: "/a", Reservation: cpus(2), Limit: cpus(1)}}},
		"inside /a reserve 3c":              {Pools: []*v1.Pool{{Path: "/a", Reservation: cpus(2)}, {Path: "/a/x/y", Reservation: cpus(1)}, {Path: "/a/z", Reservation: cpus(2)}}},
		"together, more than its limit":     {Pools: []*v1.Pool{{Path: "/a", Limit: cpus(2)}, {Path: "/a/x", Reservation: cpus(3)}}},
		"no name of a project":              {Quotas: []*v1.Quota{{Project: "A b", Machines: 1}}},
		"quota of project a is out":         {Quotas: []*v1.Quota{{Project: "a", Machines: -1}}},
		"quota of project b bounds nothing": {Quotas: []*v1.Quota{{Project: "b"}}},
	} {
		if _, err := Change(nil, r); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	many := &v1.ChangePolicyRequest{}
	for i := range MaxPools + 1 {
		many.Pools = append(many.Pools, &v1.Pool{Path: fmt.Sprintf("/p%d", i)})
	}
	if _, err := Change(nil, many); !errdefs.IsInvalidArgument(err) {
		t.Error("too many pools:", err)
	}
}

func TestCompany(t *testing.T) {
	service := func(name string, iso v1.Isolation, rules ...*v1.CompanyRule) *v1.ServiceSpec {
		return &v1.ServiceSpec{Name: name, Template: &v1.ContainerSpec{Isolation: iso}, Company: rules}
	}
	near := func(s, layer string) *v1.CompanyRule {
		return &v1.CompanyRule{Service: s, Layer: layer, Near: true}
	}
	apart := func(s, layer string, n int32) *v1.CompanyRule {
		return &v1.CompanyRule{Service: s, Layer: layer, AtMost: n}
	}
	const own, metal, shared = v1.Isolation_ISOLATION_OWN, v1.Isolation_ISOLATION_METAL, v1.Isolation_ISOLATION_SHARED
	db := service("db", 0)
	for want, list := range map[string][]*v1.ServiceSpec{
		"":                        {db, service("web", 0, near("db", "machine"), apart("web", "host", 2), apart("gone", "zone", 0), near("gone", "zone"))},
		"is no name of a service": {service("web", 0, near("", "host"))},
		"there are machine":       {db, service("web", 0, apart("db", "rack", 0))},
		"at most -1":              {db, service("web", 0, apart("db", "host", -1))},
		"not near itself":         {service("web", 0, near("web", "host"))},
		"db has isolation own":    {service("db", own), service("web", 0, near("db", "machine"))},
		"isolation metal":         {db, service("web", metal, near("db", "machine"))},
		"isolation shared":        {db, service("web", shared, near("db", "machine"))},
		"can't both be":           {db, service("web", 0, near("db", "machine"), apart("db", "host", 0))},
		"from it (zone)":          {service("db", 0, apart("web", "zone", 0)), service("web", 0, near("db", "host"))},
	} {
		got := strings.Join(Company(list)["web"], "; ")
		if want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%q: %q", want, got)
		}
	}
	if got := Company([]*v1.ServiceSpec{db, service("web", 0, near("db", "host"), apart("db", "machine", 0))}); len(got) > 0 {
		t.Error("on the same host in different machines can be:", got)
	}
}
