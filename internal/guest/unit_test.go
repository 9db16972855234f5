package guest

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/runtime"
)

func TestAliasMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, want string
		ok            bool
	}{
		{"fs-overlay", "fs_overlay", true}, {"net-pf-16-proto-12", "net_pf_16_proto_12", true},
		{"virtio:d00000002v*", "virtio:d00000002v00001AF4", true}, {"fs-fuse", "fs_overlay", false}, {"[", "[", false},
	} {
		if got := aliasMatches(c.pattern, c.want); got != c.ok {
			t.Errorf("%q against %q: %v", c.want, c.pattern, got)
		}
	}
}

func TestParseNICsRefuses(t *testing.T) {
	const mac = "02:00:00:00:00:01"
	for name, n := range map[string]*v1.GuestNIC{
		"no MAC": {}, "long MAC": {Mac: "02:00:00:00:00:00:00:01"}, "MTU": {Mac: mac, Mtu: 100}, "gateway": {Mac: mac, Gateway: "gw"},
		"IPv6 gateway": {Mac: mac, Gateway: "fe80::1"}, "address": {Mac: mac, Addresses: []string{"10.0.0.1"}},
		"prefix": {Mac: mac, ContainerPrefixes: []string{"10.0.0.0/33"}}, "many": {Mac: mac, Addresses: make([]string, maxPrefixes+1)},
	} {
		if _, err := parseNICs(&v1.ConfigureNetworkRequest{Nics: []*v1.GuestNIC{n}}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := parseNICs(&v1.ConfigureNetworkRequest{DnsServers: []string{"1.1.1.1\nnameserver 2.2.2.2"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("DNS server: %v", err)
	}
	nics, err := parseNICs(&v1.ConfigureNetworkRequest{Nics: []*v1.GuestNIC{{Mac: mac, ContainerPrefixes: []string{"10.0.0.5/28"}}}})
	if err != nil || nics[0].prefixes[0].String() != "10.0.0.0/28" {
		t.Errorf("%v, %v", nics, err)
	}
}

func TestGuestIDsDiffer(t *testing.T) {
	if a, b := newGuestID(nil), newGuestID(nil); a == b || len(a) != 32 {
		t.Errorf("%q and %q", a, b)
	}
}

type noRuntime struct{ runtime.Runtime }

func (noRuntime) List(context.Context) ([]*v1.RuntimeStatus, error) { return nil, nil }

// Calls are refused before Configure, wait while the runtime opens, are told
// when it does not, and are served once it does.
func TestContainersOpenWhenConfigured(t *testing.T) {
	fail := make(chan error)
	c := newContainers(slog.New(slog.DiscardHandler), func(context.Context) (runtime.Runtime, error) {
		if err := <-fail; err != nil {
			return nil, err
		}
		return noRuntime{}, nil
	})
	if _, _, err := c.get(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("before: %v", err)
	}
	r := httptest.NewRequest(http.MethodPost, c.path()+"List", strings.NewReader("{}"))
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	c.ServeHTTP(w, r)
	if !strings.Contains(w.Body.String(), "failed_precondition") {
		t.Errorf("before, by HTTP: %s", w.Body)
	}
	c.start(t.Context())
	c.start(t.Context())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := c.get(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it opens: %v", err)
	}
	fail <- errors.New("disk full")
	if _, _, err := c.get(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("when it does not open: %v", err)
	}
	fail <- nil
	<-c.ready
	if rt, _, err := c.get(t.Context()); rt == nil || err != nil {
		t.Errorf("open: %v, %v", rt, err)
	}
	r = httptest.NewRequest(http.MethodPost, c.path()+"List", strings.NewReader("{}"))
	r.Header.Set("Content-Type", "application/json")
	w = httptest.NewRecorder()
	c.ServeHTTP(w, r)
	if w.Code != http.StatusOK {
		t.Errorf("open, by HTTP: %d %s", w.Code, w.Body)
	}
}
