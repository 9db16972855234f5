package server

import (
	"fmt"
	"slices"
	"strings"

	"tandem/api/policy"
	"tandem/api/scaling"
	v1 "tandem/api/tandem/v1"
	"tandem/internal/control"
	"tandem/internal/store"
)

// checkApply validates a request as a whole, as far as that can be said without
// the state.
func checkApply(r *v1.ApplyProjectRequest) error {
	if err := checkProjectName(r.GetProject()); err != nil {
		return err
	}
	p := &problems{}
	p.count("services", len(r.Services), maxServices)
	p.count("networks", len(r.Networks), maxNetworks)
	p.count("volumes", len(r.Volumes), maxVolumes)
	networks := map[string]bool{"default": true}
	for _, n := range r.Networks {
		if !objectName.MatchString(n.Name) || networks[n.Name] && n.Name != "default" {
			p.add("network %.80q is malformed or there twice", n.Name)
		}
		networks[n.Name] = true
	}
	volumes := map[string]bool{}
	for _, v := range r.Volumes {
		if !objectName.MatchString(v.Name) || volumes[v.Name] {
			p.add("volume %.80q is malformed or there twice", v.Name)
		}
		if v.SizeBytes < 0 || v.SizeBytes > maxVolumeLen {
			p.add("volume %s: size is out of range", v.Name)
		}
		volumes[v.Name] = true
	}
	services := map[string]*v1.ServiceSpec{}
	names := map[string]string{}
	ports := map[string]string{}
	for _, s := range r.Services {
		p.at = fmt.Sprintf("service %.63s: ", s.GetName())
		if !serviceName.MatchString(s.Name) || services[s.Name] != nil {
			p.add("the name is malformed or there twice")
		}
		services[s.Name] = s
		if s.Replicas < 0 || s.Replicas > maxReplicas {
			p.add("%d replicas, at most %d", s.Replicas, maxReplicas)
		}
		if s.ContainerName != "" {
			if !objectName.MatchString(s.ContainerName) {
				p.add("container_name %.80q is malformed", s.ContainerName)
			}
			if s.Replicas > 1 {
				p.add("container_name %s goes with one container, not %d", s.ContainerName, s.Replicas)
			}
			if o := names[s.ContainerName]; o != "" {
				p.add("container_name %s is also service %s's", s.ContainerName, o)
			}
			names[s.ContainerName] = s.Name
		}
		if !slices.Contains([]string{"", "stop-first", "start-first"}, s.UpdateOrder) || s.UpdateParallelism < 0 {
			p.add("update order %.20q or parallelism %d is not known", s.UpdateOrder, s.UpdateParallelism)
		}
		if !slices.Contains([]string{"", "host", "machine", "zone"}, s.Spread) {
			p.add("spread %.20q is not one of host, machine, zone", s.Spread)
		}
		for _, what := range scaling.Check(s) {
			p.add("scale: %s", what)
		}
		p.spec(s.Template)
		for _, n := range s.GetTemplate().GetNetworks() {
			if !networks[n.Network] {
				p.add("network %q is not declared", n.Network)
			}
		}
		for _, v := range control.NamedVolumes(s.Template) {
			if !volumes[v] {
				p.add("volume %q is not declared", v)
			}
		}
		for _, m := range s.GetTemplate().GetPorts() {
			if m.HostPort == 0 {
				continue
			}
			k := fmt.Sprintf("%s/%d", control.Protocol(m), m.HostPort)
			if o := ports[k]; o != "" {
				p.add("port %s is published by %s already", k, o)
			}
			ports[k] = s.Name
		}
	}
	company := policy.Company(r.Services)
	for _, s := range r.Services {
		p.at = "service " + s.Name + ": "
		for _, what := range company[s.Name] {
			p.add("%s", what)
		}
		for _, d := range s.GetTemplate().GetDependsOn() {
			if services[d.Service] == nil && d.Required {
				p.add("depends on %q, which is not there", d.Service)
			}
		}
	}
	p.at = ""
	if c := cycle(services); c != nil {
		p.add("services depend on each other in a circle: %s", strings.Join(c, " -> "))
	}
	for _, n := range r.Only {
		if services[n] == nil {
			p.add("no service %.63q in the file", n)
		}
	}
	p.duration("timeout", r.Timeout)
	return p.err()
}

// cycle finds services that wait for each other; nil when there are none.
func cycle(services map[string]*v1.ServiceSpec) []string {
	state := map[string]int{} // 1: being visited, 2: done
	var stack []string
	var visit func(n string) []string
	visit = func(n string) []string {
		if state[n] == 2 || services[n] == nil {
			return nil
		}
		stack = append(stack, n)
		if state[n] == 1 {
			return stack[slices.Index(stack, n):]
		}
		state[n] = 1
		for _, d := range services[n].GetTemplate().GetDependsOn() {
			if c := visit(d.Service); c != nil {
				return c
			}
		}
		state[n] = 2
		stack = stack[:len(stack)-1]
		return nil
	}
	names := make([]string, 0, len(services))
	for n := range services {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		if c := visit(n); c != nil {
			return c
		}
	}
	return nil
}

// portConflicts finds published ports that somebody outside these services has.
// mine says which containers belong to the services that publish.
func portConflicts(all []*v1.Container, templates map[string]*v1.ContainerSpec, mine func(*v1.Container) bool) *problems {
	p := &problems{}
	owner := map[string]*v1.Container{}
	for _, c := range all {
		if c.Meta.Deleting || mine(c) || (c.Stopped && c.Service == "") {
			continue
		}
		for _, m := range c.GetSpec().GetPorts() {
			if m.HostPort != 0 {
				owner[fmt.Sprintf("%s/%d", control.Protocol(m), m.HostPort)] = c
			}
		}
		for _, m := range c.GetAssignment().GetPorts() {
			owner[fmt.Sprintf("%s/%d", control.Protocol(m), m.HostPort)] = c
		}
	}
	for name, t := range templates {
		for _, m := range t.GetPorts() {
			k := fmt.Sprintf("%s/%d", control.Protocol(m), m.HostPort)
			if c := owner[k]; c != nil && m.HostPort != 0 {
				p.add("%s: port %s is published by %s already: stop it or choose another port", name, k, c.Meta.Project+"/"+c.Meta.Name)
			}
		}
	}
	slices.Sort(p.list)
	return p
}

// scope is the set of services that a request is about: all, or those named and
// what they depend on.
func scope(r *v1.ApplyProjectRequest) map[string]bool {
	byName := map[string]*v1.ServiceSpec{}
	for _, s := range r.Services {
		byName[s.Name] = s
	}
	in := map[string]bool{}
	var add func(n string)
	add = func(n string) {
		if in[n] || byName[n] == nil {
			return
		}
		in[n] = true
		for _, d := range byName[n].GetTemplate().GetDependsOn() {
			add(d.Service)
		}
	}
	if len(r.Only) == 0 {
		for n := range byName {
			in[n] = true
		}
	}
	for _, n := range r.Only {
		add(n)
	}
	return in
}

func projectKey(name string) store.Key { return store.Key{Kind: store.Projects, Name: name} }
