package agent

import (
	"fmt"

	"github.com/containerd/errdefs"

	v1 "tandem/api/tandem/v1"
)

// Limits of one host's intent: what a server may make an agent hold.
const (
	maxMachines   = 2000
	maxContainers = 20000
	maxVolumes    = 20000
)

// validateSpec refuses a HostSpec that can't be meant: actors rely on unique,
// well-formed ids and on references that resolve.
func validateSpec(s *v1.HostSpec) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("host spec revision %d: %s: %w", s.GetRevision(), fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if s == nil {
		return fmt.Errorf("no host spec: %w", errdefs.ErrInvalidArgument)
	}
	if s.ClusterId == "" {
		return bad("no cluster id")
	}
	if len(s.Machines) > maxMachines || len(s.Containers) > maxContainers || len(s.Volumes) > maxVolumes || len(s.DeletedVolumes) > maxVolumes || len(s.Leaving) > maxContainers {
		return bad("too many machines (%d), containers (%d) or volumes (%d)", len(s.Machines), len(s.Containers), len(s.Volumes))
	}
	machines := map[string]bool{}
	for _, m := range s.Machines {
		if !validID.MatchString(m.GetId()) || len(m.Id) > 48 || templateMachine(m.Id) || machines[m.Id] {
			return bad("machine id %q is malformed or there twice", m.GetId())
		}
		machines[m.Id] = true
	}
	containers := map[string]bool{}
	for _, c := range s.Containers {
		if !validID.MatchString(c.GetId()) || containers[c.Id] {
			return bad("container id %q is malformed or there twice", c.GetId())
		}
		containers[c.Id] = true
		if c.MachineId != "" && !machines[c.MachineId] {
			return bad("container %s is in machine %s, which is not in the spec", c.Id, c.MachineId)
		}
		if c.Spec == nil {
			return bad("container %s has no spec", c.Id)
		}
	}
	for _, l := range s.Leaving {
		if !validID.MatchString(l.GetId()) {
			return bad("container id %q is malformed", l.GetId())
		}
	}
	volumes := map[string]bool{}
	for _, v := range s.Volumes {
		if !validID.MatchString(v.GetId()) || volumes[v.Id] || ownDisk(v.Id) {
			return bad("volume id %q is malformed, reserved or there twice", v.GetId())
		}
		volumes[v.Id] = true
	}
	for _, id := range s.DeletedVolumes {
		if !validID.MatchString(id) || volumes[id] || ownDisk(id) {
			return bad("volume id %q to be removed is malformed, reserved or wanted too", id)
		}
	}
	return nil
}
