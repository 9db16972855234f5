package cli

import (
	"fmt"
	"time"

	v1 "tandem/api/tandem/v1"
)

// scaleLine says in one line why a service has as many containers as it has.
func scaleLine(s *v1.ServiceScale) string {
	t := fmt.Sprintf("%s/%s: %d of %d to %d; %s", s.GetProject(), s.GetService(), s.GetReplicas(), s.GetPolicy().GetMin(), s.GetPolicy().GetMax(), s.GetNow())
	if st := s.GetStatus(); st != nil {
		t += fmt.Sprintf("; was %d until %s ago", st.GetFrom(), ago(st.GetAt(), time.Now()))
	}
	return t
}
