package oci

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"tandem/api/secopt"
)

// Docker's own profile, which users begin theirs with, is taken as it is.
func TestDefaultProfileAsText(t *testing.T) {
	b, err := json.Marshal(seccomp.DefaultProfile())
	if err != nil {
		t.Fatal(err)
	}
	if err := secopt.CheckProfile(string(b)); err != nil {
		t.Fatal(err)
	}
	sp := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}}}}
	want, err := seccomp.GetDefaultProfile(sp)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := seccomp.LoadProfile(string(b), sp); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v: %d rules, not %d", err, len(got.Syscalls), len(want.Syscalls))
	}
}
