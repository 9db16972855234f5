package agent

import (
	"crypto/sha256"
	"encoding/hex"
	"time"

	"google.golang.org/protobuf/proto"

	v1 "tandem/api/tandem/v1"
)

// containerRecord is what the agent has done for a container. It is written
// before the step it announces, so that after a kill at any instruction the
// next agent repeats the step (they are all idempotent) and forgets nothing.
// It holds no content of the spec but hashes: files may be secrets.
type containerRecord struct {
	Name    string `json:"name,omitempty"`
	Project string `json:"project,omitempty"`
	Machine string `json:"machine,omitempty"` // where it is; empty: this host
	Fixed   string `json:"fixed,omitempty"`   // hash of what can't change while it exists
	Live    string `json:"live,omitempty"`    // hash of the limits that it has now
	Made    bool   `json:"made,omitempty"`    // Create was called, or is about to be
	Anew    bool   `json:"anew,omitempty"`    // what a runtime may still have of it is of an earlier spec

	Image     string      `json:"image,omitempty"` // id
	Disks     []disk      `json:"disks,omitempty"`
	Volumes   []volumeUse `json:"volumes,omitempty"`
	CreatedAt time.Time   `json:"created_at,omitzero"`

	Grace      time.Duration `json:"grace,omitempty"` // it may take so long to end, also when nobody wants it any more
	GraceKnown bool          `json:"grace_known,omitempty"`

	Running   bool      `json:"running,omitempty"` // Start was called, and its end not seen
	Boot      string    `json:"boot,omitempty"`    // the kernel's run that Start was called in
	Run       int64     `json:"run,omitempty"`     // counts starts
	StartedAt time.Time `json:"started_at,omitzero"`

	LastExit   int64     `json:"last_exit,omitempty"` // which end was handled last
	FinishedAt time.Time `json:"finished_at,omitzero"`
	ExitCode   int32     `json:"exit_code,omitempty"`
	OOM        bool      `json:"oom,omitempty"`

	Done       bool        `json:"done,omitempty"`    // ended, and its policy lets it rest
	Stopped    bool        `json:"stopped,omitempty"` // was stopped because that was asked
	Failure    string      `json:"failure,omitempty"` // why it could not be started, for good
	Generation uint64      `json:"generation,omitempty"`
	RestartGen uint64      `json:"restart_gen,omitempty"`
	Restarts   int32       `json:"restarts,omitempty"`
	Delay      backoff     `json:"delay,omitzero"`
	NextStart  time.Time   `json:"next_start,omitzero"`
	Health     healthState `json:"health,omitzero"`
	Recreated  bool        `json:"recreated,omitempty"`
}

// machineRecord is what the agent has done for a machine.
type machineRecord struct {
	RestartGen  uint64        `json:"restart_gen,omitempty"`
	Restarts    int32         `json:"restarts,omitempty"`
	Started     bool          `json:"started,omitempty"` // was started once
	Clean       bool          `json:"clean,omitempty"`   // its scratch disk is whole: left in order, not used since
	StartMethod string        `json:"start_method,omitempty"`
	StartTook   time.Duration `json:"start_took,omitempty"`
	Boots       int           `json:"boots,omitempty"` // counts starts
}

// hashes splits a container's assignment into what a container must be made
// anew for, and what can be changed while it runs. What only the agent or the
// server look at (policies, checks, ports, intent) is in neither.
func hashes(a *v1.ContainerAssignment) (fixed, live string) {
	live = hashProto(a.Spec.GetResources())
	c := proto.Clone(a).(*v1.ContainerAssignment)
	c.Name, c.Service, c.Project = "", "", ""
	c.Generation, c.RestartGeneration = 0, 0
	c.Stopped, c.Hold, c.Paused, c.StopTimeout = false, false, false, nil
	if s := c.Spec; s != nil {
		s.Resources, s.Restart, s.Healthcheck, s.Ports, s.DependsOn = nil, nil, nil, nil, nil
		s.StopGracePeriod, s.PullPolicy, s.AutoRemove, s.HostAffinity = nil, "", false, nil
		s.WorkClass, s.Annotations, s.Networks, s.Isolation = 0, nil, nil, 0
		s.Pool, s.ZoneAffinity = "", nil
	}
	return hashProto(c), live
}

func hashProto(m proto.Message) string {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return "unmarshalable"
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// exitToken names one end of a container.
func exitToken(st *v1.RuntimeStatus) int64 {
	if st.GetFinishedAt() == nil {
		return 1
	}
	return st.FinishedAt.AsTime().UnixNano()
}
