package planner

import "slices"

// container is a Container in 128 bytes: there may be a million.
type container struct {
	ID        string
	Project   string
	Service   string
	need      Size
	*demands  // never nil
	host      *host
	machine   *machine
	standby   [2]*host
	quota     *quota   // of its project
	place     [2]int32 // in its boxes, by their level
	Isolation Isolation
	Class     Class
	Uncovered bool
	Stateful  bool
	plain     bool // brings no rules on where it goes
	exposed   bool // in State.exposed
}

// demands is what few containers ask for; the others share none of it.
type demands struct {
	Ports   []Port
	Volumes []string
	Hosts   []string
	Zones   []string
	Anti    []AntiRule
	Near    []NearRule
	Pool    string
	Spread  string
}

var noDemands = &demands{}

func (s *State) newContainer(c *Container) *container {
	n := &container{
		ID: c.ID, Project: s.name(c.Project), Service: s.name(c.Service), need: c.effective(), demands: noDemands, quota: s.quota(c.Project),
		Isolation: c.Isolation, Class: c.Class, Uncovered: c.Uncovered, Stateful: c.Stateful,
	}
	n.plain = len(c.Ports)+len(c.Volumes)+len(c.Hosts)+len(c.Zones)+len(c.Anti)+len(c.Near) == 0
	if n.plain && c.Pool == "" && c.Spread == "" {
		return n
	}
	n.demands = &demands{
		Ports: slices.Clone(c.Ports), Volumes: slices.Clone(c.Volumes), Hosts: slices.Clone(c.Hosts), Zones: slices.Clone(c.Zones),
		Anti: slices.Clone(c.Anti), Near: slices.Clone(c.Near), Pool: c.Pool, Spread: c.Spread,
	}
	for i := range n.Anti {
		n.Anti[i].Service = s.name(n.Anti[i].Service)
	}
	return n
}

// unplaced is what is known of c, but not where it is.
func (c *container) unplaced() Container {
	return Container{
		ID: c.ID, Project: c.Project, Service: c.Service, Isolation: c.Isolation, Class: c.Class, Request: c.need,
		Ports: c.Ports, Volumes: c.Volumes, Hosts: c.Hosts, Zones: c.Zones, Pool: c.Pool, Uncovered: c.Uncovered,
		Stateful: c.Stateful, Spread: c.Spread, Anti: c.Anti, Near: c.Near,
	}
}

// machineID and hostID are where c is, "" if nowhere.
func (c *container) machineID() string {
	if c.machine == nil {
		return ""
	}
	return c.machine.ID
}

func (c *container) hostID() string {
	if c.host == nil {
		return ""
	}
	return c.host.ID
}
