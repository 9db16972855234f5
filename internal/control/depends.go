package control

import (
	"fmt"

	v1 "tandem/api/tandem/v1"
	"tandem/internal/store"
)

// The conditions of depends_on.
const (
	Started   = "service_started"
	Healthy   = "service_healthy"
	Completed = "service_completed_successfully"
)

// Ready says whether a container does its work: it runs and its health check,
// when it has one, passes.
func Ready(c *v1.Container) bool {
	return c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_RUNNING && fresh(c) &&
		(!HasCheck(c) || c.Status.Health == v1.Health_HEALTH_HEALTHY)
}

// HasCheck says whether a container is known to have a health check: its own, or
// one of its image, which the agent reports by a health state.
func HasCheck(c *v1.Container) bool {
	t := c.GetSpec().GetHealthcheck().GetTest()
	if len(t) > 0 {
		return t[0] != "NONE"
	}
	return c.GetStatus().GetHealth() != v1.Health_HEALTH_UNSPECIFIED
}

// fresh says that the status is about the newest intent to restart.
func fresh(c *v1.Container) bool {
	return c.Status.ObservedRestartGeneration >= c.RestartGeneration
}

// Ended says whether a container has ended and will not be started again.
func Ended(c *v1.Container) bool {
	return c.GetStatus().GetState() == v1.ContainerState_CONTAINER_STATE_EXITED && fresh(c)
}

type svcKey struct{ project, service string }

// byService groups the containers that count for their service: no one-off ones,
// none that is going.
func byService(cs []*v1.Container) map[svcKey][]*v1.Container {
	m := make(map[svcKey][]*v1.Container)
	for _, c := range cs {
		if c.Service != "" && !c.OneOff && !c.Meta.Deleting {
			k := svcKey{c.Meta.Project, c.Service}
			m[k] = append(m[k], c)
		}
	}
	return m
}

// waitsFor says what a container's first start still waits for; "" when nothing.
func waitsFor(c *v1.Container, services map[svcKey]*v1.Service, groups map[svcKey][]*v1.Container) string {
	if c.GetStatus().GetStartedAt() != nil {
		return ""
	}
	for _, d := range c.GetSpec().GetDependsOn() {
		k := svcKey{c.Meta.Project, d.Service}
		s := services[k]
		if s == nil {
			if d.Required {
				return fmt.Sprintf("service %s, which is not there", d.Service)
			}
			continue
		}
		want, have := int(s.Replicas), 0
		for _, x := range groups[k] {
			st := x.GetStatus()
			switch d.Condition {
			case Healthy:
				if Ready(x) {
					have++
				}
			case Completed:
				if Ended(x) && st.ExitCode == 0 {
					have++
				}
			default:
				if st.GetStartedAt() != nil && st.GetState() != v1.ContainerState_CONTAINER_STATE_UNKNOWN {
					have++
				}
			}
		}
		if have < want {
			words := map[string]string{Healthy: "to be healthy", Completed: "to complete"}[d.Condition]
			if words == "" {
				words = "to start"
			}
			return fmt.Sprintf("%s %s (%d of %d)", d.Service, words, have, want)
		}
	}
	return ""
}

// WaitsFor says what a container's first start still waits for, in words; ""
// when nothing.
func (c *Controller) WaitsFor(x *v1.Container, snap *store.Snapshot) string {
	services := map[svcKey]*v1.Service{}
	for _, s := range snap.Services {
		services[svcKey{s.Meta.Project, s.Meta.Name}] = s
	}
	return waitsFor(x, services, byService(active(snap.Containers)))
}
