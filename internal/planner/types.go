package planner

// Size is CPU in thousandths of a core and memory in bytes.
type Size struct {
	CPU    int64
	Memory int64
}

// Isolation says with whom a container shares its kernel.
type Isolation uint8

// The isolations; Project is the default.
const (
	Project Isolation = iota
	Shared
	Own
	Metal
)

// Class says who gives way first.
type Class uint8

// The classes; Latency is the default.
const (
	Latency Class = iota
	Batch
)

// Capabilities are what a host's back end can do with its machines.
type Capabilities struct {
	Grow       bool // hot-add of CPU and memory
	Shrink     bool
	Metal      bool
	MaxMachine Size  // highest ceiling; zero: the host's capacity
	MemoryStep int64 // growth happens in multiples; zero: 1
	CPUStep    int64 // as well; zero: 1000
	// BootSeconds and GrowSeconds are what an action takes here, for the cost.
	BootSeconds float64
	GrowSeconds float64
	// MoveSecondsGiB is what a live migration takes for each GiB; 0: the back end
	// can't migrate running machines.
	MoveSecondsGiB float64
	PowerOnSeconds float64
}

// Host is a server.
type Host struct {
	ID           string
	Zone         string
	Capacity     Size // what Tandem may use
	MachineExtra Size // VMM's cost on the host for each machine
	GuestExtra   Size // kernel's and agent's cost inside each machine
	Base         Size // a machine's size when it starts, guest overhead included
	Capabilities Capabilities
	Labels       map[string]string
	Cordoned     bool // takes nothing new
	Down         bool
	// Off says that the host is switched off and can be switched on when it is
	// worth it (PowerOn). It holds nothing.
	Off bool
}

// Machine is a VM; Size includes the guest's overhead.
type Machine struct {
	ID        string
	Host      string
	Project   string // "" with Shared
	Isolation Isolation
	Size      Size // what it has or is about to have
	Min       Size // never shrink below (a user's wish)
	Ceiling   Size
	Pinned    bool // by a user: not stopped for being empty
	Stopping  bool // takes nothing new
}

// Port is a port that a container publishes on its host.
type Port struct {
	Protocol string
	Port     uint16
	IP       string
}

// Container is a container to be placed or already placed.
type Container struct {
	ID        string
	Project   string
	Service   string
	Isolation Isolation
	Class     Class
	Request   Size // what it reserves
	Ports     []Port
	Volumes   []string // ids of volumes; see State.SetVolume
	Hosts     []string // only these host IDs; empty: any
	Zones     []string // only these zones; empty: any
	Pool      string   // "/a/b"; empty: none; see State.SetPool
	// Uncovered leaves the container out of the guarantee: it is not started
	// elsewhere when its host is lost, unless there happens to be room.
	Uncovered bool
	// Stateful says that it can't run twice: it is not moved by
	// start-before-stop; its machine may be migrated.
	Stateful bool
	Spread   string // "", "host", "machine", "zone"
	// AntiServices are services of its project that must not share its machine
	// (layer "machine") or host (layer "host").
	Anti []AntiRule
	// Near are services of its project one of which must be beside it, once any
	// of them runs.
	Near []NearRule
	// Machine and Host are where it is; empty: not placed.
	Machine string
	Host    string
}

// AntiRule keeps a container from the company of another service.
type AntiRule struct {
	Service string
	Layer   string // "machine", "host" or "zone"
	Max     int    // at most so many of Service beside this container
}

// NearRule asks for the company of another service.
type NearRule struct {
	Service string
	Layer   string // "machine", "host" or "zone"
}

// Kind is what an action does.
type Kind string

// The kinds of actions.
const (
	Place  Kind = "place"  // container into machine
	PlaceM Kind = "metal"  // container onto host
	Grow   Kind = "grow"   // machine, From -> To
	Shrink Kind = "shrink" // machine, From -> To
	Boot   Kind = "boot"   // new machine, size To, on Host
	Stop   Kind = "stop"   // empty machine
	Move   Kind = "move"   // container to another machine (start before stop)

	Migrate  Kind = "migrate"   // running machine, FromHost -> Host, with all that is in it
	Restart  Kind = "restart"   // machine of a lost host starts again on Host, with all that was in it
	Evict    Kind = "evict"     // container gives way: it stops and has no place
	PowerOn  Kind = "power-on"  // Host
	PowerOff Kind = "power-off" // Host, which runs nothing
)

// Action is one step of a plan; steps are in the order in which to do them.
type Action struct {
	Kind      Kind
	Container string
	Machine   string // for Boot: a temporary name, "new-1", "new-2", ... within the plan
	Host      string
	From, To  Size
	// FromMachine and FromHost are where a moved container, a migrated or a
	// restarted machine was.
	FromMachine string
	FromHost    string
	// Seconds is how long the step takes where the host says so; Cost is what the
	// option was weighed at, in seconds-equivalents.
	Seconds   float64
	Cost      float64
	Bytes     int64     // memory that a Move or Migrate carries
	Project   string    // of a booted machine
	Isolation Isolation // of a booted machine
	Ceiling   Size      // of a booted machine
	Reason    Reason    // why here, or why at all
}

// Reason is why an option won.
type Reason struct {
	Summary    string // one sentence
	Options    []Option
	Exclusions []Exclusion
}

// Option is one way that was weighed.
type Option struct {
	Action  string // "place", "grow", "boot", "metal"
	Machine string
	Host    string
	Cost    float64 // sum of Terms
	Seconds float64 // until the container runs
	Pinned  int64   // bytes bound for good
	Terms   []Term
	Chosen  bool
}

// Term is one part of a cost.
type Term struct {
	Name  string
	Value float64
}

// Exclusion counts candidates that a rule turned away.
type Exclusion struct {
	Rule   string // "cpu", "memory", "isolation", "project", "ports", "volume", "host", "anti", "ceiling", "capability", "down"
	Layer  string // "machine" or "host"
	Count  int
	Detail string // "1.2 CPU short at best (m-5)"
}

// Unplaced is a container for which nothing fits.
type Unplaced struct {
	Container string
	Reason    Reason
	Remedy    string // the cheapest way out, in words
}

// Plan answers a question.
type Plan struct {
	Revision uint64 // of the state it was computed from
	Actions  []Action
	Unplaced []Unplaced
	// Relaxed says that the guarantee is not kept by every step: after a loss
	// what was lost comes first.
	Relaxed bool
}
